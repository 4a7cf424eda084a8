# SPDX-License-Identifier: Apache-2.0
"""The linears of experts by the compiled kernels: those that have tokens, in turn."""

import torch

from ..linear_packed.cpu import linear_packed
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
    weight_zero: torch.Tensor | None,
    weight_sum: torch.Tensor,
    n: int,
    weight_bits: int,
    out_dtype: torch.dtype,
    clip_ratio: float = 1.0,
    group_size: int | None = None,
) -> torch.Tensor:
    """As the reference; each pair is bit for bit ``linear_packed`` of its token.

    Args:
        x: ``[tokens, k]``, float32, bfloat16 or float16.
        rows: int64 ``[pairs]``, the token of each pair.
        offsets: int32 ``[experts + 1]``, pairs of expert e are
            ``offsets[e]:offsets[e + 1]``.
        input_scale: float32 ``[k]`` or ``[experts, k]``, or None.
        weight, weight_scale, weight_zero, weight_sum: PackedWeights, stacked.
        order, stride, activation_bits, symmetric, n, weight_bits, out_dtype,
            clip_ratio, group_size: as for ``linear_packed``.

    Raises:
        ValueError: for arguments of another form.
    """

    def linear(expert: int, tokens: torch.Tensor) -> torch.Tensor:
        return linear_packed(
            tokens,
            scale_of(input_scale, expert),
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
            group_size,
        )

    return over_experts(x, rows, offsets, len(weight), n, out_dtype, linear)
