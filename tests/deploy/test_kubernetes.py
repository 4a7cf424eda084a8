# SPDX-License-Identifier: Apache-2.0
"""Manifests against the API's schemas, and what they promise."""

import json
import re
from pathlib import Path
from typing import Any

import jsonpatch
import kubernetes_validate
import pytest
import yaml

from vllm_lowbit.deploy.config_file import read_config
from vllm_lowbit.deploy.front_door import FrontDoor

FOLDER = Path(__file__).parents[2] / "deploy" / "kubernetes"
KUSTOMIZATION = yaml.safe_load((FOLDER / "kustomization.yaml").read_text())
VERSIONS = ("1.32", "1.35", "1.37")
OBJECTS = {
    document["kind"]: document
    for name in KUSTOMIZATION["resources"]
    for document in yaml.safe_load_all((FOLDER / name).read_text())
}
CUDA = jsonpatch.apply_patch(
    OBJECTS["Deployment"], json.loads((FOLDER / "cuda" / "patch.json").read_text())
)
DEPLOYMENTS = {"cpu": OBJECTS["Deployment"], "cuda": CUDA}
VALUES = yaml.safe_load((FOLDER / "production-stack-values.yaml").read_text())


def validate(document: Any, version: str) -> None:
    kubernetes_validate.validate(document, version, strict=True)


@pytest.fixture(params=DEPLOYMENTS)
def deployment(request: pytest.FixtureRequest) -> Any:
    return DEPLOYMENTS[request.param]


@pytest.fixture
def pod(deployment: Any) -> Any:
    return deployment["spec"]["template"]["spec"]


def containers(pod: Any) -> list[Any]:
    return [*pod["initContainers"], *pod["containers"]]


def vllm(pod: Any) -> Any:
    return next(c for c in pod["containers"] if c["name"] == "vllm")


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("kind", [*OBJECTS, "cuda"])
def test_schema(kind: str, version: str) -> None:
    validate(CUDA if kind == "cuda" else OBJECTS[kind], version)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("/spec/template/spec/containers/0/imagee", "x"),
        ("/spec/template/spec/containers/0/readinessProbe/periodSecond", 3),
        ("/spec/replicas", "two"),
        ("/spec/template/spec/volumes/0/persistentVolumeClaim/readonly", True),
    ],
)
def test_a_typo_does_not_validate(path: str, value: Any) -> None:
    patch = [{"op": "add", "path": path, "value": value}]
    with pytest.raises(kubernetes_validate.ValidationError):
        validate(jsonpatch.apply_patch(OBJECTS["Deployment"], patch), VERSIONS[-1])


def test_every_file_is_applied() -> None:
    files = {path.name for path in FOLDER.glob("*.yaml")}
    others = {"kustomization.yaml", "production-stack-values.yaml"}
    assert set(KUSTOMIZATION["resources"]) == files - others
    cuda = yaml.safe_load((FOLDER / "cuda" / "kustomization.yaml").read_text())
    assert cuda["resources"] == [".."] and cuda["patches"][0]["path"] == "patch.json"
    target = cuda["patches"][0]["target"]
    assert target["name"] == OBJECTS["Deployment"]["metadata"]["name"]


def test_names_and_labels_meet(deployment: Any) -> None:
    labels = deployment["spec"]["template"]["metadata"]["labels"]
    pod = deployment["spec"]["template"]["spec"]
    ports = {p["name"] for c in pod["containers"] for p in c.get("ports", [])}
    for selector in (
        deployment["spec"]["selector"]["matchLabels"],
        OBJECTS["Service"]["spec"]["selector"],
        OBJECTS["PodDisruptionBudget"]["spec"]["selector"]["matchLabels"],
        OBJECTS["NetworkPolicy"]["spec"]["podSelector"]["matchLabels"],
    ):
        assert selector and selector.items() <= labels.items()
    assert {p["targetPort"] for p in OBJECTS["Service"]["spec"]["ports"]} <= ports
    policy = OBJECTS["NetworkPolicy"]["spec"]
    assert {p["port"] for rule in policy["ingress"] for p in rule["ports"]} <= ports
    assert pod["serviceAccountName"] == OBJECTS["ServiceAccount"]["metadata"]["name"]
    found = [v.get("persistentVolumeClaim") for v in pod["volumes"]]
    assert [claim["claimName"] for claim in found if claim] == [
        OBJECTS["PersistentVolumeClaim"]["metadata"]["name"]
    ]
    volumes = {volume["name"] for volume in pod["volumes"]}
    mounted = {m["name"] for c in containers(pod) for m in c["volumeMounts"]}
    assert mounted == volumes
    for kind, document in OBJECTS.items():
        if kind not in ("Namespace", "Kustomization"):
            namespace = OBJECTS["Namespace"]["metadata"]["name"]
            assert document["metadata"]["namespace"] == namespace


def test_restricted(pod: Any) -> None:
    """Pod security standard `restricted`, and a root file system that is read-only."""
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["securityContext"]["runAsUser"] > 0
    assert pod["securityContext"]["seccompProfile"]["type"] == "RuntimeDefault"
    assert pod["automountServiceAccountToken"] is False
    for container in containers(pod):
        context = container["securityContext"]
        assert context["allowPrivilegeEscalation"] is False
        assert context["readOnlyRootFilesystem"] is True
        assert context["capabilities"] == {"drop": ["ALL"]}
        assert "memory" in container["resources"]["limits"]
        assert re.search(r":v?\d+\.\d+\.\d+", container["image"]), container["image"]


