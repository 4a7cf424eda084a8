# SPDX-License-Identifier: Apache-2.0
"""Weight-only linear with order-free sums.

Activations are rounded to fixed point per token so that sums over integer codes are
exact: rows then do not depend on the batch, which no float GEMM library promises. It
has 22 bits (an error of 2^-22 of the token's largest at most, about what float32
holds), for bfloat16 results 16 (2^-16 of the largest: below the rounding of the result
while the largest is less than 128 times the root mean square, as in any token of up to
16384 inputs). Groups are added in float64, in ascending order.
"""

import torch

from ..exact import exact_matmul, fixed_point
from ..grid import TINY
from ..linear_w4a4.reference import check_groups

# Three signed bytes hold 22 bits and a carry, two hold +-HALF_MAX.
FRACTION_BITS = 22
HALF_MAX = 127 * 256


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
    if out_dtype == torch.bfloat16:
        integers, unit = _half(x)
        largest = HALF_MAX
    else:
        integers, unit = fixed_point(x, FRACTION_BITS)
        largest = 1 << FRACTION_BITS
    size = weight.shape[1] // groups
    total = x.new_zeros(x.shape[0], weight.shape[0], dtype=torch.float64)
    for group in range(groups):
        part = slice(group * size, (group + 1) * size)
        sums = exact_matmul(integers[:, part], weight[:, part], largest, weight_max)
        total = total + sums.double() * weight_scale[:, group].double()
    total = total * unit
    if bias is not None:
        total = total + bias.double()
    return total.to(out_dtype)


def _half(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Integers up to HALF_MAX and their unit, as :func:`fixed_point`."""
    x = x.double()
    low, high = torch.aminmax(x, dim=-1, keepdim=True)
    peak = torch.maximum(high, -low)
    unit = torch.where(peak < TINY, 1.0, peak / HALF_MAX)
    return (x * (1.0 / unit)).round_(), unit
