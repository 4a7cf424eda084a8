# SPDX-License-Identifier: Apache-2.0
"""A KubeRay RayService from the same configuration that `serve run` takes."""

from typing import Any

import yaml

from ...errors import ConfigError
from .config import ServeConfig

# The extra `ray` and the image have the same.
RAY_VERSION = "2.60.0"
USER = 10001


def ray_service(config: ServeConfig) -> dict[str, Any]:
    """The manifest; pods are as restricted as those in deploy/kubernetes.

    Raises:
        ConfigError: for a model that pods could not read.
    """
    if not config.model.startswith("/models/"):
        raise ConfigError(
            f"key model: {config.model!r} is not below /models/, where pods mount the "
            f"claim {config.cluster.models_claim}"
        )
    arguments = config.model_dump(mode="json", exclude={"cluster"})
    application = {
        "name": config.cluster.name,
        "import_path": "vllm_lowbit.deploy.ray_serve:app",
        "route_prefix": "/",
        "args": arguments,
    }
    http = {"host": "0.0.0.0", "port": 8000}
    serve = {"http_options": http, "applications": [application]}
    # On GPUs, a pod for each pipeline stage; tensor parallelism stays within one.
    parallel, replicas = config.parallel, config.replicas
    return {
        "apiVersion": "ray.io/v1",
        "kind": "RayService",
        "metadata": {
            "name": config.cluster.name,
            "namespace": config.cluster.namespace,
        },
        "spec": {
            "serveConfigV2": yaml.safe_dump(serve, sort_keys=False, width=88),
            "rayClusterConfig": {
                "rayVersion": RAY_VERSION,
                "enableInTreeAutoscaling": True,
                "headGroupSpec": {
                    # Nothing is placed on the head: it has no weights to lose.
                    "rayStartParams": {"num-cpus": "0", "dashboard-host": "0.0.0.0"},
                    "template": _pod(config, "head", "2", "4Gi", 0),
                },
                "workerGroupSpecs": [
                    {
                        "groupName": "engines",
                        "replicas": replicas.minimum * parallel.pipeline,
                        "minReplicas": replicas.minimum * parallel.pipeline,
                        "maxReplicas": replicas.maximum * parallel.pipeline,
                        "rayStartParams": {},
                        "template": _pod(
                            config,
                            "worker",
                            # One for the process that takes requests.
                            f"{config.resources.cpus * parallel.tensor + 1:g}",
                            config.cluster.worker_memory,
                            config.resources.gpus * parallel.tensor,
                        ),
                    }
                ],
            },
        },
    }


def _pod(
    config: ServeConfig, role: str, cpus: str, memory: str, gpus: int
) -> dict[str, Any]:
    limits: dict[str, str] = {"memory": memory}
    if gpus:
        limits["nvidia.com/gpu"] = str(gpus)
    container = {
        "name": f"ray-{role}",
        "image": config.cluster.image,
        "env": [
            {"name": "VLLM_PLUGINS", "value": "lowbit"},
            {"name": "HF_HUB_OFFLINE", "value": "1"},
            {"name": "VLLM_NO_USAGE_STATS", "value": "1"},
            {"name": "RAY_USAGE_STATS_ENABLED", "value": "0"},
            {"name": "HOME", "value": "/tmp"},
        ],
        "resources": {"requests": {"cpu": cpus, "memory": memory}, "limits": limits},
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        },
        "volumeMounts": [
            {"name": "models", "mountPath": "/models", "readOnly": True},
            {"name": "tmp", "mountPath": "/tmp"},
            {"name": "shm", "mountPath": "/dev/shm"},
        ],
    }
    if role == "head":
        container["ports"] = [
            {"name": "gcs", "containerPort": 6379},
            {"name": "dashboard", "containerPort": 8265},
            {"name": "client", "containerPort": 10001},
            {"name": "serve", "containerPort": 8000},
        ]
    return {
        "spec": {
            "automountServiceAccountToken": role == "head",
            "enableServiceLinks": False,
            "securityContext": {
                "runAsNonRoot": True,
                "runAsUser": USER,
                "runAsGroup": USER,
                "fsGroup": USER,
                "seccompProfile": {"type": "RuntimeDefault"},
            },
            "containers": [container],
            "volumes": [
                {
                    "name": "models",
                    "persistentVolumeClaim": {
                        "claimName": config.cluster.models_claim,
                        "readOnly": True,
                    },
                },
                {"name": "tmp", "emptyDir": {}},
                {"name": "shm", "emptyDir": {"medium": "Memory"}},
            ],
        }
    }
