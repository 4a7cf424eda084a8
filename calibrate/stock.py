# SPDX-License-Identifier: Apache-2.0
"""Which lowbit checkpoints stock vLLM runs as they were calibrated, and why not others.

Read in vLLM 0.32: what its compressed-tensors method chooses on CPUs and on CUDA.
"""

from ..errors import UnsupportedError
from ..schema import LowbitConfig, Rotation, Scheme

SUPPORTED = "w4a16, w4a16-g32, -g64, -g128 or -g256, and w8a8"
# Key of a recipe that leaves out an online rotation. A rotation of the residual stream
# may have become those of attn_input and mlp_input.
_RECIPE_KEYS = {
    "residual": "transforms.residual",
    "k": "transforms.key",
    "attn_input": "transforms.residual and attn_input",
    "mlp_input": "transforms.residual and mlp_input",
    "down_input": "transforms.down_input",
}


def refuse_what_differs(config: LowbitConfig, source: str) -> None:
    """Refuse a checkpoint that stock vLLM would not run, or run as something else.

    Args:
        config: its quantization.
        source: file named in the error.

    Raises:
        UnsupportedError: with every reason, and what to calibrate instead.
    """
    reasons = [*_linear_reasons(config.scheme), *_other_reasons(config.scheme)]
    reasons += [
        _online_reason(name)
        for name, rotation in config.rotations
        if isinstance(rotation, Rotation) and rotation.apply == "online"
    ]
    if reasons:
        raise UnsupportedError(
            f"{source}: scheme {config.scheme.name} cannot be exported to "
            f"compressed-tensors: {'; '.join(reasons)}"
        )


def _linear_reasons(scheme: Scheme) -> list[str]:
    weights, activations = scheme.weights, scheme.activations
    reasons = []
    least = min(activations.kept())
    if least != 1:
        key = (
            "clip_ratio is"
            if activations.clip_ratios is None
            else "clip_ratios: down to"
        )
        reasons.append(
            f"scheme.activations.{key} {least}: stock vLLM keeps the whole range of a "
            "token; calibrate with clip_ratio 1"
        )
    if activations.group_size is not None:
        reasons.append(
            f"scheme.activations.group_size is {activations.group_size}: stock vLLM "
            "takes one scale per token; choose a scheme without -ag"
        )
    if activations.bits == 6:
        reasons.append(
            "scheme.activations.bits is 6: stock vLLM has no 6-bit activations; choose "
            f"a scheme of {SUPPORTED}"
        )
    elif activations.bits == 4 or (activations.bits == 8 and weights.bits != 8):
        weight_only = f"as W{weights.bits}A16"
        if not activations.symmetric:
            weight_only += " where they were symmetric, and refuses asymmetric ones"
        reasons.append(
            f"scheme.activations.bits is {activations.bits}: stock vLLM would run it "
            f"{weight_only}; choose a scheme of {SUPPORTED}"
        )
    elif activations.bits == 16 and weights.bits != 4:
        reasons.append(
            f"scheme.weights.bits is {weights.bits}: with unquantized activations "
            f"stock vLLM's CPU kernels take 4 bits only, choose a scheme of {SUPPORTED}"
        )
    if not weights.symmetric:
        reasons.append(
            "scheme.weights.symmetric is false: supported: symmetric weights, as those "
            f"of {SUPPORTED} are"
        )
    if activations.bits == weights.bits == 8 and weights.group_size is not None:
        reasons.append(
            f"scheme.weights.group_size is {weights.group_size}: stock vLLM's int8 "
            "kernels take one scale per output channel, choose the scheme w8a8"
        )
    return reasons


def _other_reasons(scheme: Scheme) -> list[str]:
    reasons = []
    if scheme.kv_cache.bits != 16:
        reasons.append(
            f"scheme.kv_cache.bits is {scheme.kv_cache.bits}: stock vLLM does not have "
            "this cache, choose a scheme without kv"
        )
    if scheme.vocab_bits != 16:
        reasons.append(
            f"scheme.vocab_bits is {scheme.vocab_bits}: stock vLLM's CPU kernels do "
            "not run such a head, calibrate with --vocab-bits 16"
        )
    return reasons


def _online_reason(name: str) -> str:
    reason = f"rotations.{name} is online: stock vLLM runs none of these on CPUs"
    key = _RECIPE_KEYS.get(name)
    return reason if key is None else f"{reason}, use a recipe with {key}: none"
