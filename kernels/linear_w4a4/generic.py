# SPDX-License-Identifier: Apache-2.0
"""Integer linear by exact float GEMMs: portable, one byte per weight code."""

import torch

from ..exact import exact_matmul
from .reference import check_groups, check_int32, check_scales, epilogue


def prepare(
    weight: torch.Tensor, weight_zero_point: torch.Tensor | None
) -> torch.Tensor:
    """Weight with its zero point subtracted, ``[n, k]``, int8 where that fits.

    Args:
        weight: int8 codes ``[n, k]``.
        weight_zero_point: ``[n, groups]`` or None.
    """
    if weight_zero_point is None:
        return weight
    groups = weight_zero_point.shape[1]
    grouped = weight.to(torch.int16).unflatten(-1, (groups, -1))
    centred = (grouped - weight_zero_point.to(torch.int16).unsqueeze(-1)).flatten(-2)
    low, high = (int(v) for v in torch.aminmax(centred))
    return centred.to(torch.int8) if low >= -128 and high <= 127 else centred


def accumulators(
    codes: torch.Tensor,
    zero_point: torch.Tensor,
    weight: torch.Tensor,
    groups: int,
    code_max: int,
    weight_max: int,
) -> torch.Tensor:
    """int32 ``[tokens, groups, n]``, bit-equal to the reference's.

    Args:
        codes: int8 ``[tokens, k]``.
        zero_point: int32 ``[tokens, groups]``, or ``[tokens, 1]`` for all groups.
        weight: from :func:`prepare`.
        groups: number of groups along k.
        code_max: bound on ``|codes - zero_point|``.
        weight_max: bound on ``|weight|``.

    Raises:
        ValueError: when the groups do not divide k, zero_point has another number of
            them, or sums might not fit int32.
    """
    check_groups(codes, weight, groups)
    check_scales(zero_point, "zero_point", groups)
    check_int32(code_max * weight_max * (weight.shape[1] // groups))
    a = codes.to(torch.int16).unflatten(-1, (groups, -1))
    a = a - zero_point.to(torch.int16).unsqueeze(-1)
    w = weight.unflatten(-1, (groups, -1))
    parts = [
        exact_matmul(a[:, i], w[:, i], code_max, weight_max) for i in range(groups)
    ]
    return torch.stack(parts, dim=1).to(torch.int32)


def linear_w4a4(
    codes: torch.Tensor,
    scale: torch.Tensor,
    zero_point: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
    code_max: int,
    weight_max: int,
    out_dtype: torch.dtype,
) -> torch.Tensor:
    """As the reference, with the weight and bounds of :func:`accumulators`."""
    groups = weight_scale.shape[1]
    acc = accumulators(codes, zero_point, weight, groups, code_max, weight_max)
    return epilogue(acc, scale, weight_scale, bias, out_dtype)
