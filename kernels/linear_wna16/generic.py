# SPDX-License-Identifier: Apache-2.0
"""Weight-only linear with order-free sums.

Activations are rounded to 28-bit fixed point per token (finer than float32 sums of
the same length) so that the float64 GEMM on integer codes is exact: rows then do
not depend on the batch, which no float GEMM library promises.
"""

import torch

from ..exact import exact_matmul, fixed_point
from ..linear_w4a4.reference import check_groups

FRACTION_BITS = 28


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
