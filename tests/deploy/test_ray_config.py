# SPDX-License-Identifier: Apache-2.0
"""The Ray Serve file: mistakes are named before anything starts."""

import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import kubernetes_validate
import psutil
import pytest
import yaml

from vllm_lowbit.deploy.config_file import read_config
from vllm_lowbit.deploy.ray_serve import app
from vllm_lowbit.deploy.ray_serve.config import ServeConfig, llm_config
from vllm_lowbit.deploy.ray_serve.kuberay import RAY_VERSION, ray_service
from vllm_lowbit.errors import ConfigError
from vllm_lowbit.plugin import EXIT_WITH_PARENT

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "deploy" / "ray_serve"
GOOD = "model: models/ref-7m\nname: ref-7m\n"


def parse(text: str, tmp_path: Path) -> ServeConfig:
    path = tmp_path / "serve.yaml"
    path.write_text(text)
    return read_config(path, ServeConfig)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model: x\n", ":1: key name is missing"),
        (
            GOOD + "replica:\n  minimum: 1\n",
            ":3: key replica does not exist; did you m",
        ),
        (
            GOOD + "replicas:\n  min: 1\n",
            ":4: key replicas.min does not exist; did you",
        ),
        (
            GOOD + "replicas: {minimum: 3, maximum: 2}\n",
            "maximum 2 is less than minimum",
        ),
        (
            GOOD + "replicas: {maximum: 0}\n",
            ":3: key replicas.maximum: Input should be",
        ),
        (
            GOOD + "resources: {gpus: 2}\n",
            ":3: key resources.gpus: Input should be 0 or",
        ),
        (GOOD + "resources: {accelerator: H100}\n", "accelerator needs resources.gpus"),
        (
            GOOD + "parallel: {tensor: 2}\n",
            "need resources.gpus: 1; on CPUs vLLM has no",
        ),
        (
            GOOD + "engine:\n  max_model_length: 1024\n",
            "max_model_length is no engine argument of vLLM; did you mean max_model_",
        ),
        (GOOD + "engine: {model: x}\n", "key engine: model is set by the key model"),
        (
            GOOD + "engine: {tensor_parallel_size: 2}\n",
            "is set by the key parallel.ten",
        ),
        (
            GOOD + "environment: {A: 1}\n",
            ":3: key environment.A: Input should be a val",
        ),
        (
            GOOD + "quantization: fp8\n",
            ":3: key quantization: Input should be 'lowbit'",
        ),
        (GOOD + "cluster: {image: a/b}\n", "must end in a tag other than latest"),
        (
            GOOD + "cluster: {image: 'a:1/b:latest'}\n",
            "must end in a tag other than la",
        ),
    ],
)
def test_bad_file(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        parse(text, tmp_path)
    assert message in str(error.value)
    assert str(error.value).startswith(f"{tmp_path}/serve.yaml:")


def test_application_takes_a_file_or_its_contents(tmp_path: Path) -> None:
    (tmp_path / "bad.yaml").write_text(GOOD + "nam: x\n")
    with pytest.raises(ConfigError, match="bad.yaml:3: key nam does not exist"):
        app({"config": str(tmp_path / "bad.yaml")})
    with pytest.raises(ConfigError, match="missing.yaml: cannot be read"):
        app({"config": str(tmp_path / "missing.yaml")})
    with pytest.raises(
        ConfigError, match="beside config= there is name; edit the file"
    ):
        app({"config": "x", "name": "y"})
    with pytest.raises(ConfigError, match="nam"):
        app({"model": "x", "name": "y", "nam": "z"})


def test_on_cpus() -> None:
    config = read_config(FOLDER / "serve.yaml", ServeConfig)
    arguments = llm_config(config)
    assert arguments["engine_kwargs"]["quantization"] == "lowbit"
    assert arguments["engine_kwargs"]["distributed_executor_backend"] == "mp"
    assert arguments["placement_group_config"] == {"bundles": [{"CPU": 0.5}]}
    variables = arguments["runtime_env"]["env_vars"]
    assert variables["VLLM_CPU_OMP_THREADS_BIND"] == "nobind"
    assert variables["VLLM_PLUGINS"] == "lowbit"
    assert "accelerator_type" not in arguments


def test_over_nodes() -> None:
    """Written for GPUs; validated, never run."""
    config = read_config(FOLDER / "multi-node.yaml", ServeConfig)
    arguments = llm_config(config)
    assert arguments["engine_kwargs"]["distributed_executor_backend"] == "ray"
    assert arguments["engine_kwargs"]["tensor_parallel_size"] == 8
    assert arguments["engine_kwargs"]["pipeline_parallel_size"] == 2
    bundles = arguments["placement_group_config"]["bundles"]
    assert bundles == [{"CPU": 4.0, "GPU": 1}] * 16
    assert "VLLM_CPU_OMP_THREADS_BIND" not in arguments["runtime_env"]["env_vars"]
    assert arguments["accelerator_type"] == "H100"
    (group,) = ray_service(config)["spec"]["rayClusterConfig"]["workerGroupSpecs"]
    assert (group["minReplicas"], group["maxReplicas"]) == (2, 4)
    (container,) = group["template"]["spec"]["containers"]
    assert container["resources"]["limits"]["nvidia.com/gpu"] == "8"


@pytest.mark.parametrize("name", ["serve.yaml", "multi-node.yaml"])
def test_ray_knows_its_arguments(name: str) -> None:
    llm = pytest.importorskip("ray.serve.llm", reason="extra `ray`")
    from ray.serve.schema import ServeDeploySchema

    config = read_config(FOLDER / name, ServeConfig)
    llm.LLMConfig(**llm_config(config))
    config = config.model_copy(update={"model": "/models/model"})
    text = ray_service(config)["spec"]["serveConfigV2"]
    schema = ServeDeploySchema.model_validate(yaml.safe_load(text))
    (application,) = schema.applications
    assert application.import_path == "vllm_lowbit.deploy.ray_serve:app"


class TestRayService:
    @pytest.fixture
    def document(self) -> Any:
        config = read_config(FOLDER / "serve.yaml", ServeConfig)
        return ray_service(config.model_copy(update={"model": "/models/ref-7m"}))

    def test_same_application(self, document: Any) -> None:
        """Its arguments parse into the file it was made from."""
        serve = yaml.safe_load(document["spec"]["serveConfigV2"])
        arguments = serve["applications"][0]["args"]
        config = read_config(FOLDER / "serve.yaml", ServeConfig)
        again = ServeConfig.model_validate(arguments)
        assert llm_config(again)["engine_kwargs"] == llm_config(config)["engine_kwargs"]
        assert again.replicas == config.replicas

    def test_pods(self, document: Any) -> None:
        cluster = document["spec"]["rayClusterConfig"]
        groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
        for number, group in enumerate(groups):
            pod = {
                "apiVersion": "v1",
                "kind": "Pod",
                "metadata": {"name": f"p{number}"},
                **group["template"],
            }
            kubernetes_validate.validate(pod, "1.37", strict=True)
            spec = group["template"]["spec"]
            assert spec["securityContext"]["runAsNonRoot"] is True
            (container,) = spec["containers"]
            assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
            assert container["volumeMounts"][0]["readOnly"] is True
        assert cluster["workerGroupSpecs"][0]["maxReplicas"] == 2

    def test_command(self, tmp_path: Path) -> None:
        def run(text: str) -> subprocess.CompletedProcess[str]:
            path = tmp_path / "serve.yaml"
            path.write_text(text)
            return subprocess.run(
                [sys.executable, "-m", "vllm_lowbit.deploy.ray_serve", path],
                capture_output=True,
                text=True,
                timeout=60,
                cwd=tmp_path,
            )

        good = run("model: /models/m\nname: m\n")
        assert good.returncode == 0, good.stderr
        document = yaml.safe_load(good.stdout)
        assert document["kind"] == "RayService"
        assert document["spec"]["rayClusterConfig"]["rayVersion"] == RAY_VERSION
        for text, message in (
            (
                "model: /models/m\nnme: m\n",
                "key nme does not exist; did you mean name?",
            ),
            (
                "model: models/m\nname: m\n",
                "key model: 'models/m' is not below /models/",
            ),
        ):
            bad = run(text)
            assert bad.returncode == 1 and bad.stdout == ""
            assert message in bad.stderr and "Traceback" not in bad.stderr


def test_version_is_that_of_the_extra() -> None:
    assert f'"ray[serve]=={RAY_VERSION}"' in (ROOT / "pyproject.toml").read_text()


def test_engine_does_not_outlive_a_killed_replica(tmp_path: Path) -> None:
    """A process whose parent gets SIGKILL ends by itself; the others go on."""
    variables = llm_config(ServeConfig(model="m", name="m"))["runtime_env"]["env_vars"]
    assert variables[EXIT_WITH_PARENT] == "1"
    child = (
        "import time, vllm_lowbit.plugin as plugin; "
        "plugin.exit_with_parent(0.1); plugin.exit_with_parent(0.1); time.sleep(60)"
    )
    parent = (
        "import subprocess, sys, time; "
        f"print(subprocess.Popen([sys.executable, '-c', {child!r}]).pid, flush=True); "
        "time.sleep(60)"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", parent], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    pid = int(process.stdout.readline())
    time.sleep(2)
    assert psutil.pid_exists(pid)
    process.kill()
    process.wait()
    deadline = time.monotonic() + 20
    while psutil.pid_exists(pid) and psutil.Process(pid).status() != "zombie":
        assert time.monotonic() < deadline
        time.sleep(0.1)
