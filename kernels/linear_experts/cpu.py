# SPDX-License-Identifier: Apache-2.0
"""The linears of experts on a CPU: those that have tokens, one after another."""

from collections.abc import Callable

import torch

from ..grid import IntGrid
from ..hadamard_quantize.reference import hadamard_quantize, transform
from ..linear_packed.cpu import linear_packed
from ..linear_w4a4.generic import linear_w4a4
from ..linear_wna16.generic import linear_wna16

# The linear of an expert, of its index and its tokens.
Linear = Callable[[int, torch.Tensor], torch.Tensor]


def linear_experts_packed(
    x: torch.Tensor,
    rows: torch.Tensor,
    offsets: torch.Tensor,
    input_scale: torch.Tensor | None,
    order: int,
    stride: int,
    activation_bits: int,
    symmetric: bool,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    weight_zero: torch.Tensor | None,
    weight_sum: torch.Tensor,
    n: int,
    weight_bits: int,
    out_dtype: torch.dtype,
    clip_ratio: float = 1.0,
) -> torch.Tensor:
    """As the reference, by the compiled kernels: bit for bit ``linear_packed``.

    Args:
        x: ``[tokens, k]``, float32, bfloat16 or float16.
        rows: int64 ``[pairs]``, the token of each pair.
        offsets: int32 ``[experts + 1]``, pairs of expert e are
            ``offsets[e]:offsets[e + 1]``.
        input_scale: float32 ``[k]`` or ``[experts, k]``, or None.
        weight, weight_scale, weight_zero, weight_sum: PackedWeights, stacked.
        order, stride, activation_bits, symmetric, n, weight_bits, out_dtype,
            clip_ratio: as for ``linear_packed``.

    Raises:
        ValueError: for arguments of another form.
    """

    def linear(expert: int, tokens: torch.Tensor) -> torch.Tensor:
        return linear_packed(
            tokens,
            _of(input_scale, expert),
            order,
            stride,
            activation_bits,
            symmetric,
            weight[expert],
            weight_scale[expert],
            None if weight_zero is None else weight_zero[expert],
            weight_sum[expert],
            None,
            n,
            weight_bits,
            out_dtype,
            clip_ratio,
        )

    return _over_experts(x, rows, offsets, len(weight), n, out_dtype, linear)


def linear_experts_generic(
    x: torch.Tensor,
    rows: torch.Tensor,
    offsets: torch.Tensor,
    input_scale: torch.Tensor | None,
    order: int,
    stride: int,
    activation_bits: int,
    symmetric: bool,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    weight_max: int,
    out_dtype: torch.dtype,
    clip_ratio: float = 1.0,
) -> torch.Tensor:
    """The same in plain torch.

    Args:
        weight: of each expert as ``linear_w4a4.generic.prepare`` makes it, stacked:
            ``[experts, n, k]``.
        weight_scale: float32 ``[experts, n, groups]``.
        weight_max: bound on ``|weight|``.
        x, rows, offsets, input_scale, order, stride, activation_bits, symmetric,
            out_dtype, clip_ratio: as for :func:`linear_experts_packed`.

    Raises:
        ValueError: for arguments of another form.
    """

    def linear(expert: int, tokens: torch.Tensor) -> torch.Tensor:
        own, scale = weight[expert], weight_scale[expert]
        scaled_by = _of(input_scale, expert)
        if activation_bits == 16:
            if order > 1 or scaled_by is not None:
                tokens = transform(tokens, scaled_by, order, stride)
            return linear_wna16(tokens, own, scale, None, weight_max, out_dtype)
        grid = IntGrid(activation_bits, symmetric, clip_ratio=clip_ratio)
        quantized = hadamard_quantize(
            tokens, scaled_by, order, stride, activation_bits, symmetric, clip_ratio
        )
        largest = grid.max_difference
        return linear_w4a4(*quantized, own, scale, None, largest, weight_max, out_dtype)

    n = weight.shape[1]
    return _over_experts(x, rows, offsets, len(weight), n, out_dtype, linear)


def _of(input_scale: torch.Tensor | None, expert: int) -> torch.Tensor | None:
    """The scale of one expert's input."""
    if input_scale is None or input_scale.dim() == 1:
        return input_scale
    return input_scale[expert]


def _over_experts(
    x: torch.Tensor,
    rows: torch.Tensor,
    offsets: torch.Tensor,
    experts: int,
    n: int,
    out_dtype: torch.dtype,
    linear: Linear,
) -> torch.Tensor:
    """``[pairs, n]`` from the linear of every expert that has pairs."""
    ends = _checked(x, rows, offsets, experts)
    out = torch.empty((len(rows), n), dtype=out_dtype, device=x.device)
    for expert, (start, end) in enumerate(zip(ends, ends[1:], strict=False)):
        if start < end:
            out[start:end] = linear(expert, x[rows[start:end]])
    return out


def _checked(
    x: torch.Tensor, rows: torch.Tensor, offsets: torch.Tensor, experts: int
) -> list[int]:
    """Offsets as numbers, once they and rows fit."""
    for name, tensor, dtype, shape in (
        ("rows", rows, torch.int64, (len(rows),)),
        ("offsets", offsets, torch.int32, (experts + 1,)),
    ):
        if tensor.dtype != dtype or tensor.shape != shape:
            raise ValueError(
                f"{name} must be {dtype} {list(shape)}, got {tensor.dtype} "
                f"{list(tensor.shape)}"
            )
    ends = offsets.tolist()
    if ends[0] != 0 or ends[-1] != len(rows) or sorted(ends) != ends:
        raise ValueError(
            f"offsets must ascend from 0 to the {len(rows)} pairs, got {ends}"
        )
    if len(rows) and not 0 <= int(rows.min()) <= int(rows.max()) < len(x):
        raise ValueError(f"rows must lie in [0, {len(x)}), got {rows.tolist()}")
    return ends
