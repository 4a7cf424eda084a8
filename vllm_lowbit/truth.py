# SPDX-License-Identifier: Apache-2.0
"""What really runs: one log line per layer class, written when a layer is ready."""

import logging
from typing import TYPE_CHECKING, Any

import torch

from .kernels import dispatch
from .kernels.kv4_store.layout import bytes_per_token
from .lowbit_checkpoint import residual_is_online
from .module_names import INPUTS
from .schema import LowbitConfig, Rotation, clipped

if TYPE_CHECKING:
    from .linear import LinearRole

# A child of vLLM's logger, so that its handlers and level apply.
logger = logging.getLogger("vllm.lowbit")
_logged: set[str] = set()


def linear_ready(method: "LinearRole", taken_over: str | None = None) -> None:
    """Log the class of a quantized linear, once per process.

    Args:
        method: of the linear.
        taken_over: format of another tool's checkpoint.
    """
    scheme = method.scheme
    weights = f"int{scheme.weights.bits} " + _kind(scheme.weights.symmetric)
    weights += (
        " per channel"
        if scheme.weights.group_size is None
        else f" per group of {scheme.weights.group_size}"
    )
    kept = clipped(scheme.activations.kept(INPUTS[method.role]))
    activations = (
        "unquantized"
        if method.weight_only
        else f"int{scheme.activations.bits} {_kind(scheme.activations.symmetric)} "
        f"per {scheme.activations.per}{kept}"
    )
    _log_once(
        f"{_class(method)}: weights {weights}, activations {activations}, "
        f"{_rotation(method.input_rotation)}, backend {method.backend}"
        + ("" if taken_over is None else f", taken over from {taken_over}")
    )


def vocabulary_ready(config: LowbitConfig, backend: str) -> None:
    """Log the class of embedding and head, once per process."""
    bits = config.scheme.vocab_bits
    stored = "unquantized" if bits == 16 else f"int{bits} symmetric per row"
    residual = config.rotations.residual if residual_is_online(config) else None
    _log_once(
        f"vocabulary: embedding and head {stored}, {_rotation(residual)}, "
        f"backend {backend}"
    )


def attention_ready(config: LowbitConfig, layer: Any) -> None:
    """Log the attention class, once per process."""
    device = torch.get_default_device().type
    row = dispatch.select("kv4_attention", device, head_dim=layer.head_size)
    _log_once(
        f"attention: KV cache int{config.scheme.kv_cache.bits} asymmetric per token "
        f"and head, {bytes_per_token(layer.head_size)} bytes per token and head of "
        f"{layer.head_size}, keys {_rotation(config.rotations.k)}, values "
        f"{'not rotated' if config.rotations.v is None else 'rotation folded'}, "
        f"backend {row.backend}"
    )


def rotation_summary(config: LowbitConfig) -> str:
    """Rotations in use, for the metric's label."""
    names = {
        name: rotation
        for name, rotation in config.rotations
        if isinstance(rotation, Rotation)
    }
    return ",".join(f"{name}:{rotation.apply}" for name, rotation in names.items())


def _class(method: "LinearRole") -> str:
    of_experts = method.prefix.endswith(f".experts.{method.role}")
    return f"experts {method.role}" if of_experts else method.role


def _kind(symmetric: bool) -> str:
    return "symmetric" if symmetric else "asymmetric"


def _rotation(rotation: Rotation | None) -> str:
    if rotation is None:
        return "no online Hadamard"
    return f"online Hadamard {rotation.order} in blocks of {rotation.block}"


def _log_once(line: str) -> None:
    if line not in _logged:
        _logged.add(line)
        logger.info("lowbit %s", line)
