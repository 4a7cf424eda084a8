# SPDX-License-Identifier: Apache-2.0
"""The linears of experts on a GPU: the kernels of one weight, on each expert's tiles.

No value is read on the host: a CUDA graph holds them, wherever tokens go.
"""

import torch

from ..gpu.checks import check_optional, check_out_dtype, check_tensor
from ..gpu.configs import LinearConfig
from ..gpu.tiles import Sent
from ..gpu.weights import (
    BLOCK,
    GpuWeight,
    group_size_of,
    half_block,
    row_bytes,
    stored_bits,
)
from ..linear_w4a4 import triton as integer
from ..linear_wna16 import triton as weight_only


def linear_experts_w4a4(
    codes: torch.Tensor,
    scale: torch.Tensor,
    zero_point: torch.Tensor | None,
    rows: torch.Tensor,
    offsets: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    weight_zero: torch.Tensor | None,
    weight_sum: torch.Tensor,
    activation_bits: int,
    out_dtype: torch.dtype,
    config: LinearConfig | None = None,
) -> torch.Tensor:
    """Quantized tokens times the weights of their experts.

    Args:
        codes: int8 ``[tokens, k]``.
        scale: float32 ``[tokens, 1]`` or ``[tokens, groups]``.
        zero_point: int32 of that shape, None for symmetric activations.
        rows: int64 ``[pairs]``, the token of each pair; values are not checked.
        offsets: int32 ``[experts + 1]``, pairs of expert e are
            ``offsets[e]:offsets[e + 1]``; values are not checked.
        weight, weight_scale, weight_zero, weight_sum: GpuWeights packed with
            ``widen=True``, stacked.
        activation_bits: 2 to 8, of the codes, whose values are not checked.
        out_dtype: bfloat16, float16 or float32, of the result ``[pairs, n]``.
        config: launch configuration; that of the chip's table when None.

    Raises:
        ValueError: for arguments of another form, a K whose sums might not fit, or a
            config that does not fit the codes or the chip.
    """
    check_tensor(codes, "codes", (torch.int8,), (None, None))
    device, (m, k) = codes.device, codes.shape
    kinds = (torch.uint8, torch.int8)
    check_tensor(weight, "weight", kinds, (None, None, None), device)
    bits = 4 if weight.dtype == torch.uint8 else 8
    experts, n, _ = weight.shape
    check_tensor(
        weight, "weight", (weight.dtype,), (experts, n, row_bytes(k, bits)), device
    )
    groups = _check_scale(weight_scale, experts, n, device)
    group_size_of(k, groups)
    form = experts, groups, n
    check_optional(weight_zero, "weight_zero", (torch.int32,), form, device)
    check_tensor(weight_sum, "weight_sum", (torch.int32,), form, device)
    integer.check_tokens(scale, zero_point, m, groups, device)
    sent = _checked(rows, offsets, experts, device)
    check_out_dtype(out_dtype)
    activations = activation_bits, zero_point
    integer.check_sums(k, groups, activations, (bits, weight_zero))
    out = torch.empty((len(rows), n), dtype=out_dtype, device=device)
    if out.numel():
        packed = GpuWeight(weight, weight_scale, weight_zero, weight_sum)
        tokens = scale, zero_point
        integer.launch(codes, activation_bits, tokens, packed, None, out, config, sent)
    return out


def linear_experts_wna16(
    x: torch.Tensor,
    rows: torch.Tensor,
    offsets: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    weight_zero: torch.Tensor | None,
    weight_bits: int,
    out_dtype: torch.dtype,
    config: LinearConfig | None = None,
) -> torch.Tensor:
    """Float tokens times the weights of their experts.

    Args:
        x: bfloat16 or float16 ``[tokens, k]``.
        weight, weight_scale, weight_zero: of GpuWeights packed with ``widen=False``,
            stacked.
        weight_bits: 2, 3, 4, 6 or 8, of the codes.
        rows, offsets, out_dtype, config: as for :func:`linear_experts_w4a4`.

    Raises:
        ValueError: for arguments of another form.
    """
    check_tensor(x, "x", weight_only.HALVES, (None, None))
    device, k = x.device, x.shape[1]
    bits = stored_bits(weight_bits, False)
    held = torch.int8 if bits == 8 else torch.uint8
    check_tensor(weight, "weight", (held,), (None, None, row_bytes(k, bits)), device)
    experts, n, _ = weight.shape
    groups = _check_scale(weight_scale, experts, n, device)
    size = group_size_of(k, groups)
    half_block(size or BLOCK, bits)
    form = experts, groups, n
    check_optional(weight_zero, "weight_zero", (torch.int32,), form, device)
    sent = _checked(rows, offsets, experts, device)
    check_out_dtype(out_dtype)
    out = torch.empty((len(rows), n), dtype=out_dtype, device=device)
    if out.numel():
        weights = (weight, weight_scale, weight_zero)
        weight_only.launch(x, weights, None, bits, size, out, config, sent)
    return out


def _check_scale(
    scale: torch.Tensor, experts: int, n: int, device: torch.device
) -> int:
    """Number of groups."""
    form = (experts, None, n)
    check_tensor(scale, "weight_scale", (torch.float32,), form, device)
    return scale.shape[1]


def _checked(
    rows: torch.Tensor, offsets: torch.Tensor, experts: int, device: torch.device
) -> Sent:
    check_tensor(rows, "rows", (torch.int64,), (None,), device)
    check_tensor(offsets, "offsets", (torch.int32,), (experts + 1,), device)
    return Sent(rows, offsets)
