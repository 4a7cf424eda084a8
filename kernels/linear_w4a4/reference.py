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

    ``acc[m, g, n] = sum_k (codes[m, k] - z[m, g]) * (weight[n, k] - wz[n, g])`` over
    the k of group g.

    Args:
        codes: int8 ``[tokens, k]``.
        zero_point: int32 z ``[tokens, groups]``, or ``[tokens, 1]`` for all groups.
        weight: int8 codes ``[n, k]``.
        weight_zero_point: int8 or int32 ``[n, groups]``, None when symmetric.
        groups: number of groups along k.

    Raises:
        ValueError: when the groups do not divide k, zero_point has another number of
            them, or a sum does not fit int32.
    """
    check_groups(codes, weight, groups)
    check_scales(zero_point, "zero_point", groups)
    # float64 holds these sums exactly.
    a = codes.double().unflatten(-1, (groups, -1)) - zero_point.unsqueeze(-1)
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


def check_scales(values: torch.Tensor, name: str, groups: int) -> None:
    """Raise ValueError unless tokens have one value, or one for each group."""
    if values.shape[-1] not in (1, groups):
        more = f" or {groups}, the groups of the weight" if groups > 1 else ""
        raise ValueError(f"{name} must have 1 column{more}, got {list(values.shape)}")


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

    float32 throughout, each step rounded. With one scale for a token: ``acc *
    weight_scale`` per group, groups added in ascending order, then ``* scale``. With
    one for each group: ``acc * weight_scale * scale`` per group, from left to right,
    groups added in ascending order. Then ``+ bias``, then the cast. With one group
    both are the same.

    Args:
        acc: int32 ``[tokens, groups, n]``.
        scale: float32 ``[tokens, 1]`` or ``[tokens, groups]``.
        weight_scale: float32 ``[n, groups]``.
        bias: float ``[n]`` or None.
        out_dtype: dtype of the result ``[tokens, n]``.

    Raises:
        ValueError: when scale has another number of groups.
    """
    groups = acc.shape[1]
    check_scales(scale, "scale", groups)
    per_token = scale.shape[1] == 1

    def part(group: int) -> torch.Tensor:
        scaled = acc[:, group].float() * weight_scale[:, group]
        return scaled if per_token else scaled * scale[:, group : group + 1]

    total = part(0)
    for group in range(1, groups):
        total = total + part(group)
    if per_token:
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
