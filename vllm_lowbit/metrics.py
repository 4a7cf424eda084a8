# SPDX-License-Identifier: Apache-2.0
"""``vllm_lowbit_*`` on vLLM's own /metrics."""

import functools

from prometheus_client import Gauge
from vllm.config import VllmConfig
from vllm.v1.metrics.loggers import StatLoggerBase

from .architecture import LlamaShape
from .config import LowbitQuantizationConfig
from .kernels import dispatch
from .kernels.kv4_store.layout import bytes_per_token
from .truth import rotation_summary

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
def _info() -> Gauge:
    return Gauge(
        "vllm_lowbit_info",
        "What the server runs, as labels; the value is 1.",
        INFO_LABELS,
        multiprocess_mode="mostrecent",
    )


@functools.cache
def _kv_bytes() -> Gauge:
    return Gauge(
        "vllm_lowbit_kv_bytes_per_token",
        "Bytes of KV cache one token takes, over all layers and KV heads.",
        multiprocess_mode="mostrecent",
    )


class LowbitStatLogger(StatLoggerBase):
    """Exports the scheme of the engine; loaded by vLLM in its front-end process.

    The values come from the config the workers were built from, and a worker that
    would run anything else refuses to start.
    """

    def __init__(self, vllm_config: VllmConfig, engine_index: int = 0) -> None:
        config = vllm_config.quant_config
        if not isinstance(config, LowbitQuantizationConfig):
            return
        scheme = config.resolved.scheme
        device = vllm_config.device_config.device_type
        operator = "linear_wna16" if scheme.activations.bits == 16 else "linear_w4a4"
        _info().labels(
            weights=f"int{scheme.weights.bits}",
            activations=_bits(scheme.activations.bits),
            kv=_bits(scheme.kv_cache.bits),
            vocabulary=_bits(scheme.vocab_bits),
            rotation=rotation_summary(config.resolved),
            backend=dispatch.select(operator, device).backend,
            checkpoint=config.checkpoint_format,
        ).set(1)
        _kv_bytes().set(kv_bytes_per_token(vllm_config, config))

    def record(self, *args: object, **kwargs: object) -> None:
        """Nothing changes while serving."""

    def log_engine_initialized(self) -> None:
        """Nothing to add to vLLM's own line."""


def kv_bytes_per_token(
    vllm_config: VllmConfig, config: LowbitQuantizationConfig
) -> int:
    """Bytes of KV cache per token over all layers and KV heads of all ranks."""
    model = vllm_config.model_config
    shape = LlamaShape.from_config(model.hf_config.to_dict(), model.model)
    per_head = bytes_per_token(shape.head_dim)
    if config.resolved.scheme.kv_cache.bits == 16:
        per_head = 2 * shape.head_dim * model.dtype.itemsize
    return shape.num_layers * shape.num_kv_heads * per_head


def _bits(bits: int) -> str:
    return "unquantized" if bits == 16 else f"int{bits}"
