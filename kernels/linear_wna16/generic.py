# SPDX-License-Identifier: Apache-2.0
"""Weight-only linear with order-free sums.

Activations are rounded to 22-bit fixed point per token (by 2^-22 of the largest at
most, about what float32 holds) so that sums over integer codes are exact: rows then do
not depend on the batch, which no float GEMM library promises. Groups are added in
float64, in ascending order.
"""

import torch

from ..exact import exact_matmul, fixed_point
from ..linear_w4a4.reference import check_groups

# Three signed bytes hold 22 bits and a carry, so an integer kernel can match.
FRACTION_BITS = 22


def linear_wna16(
    x: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
    weight_max: int,
    out_dtype: torch.dtype,
) -> torch.Tensor:
    """As the reference, the weight prepared as for ``linear_w4a4``.

    Args:
        weight_max: bound on ``|weight|``.
    """
    groups = weight_scale.shape[1]
    check_groups(x, weight, groups)
    integers, unit = fixed_point(x, FRACTION_BITS)
    size = weight.shape[1] // groups
    total = x.new_zeros(x.shape[0], weight.shape[0], dtype=torch.float64)
    for group in range(groups):
        part = slice(group * size, (group + 1) * size)
        sums = exact_matmul(
            integers[:, part], weight[:, part], 1 << FRACTION_BITS, weight_max
        )
        total = total + sums.double() * weight_scale[:, group].double()
    total = total * unit
    if bias is not None:
        total = total + bias.double()
    return total.to(out_dtype)
