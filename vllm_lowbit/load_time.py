# SPDX-License-Identifier: Apache-2.0
"""Data-free quantization of one linear while it loads: fold, then quantize.

Pure torch; the vLLM layer method and the reference model share it.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from .errors import CheckpointError, UnsupportedError
from .kernels.grid import IntGrid
from .kernels.implementations import implementation
from .module_names import INPUTS
from .schema import Rotation, Rotations, Scheme, Weights

_LAYER = re.compile(r"\blayers\.(\d+)\.")


def _transform(
    x: torch.Tensor, input_scale: torch.Tensor | None, order: int, stride: int
) -> torch.Tensor:
    """``H (input_scale * x)`` of the rows of x, where x is."""
    return implementation("hadamard", x.device.type)(
        x.contiguous(), input_scale, order, stride
    )


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
    """A quantized linear.

    Attributes:
        codes: int8 ``[n, k]``.
        scale: float32 ``[n, groups]``.
        zero_point: int32 ``[n, groups]``, None when symmetric.
        input_scale: float32 ``[k]``, multiplied into the input before its online
            transform; None for none.
    """

    codes: torch.Tensor
    scale: torch.Tensor
    zero_point: torch.Tensor | None
    input_scale: torch.Tensor | None


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


def equalizing_scale(
    weight: torch.Tensor, folded_input: Rotation | None = None
) -> torch.Tensor:
    """Powers of two that bring the columns of a weight to about one magnitude.

    Dividing the columns by them and multiplying the input changes nothing in exact
    arithmetic (nor in float: powers of two do not round), but a Hadamard then mixes
    inputs by what they contribute instead of by their size, so channels that are
    large only because their weights are small no longer drown the others. It is the
    weights-only counterpart of SmoothQuant, in the spirit of weight equalization
    (Nagel et al., Data-Free Quantization, 2019, section 4.1).

    Args:
        weight: ``[n, k]``, all linears that share the input stacked.
        folded_input: transform that is undone on the columns first.

    Returns:
        float32 ``[k]`` with geometric mean about 1; 1 for all-zero columns.
    """
    energy = weight.new_zeros(weight.shape[1], dtype=torch.float64)
    for rows in weight.split(_rows_at_a_time(weight.shape[1])):
        if folded_input is not None:
            rows = _transform(rows, None, folded_input.order, folded_input.stride)
        energy += rows.double().square().sum(dim=0)
    live = energy > 0
    exponent = torch.log2(energy.where(live, 1.0)) / 2
    if bool(live.any()):
        exponent = exponent - exponent[live].mean()
    exponent = exponent.round().clamp(-16, 16).where(live, 0.0)
    return torch.exp2(exponent).float()


def fold(
    weight: torch.Tensor, around: LinearRotations, input_scale: torch.Tensor | None
) -> torch.Tensor:
    """Weight ``[n, k]`` with its transforms folded in, float32.

    With orthonormal H, ``W x = (W / s) H^T (H (s x))``: a row w of the weight becomes
    ``H (w / s)``, so folding an input transform is that transform of every row.
    """
    folded = weight.float()
    if around.folded_input is not None:
        rotation = around.folded_input
        folded = _transform(folded, None, rotation.order, rotation.stride)
    if input_scale is not None:
        folded = folded / input_scale
    if around.online_input is not None:
        rotation = around.online_input
        folded = _transform(folded, None, rotation.order, rotation.stride)
    if around.output is not None:
        rotation = around.output
        folded = _transform(folded.t(), None, rotation.order, rotation.stride).t()
    return folded


def fold_bias(
    bias: torch.Tensor, sizes: Sequence[int], parts: Sequence[LinearRotations]
) -> torch.Tensor:
    """Bias ``[n]`` with the output transforms applied, in its own dtype.

    Arguments as in :func:`quantize_linear`.
    """
    folded = []
    for part, around in zip(bias.split(list(sizes)), parts, strict=True):
        rotation = around.output
        if rotation is not None:
            part = _transform(part, None, rotation.order, rotation.stride).to(
                bias.dtype
            )
        folded.append(part)
    return torch.cat(folded)


def quantize_linear(
    weight: torch.Tensor,
    sizes: Sequence[int],
    parts: Sequence[LinearRotations],
    weights: Weights,
    input_scale: torch.Tensor | None = None,
) -> QuantizedWeight:
    """Fold and quantize a linear of a plain checkpoint, fused or not.

    Args:
        weight: ``[n, k]``, the parts stacked along n.
        sizes: rows of each part.
        parts: transforms of each; they share the online input transform.
        weights: the grid.
        input_scale: float32 ``[k]``, where other linears read the same input; None
            takes the weight's own.
    """
    n, k = weight.shape
    if input_scale is None:
        input_scale = _own_scale(weight, parts[0])
    grid = IntGrid(weights.bits, weights.symmetric)
    groups = 1 if weights.group_size is None else k // weights.group_size
    codes = weight.new_empty(n, k, dtype=torch.int8)
    scale = weight.new_empty(n, groups, dtype=torch.float32)
    zero_point = weight.new_empty(n, groups, dtype=torch.int32)
    quantize = implementation("quantize_weight", weight.device.type)
    # A few rows at a time: float copies of a whole layer would cost more memory than
    # quantizing saves. An output transform keeps its blocks of rows together.
    end = 0
    for size, around in zip(sizes, parts, strict=True):
        block = 1 if around.output is None else around.output.block
        step = -(-_rows_at_a_time(k) // block) * block
        start, end = end, end + size
        for first in range(start, end, step):
            rows = slice(first, min(first + step, end))
            codes[rows], scale[rows], zero_point[rows] = quantize(
                fold(weight[rows], around, input_scale), grid, weights.group_size
            )
    return QuantizedWeight(
        codes, scale, None if weights.symmetric else zero_point, input_scale
    )


def quantize_experts(
    weight: torch.Tensor, around: LinearRotations, weights: Weights, shared: bool
) -> QuantizedWeight:
    """Fold and quantize a linear of every expert of a plain checkpoint.

    Args:
        weight: ``[experts, n, k]``.
        around: transforms of each.
        weights: the grid.
        shared: whether all experts read the same input, and so share its scale.

    Returns:
        codes, scales and zero points with a first dimension of experts; input_scale
        ``[k]`` where it is shared, else ``[experts, k]``.
    """
    rows = [weight.shape[1]]
    common = _own_scale(weight.flatten(0, 1), around) if shared else None
    each = [quantize_linear(one, rows, [around], weights, common) for one in weight]
    return QuantizedWeight(
        torch.stack([one.codes for one in each]),
        torch.stack([one.scale for one in each]),
        _stacked([one.zero_point for one in each]),
        common if shared else _stacked([one.input_scale for one in each]),
    )


def _own_scale(weight: torch.Tensor, around: LinearRotations) -> torch.Tensor | None:
    """Of a weight's input, where its online transform is a scaled one."""
    online = around.online_input
    if online is None or not online.scaled:
        return None
    return equalizing_scale(weight, around.folded_input)


