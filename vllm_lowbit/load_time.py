# SPDX-License-Identifier: Apache-2.0
"""Data-free quantization of one linear while it loads: fold, then quantize.

Pure torch; the vLLM layer method and the reference model share it.
"""

from dataclasses import dataclass

import torch

from .errors import CheckpointError
from .kernels.grid import IntGrid
from .kernels.hadamard.generic import hadamard
from .kernels.quantize_weight.reference import quantize_weight
from .schema import Rotation, Rotations, Weights


@dataclass(frozen=True)
class LinearRotations:
    """Transforms around one linear.

    Attributes:
        folded_input: undone on the weight's columns because the producer applied it.
        online_input: applied to the input at run time, undone on the columns.
        output: applied to the weight's rows and to the bias.
    """

    folded_input: Rotation | None = None
    online_input: Rotation | None = None
    output: Rotation | None = None


@dataclass(frozen=True)
class QuantizedWeight:
    """Codes int8 ``[n, k]``; scale float32 and zero_point int32 ``[n, groups]``."""

    codes: torch.Tensor
    scale: torch.Tensor
    zero_point: torch.Tensor | None


def rotations_of(rotations: Rotations, role: str) -> LinearRotations:
    """Transforms of a linear by its role, the last part of its name in Llama.

    Args:
        rotations: of the whole model.
        role: ``q_proj``, ``k_proj``, ``v_proj``, ``o_proj``, ``gate_proj``,
            ``up_proj`` or ``down_proj``.
    """
    v_output = rotations.v if role == "v_proj" else None
    match role:
        case "q_proj" | "k_proj" | "v_proj":
            return LinearRotations(online_input=rotations.attn_input, output=v_output)
        case "o_proj":
            return LinearRotations(rotations.v, rotations.o_input)
        case "gate_proj" | "up_proj":
            return LinearRotations(online_input=rotations.mlp_input)
        case "down_proj":
            return LinearRotations(online_input=rotations.down_input)
    raise ValueError(f"no linear has the role {role!r}")


def fold(weight: torch.Tensor, around: LinearRotations) -> torch.Tensor:
    """Weight ``[n, k]`` with its transforms folded in, float32.

    With orthonormal H, ``W x = (W H^T)(H x)``: a row w of the weight becomes H w, so
    folding an input transform is that transform of every row.
    """
    folded = weight.float()
    for rotation in (around.folded_input, around.online_input):
        if rotation is not None:
            folded = hadamard(folded, rotation.order, rotation.stride)
    if around.output is not None:
        rotation = around.output
        folded = hadamard(folded.t(), rotation.order, rotation.stride).t()
    return folded


def fold_bias(bias: torch.Tensor, around: LinearRotations) -> torch.Tensor:
    """Bias ``[n]`` with the output transform applied, in its own dtype."""
    if around.output is None:
        return bias
    rotation = around.output
    return hadamard(bias, rotation.order, rotation.stride).to(bias.dtype)


def quantize_linear(
    weight: torch.Tensor, around: LinearRotations, weights: Weights
) -> QuantizedWeight:
    """Fold and quantize one weight ``[n, k]`` of a plain checkpoint."""
    grid = IntGrid(weights.bits, weights.symmetric)
    codes, scale, zero_point = quantize_weight(
        fold(weight, around), grid, weights.group_size
    )
    return QuantizedWeight(codes, scale, None if weights.symmetric else zero_point)


def check_finite(tensor: torch.Tensor, name: str) -> None:
    """Raise CheckpointError naming the tensor when it holds an Inf or NaN."""
    # Inf and NaN survive a sum of magnitudes; one pass, no temporary of its size.
    for part in tensor.flatten().split(1 << 22):
        if not bool(torch.isfinite(part).all()):
            bad = int((~torch.isfinite(part)).sum())
            raise CheckpointError(
                f"tensor {name} holds {bad} or more non-finite values (Inf or NaN)"
            )