def test_model_is_read_only(pod: Any) -> None:
    volume = next(v for v in pod["volumes"] if v["name"] == "models")
    assert volume["persistentVolumeClaim"]["readOnly"] is True
    mounts = [m for c in containers(pod) for m in c["volumeMounts"]]
    assert all(m.get("readOnly") for m in mounts if m["name"] in ("models", "keys"))
    assert vllm(pod)["args"][1].startswith("/models/")


def test_probes_ask_for_a_completion(pod: Any) -> None:
    for kind, question in (
        ("startupProbe", "ready"),
        ("readinessProbe", "ready"),
        ("livenessProbe", "live"),
    ):
        probe = vllm(pod)[kind]
        command = probe["exec"]["command"]
        assert command[:4] == ["python3", "-m", "vllm_lowbit.deploy.probe", question]
        # It ends by itself before the kubelet ends it, and says what it missed.
        seconds = float(command[4].removeprefix("--seconds="))
        assert 3 * seconds + 1 < probe["timeoutSeconds"]
        assert VALUES["servingEngineSpec"][kind]["exec"]["command"] == command


def test_stopping_takes_no_request_down(pod: Any) -> None:
    args, grace = vllm(pod)["args"], pod["terminationGracePeriodSeconds"]
    drain = next(a for a in args if a.startswith("--shutdown-timeout="))
    pause = int(vllm(pod)["lifecycle"]["preStop"]["exec"]["command"][1])
    assert pause + int(drain.partition("=")[2]) < grace


def test_upgrade_keeps_every_replica(deployment: Any) -> None:
    rolling = deployment["spec"]["strategy"]["rollingUpdate"]
    assert rolling["maxUnavailable"] == 0 and rolling["maxSurge"] >= 1
    budget = OBJECTS["PodDisruptionBudget"]["spec"]["minAvailable"]
    assert 1 <= budget < deployment["spec"]["replicas"]


def test_only_the_front_door_reaches_vllm(pod: Any, tmp_path: Path) -> None:
    assert "--host=127.0.0.1" in vllm(pod)["args"] and "ports" not in vllm(pod)
    assert pod["enableServiceLinks"] is False
    assert OBJECTS["NetworkPolicy"]["spec"]["egress"] == []
    path = tmp_path / "front-door.yaml"
    path.write_text(OBJECTS["ConfigMap"]["data"]["front-door.yaml"])
    config = read_config(path, FrontDoor)
    assert config.upstreams == ("127.0.0.1:8000",)
    door = next(c for c in pod["containers"] if c["name"] == "front-door")
    ports = {p["name"]: p["containerPort"] for p in door["ports"]}
    assert config.listen == f"0.0.0.0:{ports['http']}"
    assert config.metrics is not None
    assert config.metrics.listen == f"0.0.0.0:{ports['metrics']}"
    secret = next(v for v in pod["volumes"] if v["name"] == "keys")["secret"]
    assert not secret["defaultMode"] & 0o007


def test_cuda_asks_for_a_gpu() -> None:
    limits = vllm(CUDA["spec"]["template"]["spec"])["resources"]["limits"]
    assert limits["nvidia.com/gpu"] == "1" and "memory" in limits
    images = {c["image"] for c in containers(CUDA["spec"]["template"]["spec"])}
    assert not any(image.endswith("-cpu") for image in images)


@pytest.mark.parametrize("name", ["cpu", "cuda", "chart"])
def test_vllm_knows_its_arguments(name: str) -> None:
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    if name == "chart":
        model = VALUES["servingEngineSpec"]["modelSpec"][0]
        args = [model["modelURL"], *model["vllmConfig"]["extraArgs"]]
    else:
        command, *args = vllm(DEPLOYMENTS[name]["spec"]["template"]["spec"])["args"]
        assert command == "serve"
    parser = make_arg_parser(FlexibleArgumentParser())
    parsed = parser.parse_args(args)
    assert parsed.model_tag == "/models/model"
    assert parsed.quantization == "lowbit"


def test_chart_pods_are_as_restricted(pod: Any) -> None:
    engine = VALUES["servingEngineSpec"]
    assert engine["containerSecurityContext"]["readOnlyRootFilesystem"] is True
    assert engine["containerSecurityContext"]["capabilities"] == {"drop": ["ALL"]}
    assert engine["securityContext"]["runAsNonRoot"] is True
    model = engine["modelSpec"][0]
    mounts = {m["name"]: m for m in model["extraVolumeMounts"]}
    assert mounts.keys() == {v["name"] for v in model["extraVolumes"]}
    assert mounts["models"]["readOnly"] is True
    container = {
        **vllm(pod),
        "env": model["env"],
        "volumeMounts": model["extraVolumeMounts"],
        "securityContext": engine["containerSecurityContext"],
    }
    spec = {
        "containers": [container],
        "volumes": model["extraVolumes"],
        "securityContext": engine["securityContext"],
    }
    validate(
        {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "x"}, "spec": spec},
        VERSIONS[-1],
    )