def _stacked(tensors: Sequence[torch.Tensor | None]) -> torch.Tensor | None:
    """All of them, or None where there are none."""
    present = [tensor for tensor in tensors if tensor is not None]
    return torch.stack(present) if present else None


def activation_grid(scheme: Scheme, linear: str) -> IntGrid | None:
    """Of the input of a linear; None where it is not quantized.

    Args:
        scheme: of the model.
        linear: its name as vLLM fuses it, such as
            ``model.layers.3.self_attn.qkv_proj``.

    Raises:
        UnsupportedError: where every layer has its own clip ratio, and the name says
            no layer.
    """
    chosen = scheme.activations
    if chosen.bits == 16:
        return None
    ratio = chosen.clip_ratio
    if chosen.clip_ratios is not None:
        place = INPUTS[linear.rpartition(".")[2]]
        layer, ratios = _LAYER.search(linear), chosen.kept(place)
        if layer is None or int(layer[1]) >= len(ratios):
            raise UnsupportedError(
                f"linear {linear} is in none of the {len(ratios)} layers of "
                f"scheme.activations.clip_ratios.{place}"
            )
        ratio = ratios[int(layer[1])]
    return IntGrid(
        chosen.bits, chosen.symmetric, clip_ratio=ratio, group_size=chosen.group_size
    )


def _rows_at_a_time(columns: int) -> int:
    return max(1, (1 << 19) // columns)


def is_finite(tensor: torch.Tensor) -> bool:
    """Whether a float tensor holds no Inf or NaN."""
    # In parts, so that the mask stays small.
    parts = tensor.flatten().split(1 << 22)
    return all(bool(torch.isfinite(part).all()) for part in parts)


def check_finite(tensor: torch.Tensor, name: str) -> None:
    """Raise CheckpointError naming the tensor when it holds an Inf or NaN."""
    if not is_finite(tensor):
        raise CheckpointError(f"tensor {name} holds a non-finite value (Inf or NaN)")
