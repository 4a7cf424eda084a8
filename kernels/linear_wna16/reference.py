# SPDX-License-Identifier: Apache-2.0
"""Definition of the weight-only linear layer (W4A16, W3A16, W2A16)."""

import torch

from ..linear_w4a4.reference import check_groups


def linear_wna16(
    x: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    weight_zero_point: torch.Tensor | None,
    bias: torch.Tensor | None,
    out_dtype: torch.dtype,
) -> torch.Tensor:
    """``x @ dequantized(weight).T + bias``, summed in float64.

    Args:
        x: float ``[tokens, k]``, already transformed where the layer is.
        weight: int8 codes ``[n, k]``.
        weight_scale: float32 ``[n, groups]``.
        weight_zero_point: integer ``[n, groups]`` or None.
        bias: float ``[n]`` or None.
        out_dtype: dtype of the result ``[tokens, n]``.

    Raises:
        ValueError: when the groups do not divide k.
    """
    groups = weight_scale.shape[1]
    check_groups(x, weight, groups)
    w = weight.double().unflatten(-1, (groups, -1))
    if weight_zero_point is not None:
        w = w - weight_zero_point.double().unsqueeze(-1)
    w = (w * weight_scale.double().unsqueeze(-1)).flatten(-2)
    y = x.double() @ w.t()
    if bias is not None:
        y = y + bias.double()
    return y.to(out_dtype)
