# SPDX-License-Identifier: Apache-2.0
"""The file people edit to serve a model with Ray, and what Ray Serve makes of it."""

import dataclasses
import difflib
from typing import Annotated, Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from ...schema import StrictModel

# Engine arguments of vLLM that other keys stand for.
ELSEWHERE = {
    "model": "model",
    "served_model_name": "name",
    "quantization": "quantization",
    "tensor_parallel_size": "parallel.tensor",
    "pipeline_parallel_size": "parallel.pipeline",
    "distributed_executor_backend": "resources.gpus",
    "data_parallel_size": "replicas",
}
Count = Annotated[int, Field(ge=1, le=1024)]
# Shorter than what Kubernetes allows: KubeRay appends to it.
Label = Annotated[str, Field(pattern=r"^[a-z]([a-z0-9-]{0,38}[a-z0-9])?$")]
Seconds = Annotated[float, Field(ge=0, le=86400, strict=False)]


class Replicas(StrictModel):
    """How many engines; between the two numbers they follow the load."""

    minimum: Count = 1
    maximum: Count = 1
    target_ongoing_requests: Annotated[float, Field(gt=0, strict=False)] = 16.0
    """Requests in flight per replica that scaling aims at."""
    upscale_delay_seconds: Seconds = 10.0
    downscale_delay_seconds: Seconds = 300.0

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.maximum < self.minimum:
            raise ValueError(
                f"maximum {self.maximum} is less than minimum {self.minimum}"
            )
        return self


class Resources(StrictModel):
    """What Ray reserves for one replica, or on GPUs for each of its workers."""

    cpus: Annotated[float, Field(gt=0, le=4096, strict=False)] = 1.0
    gpus: Literal[0, 1] = 0
    """For every worker; a replica has tensor times pipeline workers."""
    accelerator: str | None = None
    """A type of GPU as Ray names them, for instance ``H100``."""


class Parallel(StrictModel):
    """Over how many GPUs one replica is spread, on one node or several."""

    tensor: Count = 1
    pipeline: Count = 1

    @property
    def workers(self) -> int:
        return self.tensor * self.pipeline


class Cluster(StrictModel):
    """Only for the RayService that is generated."""

    name: Label = "lowbit"
    namespace: Label = "lowbit"
    image: str = "registry.example/vllm-lowbit-ray:0.1.0-cpu"
    """Has Ray and this package; its tag or digest pins it."""
    worker_memory: Annotated[str, Field(pattern=r"^[1-9][0-9]*[MG]i$")] = "16Gi"
    models_claim: Label = "models"
    """A volume claim, mounted read-only at /models."""

    @field_validator("image")
    @classmethod
    def _pinned(cls, value: str) -> str:
        _, _, tag = value.rpartition("/")[2].partition(":")
        if "@sha256:" not in value and tag in ("", "latest"):
            raise ValueError("must end in a tag other than latest, or in a digest")
        return value


class ServeConfig(StrictModel):
    """``serve.yaml`` beside this module is one."""

    model: str = Field(min_length=1)
    """A directory that every node has, or a name on a model hub."""
    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._/-]*$")
    """What clients call the model."""
    quantization: Literal["lowbit"] | None = "lowbit"
    """null for a checkpoint that is quantized already."""
    replicas: Replicas = Replicas()
    resources: Resources = Resources()
    parallel: Parallel = Parallel()
    ingress_replicas: Count = 1
    """Processes that take requests and choose a replica."""
    engine: dict[str, Any] = Field(default_factory=dict)
    """Further engine arguments of vLLM, by their Python names."""
    environment: dict[str, str] = Field(default_factory=dict)
    """Variables of the replicas."""
    cluster: Cluster = Cluster()

    @field_validator("engine")
    @classmethod
    def _known_arguments(cls, value: dict[str, Any]) -> dict[str, Any]:
        from vllm.engine.arg_utils import AsyncEngineArgs

        known = {field.name for field in dataclasses.fields(AsyncEngineArgs)}
        for name in value:
            if name in ELSEWHERE:
                raise ValueError(f"{name} is set by the key {ELSEWHERE[name]}")
            if name not in known:
                close = difflib.get_close_matches(name, known, n=1)
                hint = f"; did you mean {close[0]}?" if close else ""
                raise ValueError(f"{name} is no engine argument of vLLM{hint}")
        return value

    @model_validator(mode="after")
    def _gpus_for_parallel(self) -> Self:
        if self.parallel.workers > 1 and not self.resources.gpus:
            raise ValueError(
                f"parallel.tensor {self.parallel.tensor} and parallel.pipeline "
                f"{self.parallel.pipeline} need resources.gpus: 1; on CPUs vLLM has no "
                "Ray executor"
            )
        if self.resources.accelerator is not None and not self.resources.gpus:
            raise ValueError("resources.accelerator needs resources.gpus: 1")
        return self


def llm_config(config: ServeConfig) -> dict[str, Any]:
    """Arguments of ``ray.serve.llm.LLMConfig``."""
    replicas, on_gpus = config.replicas, config.resources.gpus == 1
    bundle = {"CPU": config.resources.cpus, **({"GPU": 1} if on_gpus else {})}
    # An engine must not outlive a replica that was killed: another takes its place.
    environment = {"VLLM_PLUGINS": "lowbit", "LOWBIT_EXIT_WITH_PARENT": "1"}
    if not on_gpus:
        # The default would bind all replicas of a machine to the same cores.
        environment["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
    engine = {
        "tensor_parallel_size": config.parallel.tensor,
        "pipeline_parallel_size": config.parallel.pipeline,
        # Across nodes only Ray starts workers; without GPUs vLLM has but processes.
        "distributed_executor_backend": "ray" if on_gpus else "mp",
        **config.engine,
    }
    if config.quantization is not None:
        engine["quantization"] = config.quantization
    arguments: dict[str, Any] = {
        "model_loading_config": {"model_id": config.name, "model_source": config.model},
        "engine_kwargs": engine,
        "placement_group_config": {"bundles": [bundle] * config.parallel.workers},
        "runtime_env": {"env_vars": {**environment, **config.environment}},
        "deployment_config": {
            "autoscaling_config": {
                "min_replicas": replicas.minimum,
                "max_replicas": replicas.maximum,
                "initial_replicas": replicas.minimum,
                "target_ongoing_requests": replicas.target_ongoing_requests,
                "upscale_delay_s": replicas.upscale_delay_seconds,
                "downscale_delay_s": replicas.downscale_delay_seconds,
            },
            # The bundle is all that a replica takes; by default Ray adds a core.
            "ray_actor_options": {"num_cpus": 0},
            "max_ongoing_requests": 1024,
            "health_check_period_s": 5,
            "health_check_timeout_s": 30,
            "graceful_shutdown_timeout_s": 120,
        },
    }
    if config.resources.accelerator is not None:
        arguments["accelerator_type"] = config.resources.accelerator
    return arguments
