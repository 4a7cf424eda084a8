# SPDX-License-Identifier: Apache-2.0
"""Definition of the integer linear layer (W4A4 and every width up to 8 bits)."""

import torch


def accumulators(
    codes: torch.Tensor,
    zero_point: torch.Tensor,
    weight: torch.Tensor,
    weight_zero_point: torch.Tensor | None,
    groups: int,
) -> torch.Tensor:
    """Integer sums, one per weight group: int32 ``[tokens, groups, n]``.

    ``acc[m, g, n] = sum_k (codes[m, k] - zero_point[m]) * (weight[n, k] - wz[n, g])``
    over the k of group g.

    Args:
        codes: int8 ``[tokens, k]``.
        zero_point: int32 ``[tokens, 1]``.
        weight: int8 codes ``[n, k]``.
        weight_zero_point: int8 or int32 ``[n, groups]``, None when symmetric.
        groups: number of groups along k.

    Raises:
        ValueError: when the groups do not divide k, or a sum does not fit int32.
    """
    check_groups(codes, weight, groups)
    # float64 holds these sums exactly.
    a = (codes.double() - zero_point).unflatten(-1, (groups, -1))
    w = weight.double().unflatten(-1, (groups, -1))
    if weight_zero_point is not None:
        w = w - weight_zero_point.double().unsqueeze(-1)
    sums = torch.einsum("mgk,ngk->mgn", a, w)
    if sums.numel():
        check_int32(int(sums.abs().max()))
    return sums.to(torch.int32)


def check_groups(x: torch.Tensor, weight: torch.Tensor, groups: int) -> None:
    """Raise ValueError unless x and the weight have the same whole groups."""
    if x.shape[-1] != weight.shape[-1] or x.shape[-1] % groups:
        raise ValueError(
            f"activations have {x.shape[-1]} columns, the weight "
            f"{weight.shape[-1]}, in {groups} groups"
        )


def check_int32(magnitude: int) -> None:
    """Raise ValueError when sums of this magnitude do not fit an accumulator."""
    if magnitude > 2**31 - 1:
        raise ValueError(
            f"accumulators of magnitude {magnitude} do not fit int32; use narrower "
            "codes or smaller groups"
        )


def epilogue(
    acc: torch.Tensor,
    scale: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
    out_dtype: torch.dtype,
) -> torch.Tensor:
    """From accumulators to the output; the order of operations is normative.

    float32 throughout, each step rounded: ``acc * weight_scale`` per group, groups
    added in ascending order, then ``* scale``, then ``+ bias``, then the cast.

    Args:
        acc: int32 ``[tokens, groups, n]``.
        scale: float32 ``[tokens, 1]``.
        weight_scale: float32 ``[n, groups]``.
        bias: float ``[n]`` or None.
        out_dtype: dtype of the result ``[tokens, n]``.
    """
    total = acc[:, 0].float() * weight_scale[:, 0]
    for group in range(1, acc.shape[1]):
        total = total + acc[:, group].float() * weight_scale[:, group]
    total = total * scale
    if bias is not None:
        total = total + bias.float()
    return total.to(out_dtype)


def linear_w4a4(
    codes: torch.Tensor,
    scale: torch.Tensor,
    zero_point: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    weight_zero_point: torch.Tensor | None,
    bias: torch.Tensor | None,
    out_dtype: torch.dtype,
) -> torch.Tensor:
    """Quantized activations times quantized weights, ``[tokens, n]``.

    Arguments as in :func:`accumulators` and :func:`epilogue`.
    """
    groups = weight_scale.shape[1]
    acc = accumulators(codes, zero_point, weight, weight_zero_point, groups)
    return epilogue(acc, scale, weight_scale, bias, out_dtype)
