# SPDX-License-Identifier: Apache-2.0
"""What the linears of experts compute, one pair of token and expert at a time."""

import torch

from ..grid import IntGrid
from ..hadamard_quantize.reference import hadamard_quantize, transform
from ..linear_w4a4.reference import linear_w4a4
from ..linear_wna16.reference import linear_wna16


def linear_experts(
    x: torch.Tensor,
    rows: torch.Tensor,
    offsets: torch.Tensor,
    input_scale: torch.Tensor | None,
    order: int,
    stride: int,
    activations: IntGrid | None,
    codes: torch.Tensor,
    scale: torch.Tensor,
    zero_point: torch.Tensor | None,
    out_dtype: torch.dtype,
) -> torch.Tensor:
    """Transform and quantize tokens, and multiply each with its expert's weight.

    Args:
        x: float ``[tokens, k]``.
        rows: int64 ``[pairs]``, the token of each pair.
        offsets: int32 ``[experts + 1]``, pairs of expert e are
            ``offsets[e]:offsets[e + 1]``.
        input_scale: float32 ``[k]``, or ``[experts, k]`` where each expert has its
            own; None for none.
        order: Hadamard order of a block, 1 for no transform.
        stride: elements between neighbours of one transform.
        activations: grid of the input, None to leave it unquantized.
        codes: int8 ``[experts, n, k]``.
        scale: float32 ``[experts, n, groups]``.
        zero_point: int32 of that shape, None where weights are symmetric.
        out_dtype: of the result ``[pairs, n]``.
    """
    out = x.new_empty(len(rows), codes.shape[1], dtype=out_dtype)
    for expert in range(len(codes)):
        own = None if input_scale is None else input_scale.expand(len(codes), -1)
        scaled_by = None if own is None else own[expert]
        zero = None if zero_point is None else zero_point[expert]
        for pair in range(int(offsets[expert]), int(offsets[expert + 1])):
            token = x[rows[pair]].unsqueeze(0)
            if activations is None:
                turned = transform(token, scaled_by, order, stride)
                out[pair] = linear_wna16(
                    turned, codes[expert], scale[expert], zero, None, out_dtype
                )[0]
                continue
            quantized = hadamard_quantize(
                token,
                scaled_by,
                order,
                stride,
                activations.bits,
                activations.symmetric,
                activations.clip_ratio,
                activations.group_size,
            )
            out[pair] = linear_w4a4(
                *quantized, codes[expert], scale[expert], zero, None, out_dtype
            )[0]
    return out
