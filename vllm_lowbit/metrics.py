# SPDX-License-Identifier: Apache-2.0
"""``vllm_lowbit_*`` on vLLM's own /metrics.

Labelled by ``model_name`` and ``engine`` like vLLM's own. There is no metric of
saturated activations: a grid spans the extremes of its own token or group, or the
fraction of them that the checkpoint's clip ratios say, whatever the load.
"""

import functools

from prometheus_client import Gauge
from vllm.config import VllmConfig
from vllm.v1.metrics.loggers import StatLoggerBase

from .architecture import ModelShape
from .config import LowbitQuantizationConfig
from .kernels import dispatch
from .kernels.kv4_store.layout import bytes_per_token
from .truth import rotation_summary
from .worker_metrics import load_seconds

ENGINE = ("model_name", "engine")
INFO_LABELS = (
    "weights",
    "activations",
    "kv",
    "vocabulary",
    "rotation",
    "backend",
    "checkpoint",
)


@functools.cache
def _gauge(name: str, documentation: str, labels: tuple[str, ...] = ()) -> Gauge:
    # With several API servers each exports the same value: any of them will do.
    return Gauge(
        f"vllm_lowbit_{name}",
        documentation,
        (*ENGINE, *labels),
        multiprocess_mode="mostrecent",
    )


class LowbitStatLogger(StatLoggerBase):
    """Exports the scheme of one engine; vLLM makes one for each in every API server.

    The values come from the config the workers were built from, and a worker that
    would run anything else refuses to start. What a worker measured comes through
    ``worker_metrics``; vLLM builds this object once the workers are ready.
    """

    def __init__(self, vllm_config: VllmConfig, engine_index: int = 0) -> None:
        config = vllm_config.quant_config
        if not isinstance(config, LowbitQuantizationConfig):
            return
        model, device = vllm_config.model_config, vllm_config.device_config.device_type
        engine = {"model_name": model.served_model_name, "engine": str(engine_index)}
        scheme = config.resolved.scheme
        operator = "linear_wna16" if scheme.activations.bits == 16 else "linear_w4a4"
        _gauge(
            "info", "What the engine runs, as labels; the value is 1.", INFO_LABELS
        ).labels(
            **engine,
            weights=f"int{scheme.weights.bits}",
            activations=_bits(scheme.activations.bits),
            kv=_bits(scheme.kv_cache.bits),
            vocabulary=_bits(scheme.vocab_bits),
            rotation=rotation_summary(config.resolved),
            backend=dispatch.select(operator, device).backend,
            checkpoint=config.checkpoint_format,
        ).set(1)
        used, bf16 = kv_bytes_per_token(vllm_config, config)
        _gauge(
            "kv_bytes_per_token",
            "Bytes of KV cache one token takes, over all layers and KV heads.",
        ).labels(**engine).set(used)
        _gauge(
            "kv_capacity_ratio",
            "Tokens of KV cache in the same memory, against a bfloat16 cache.",
        ).labels(**engine).set(bf16 / used)
        seconds = _gauge(
            "load_seconds",
            "Seconds a worker quantized, converted and packed weights while loading.",
            ("rank",),
        )
        for rank, value in load_seconds(engine_index).items():
            seconds.labels(**engine, rank=str(rank)).set(value)

    def record(self, *args: object, **kwargs: object) -> None:
        """Nothing changes while serving."""

    def log_engine_initialized(self) -> None:
        """Nothing to add to vLLM's own line."""


def kv_bytes_per_token(
    vllm_config: VllmConfig, config: LowbitQuantizationConfig
) -> tuple[int, int]:
    """Bytes of KV cache per token over all layers and KV heads of all ranks.

    Returns:
        those in use, and those of a bfloat16 cache.
    """
    model = vllm_config.model_config
    shape = ModelShape.from_config(model.hf_config.to_dict(), model.model)
    per_head = bytes_per_token(shape.head_dim)
    if config.resolved.scheme.kv_cache.bits == 16:
        per_head = 2 * shape.head_dim * model.dtype.itemsize
    heads = shape.num_layers * shape.num_kv_heads
    return heads * per_head, heads * 2 * shape.head_dim * 2


def _bits(bits: int) -> str:
    return "unquantized" if bits == 16 else f"int{bits}"
