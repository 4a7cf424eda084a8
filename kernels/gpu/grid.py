# SPDX-License-Identifier: Apache-2.0
"""``IntGrid`` of ``kernels/grid.py`` inside of Triton kernels.

Every step is an IEEE operation of its own there, so kernels that call this are launched
with ``enable_fp_fusion=False``.
"""

import triton
import triton.language as tl

_TINY: tl.constexpr = tl.constexpr(2.0**-100)
# Adding 1.5 * 2^23 leaves no fraction bits: rounds to nearest, ties to even.
_ROUND: tl.constexpr = tl.constexpr(12582912.0)


@triton.jit
def round_even(values):
    """Nearest integers of float32 values of magnitude below 2^22, ties to even."""
    return (values + _ROUND) - _ROUND


@triton.jit
def grid_parameters(
    low,
    high,
    broken,
    clip_ratio,
    CODE_MIN: tl.constexpr,
    CODE_MAX: tl.constexpr,
    SYMMETRIC: tl.constexpr,
):
    """Scale, its inverse and zero point from the range of rows.

    Args:
        low: float32, least value of each row.
        high: float32, largest.
        broken: whether the row has an Inf or NaN.
        clip_ratio: float32, fraction of the range that is kept.
    """
    peak = tl.maximum(high, -low)
    if SYMMETRIC:
        scale = tl.div_rn(peak * clip_ratio, CODE_MAX * 1.0)
    else:
        spread = tl.maximum(high, 0.0) * 0.5 - tl.minimum(low, 0.0) * 0.5
        scale = tl.div_rn(spread * clip_ratio, (CODE_MAX - CODE_MIN) * 0.5)
    scale = tl.where(low == high, peak, scale)
    scale = tl.where(peak < _TINY, 1.0, scale)
    scale = tl.where(broken, float("nan"), scale)
    inverse = tl.div_rn(1.0, scale)
    if SYMMETRIC:
        zero = tl.zeros_like(peak).to(tl.int32)
    else:
        steps = round_even(tl.minimum(low, 0.0) * clip_ratio * inverse)
        zero = CODE_MIN - tl.where(broken, 0.0, steps).to(tl.int32)
    return scale, inverse, zero


@triton.jit
def grid_encode(
    values, inverse, zero, broken, CODE_MIN: tl.constexpr, CODE_MAX: tl.constexpr
):
    """int8 codes; arguments of one shape or broadcast."""
    steps = round_even(values * inverse) + zero.to(tl.float32)
    steps = tl.minimum(tl.maximum(steps, CODE_MIN), CODE_MAX)
    # The integer is in the low bits of the sum, where no slow conversion is needed.
    steps = tl.where(broken, 0.0, steps) + _ROUND
    return steps.to(tl.int32, bitcast=True).to(tl.int8)
