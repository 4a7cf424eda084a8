# SPDX-License-Identifier: Apache-2.0
"""The linears of experts in plain torch: those that have tokens, in turn."""

import torch

from ..grid import IntGrid
from ..hadamard_quantize.reference import hadamard_quantize, transform
from ..linear_w4a4.generic import linear_w4a4
from ..linear_wna16.generic import linear_wna16
from .loop import over_experts, scale_of


def linear_experts(
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
    group_size: int | None = None,
) -> torch.Tensor:
    """As the reference; each pair is bit for bit the generic linear of its token.

    Args:
        weight: of each expert as ``linear_w4a4.generic.prepare`` makes it, stacked:
            ``[experts, n, k]``.
        weight_scale: float32 ``[experts, n, groups]``.
        weight_max: bound on ``|weight|``.
        x, rows, offsets, input_scale, order, stride, activation_bits, symmetric,
            out_dtype, clip_ratio, group_size: as for ``cpu.linear_experts``.

    Raises:
        ValueError: for arguments of another form.
    """

    def linear(expert: int, tokens: torch.Tensor) -> torch.Tensor:
        own, scale = weight[expert], weight_scale[expert]
        scaled_by = scale_of(input_scale, expert)
        if activation_bits == 16:
            if order > 1 or scaled_by is not None:
                tokens = transform(tokens, scaled_by, order, stride)
            return linear_wna16(tokens, own, scale, None, weight_max, out_dtype)
        largest = IntGrid(activation_bits, symmetric).max_difference
        form = order, stride, activation_bits, symmetric, clip_ratio, group_size
        quantized = hadamard_quantize(tokens, scaled_by, *form)
        return linear_w4a4(*quantized, own, scale, None, largest, weight_max, out_dtype)

    n = weight.shape[1]
    return over_experts(x, rows, offsets, len(weight), n, out_dtype, linear)
