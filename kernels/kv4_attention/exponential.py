# SPDX-License-Identifier: Apache-2.0
"""Powers of two and tanh in float32, the same to the bit wherever they are computed.

Libraries differ in the last bits of exp and tanh, so these are built from IEEE
operations alone: each multiplication, addition and division rounds by itself (no
fused multiply-add) and a C++ kernel repeats them in the same order. With
``n = round(x)`` and ``r = x - n`` (exact, in [-1/2, 1/2]),

    2^x = 2^n * (1 + e(r)),    e(r) = r * (c1 + r * (c2 + r * (c3 + r * (c4 + r * c5))))

where ``c1`` is the float32 nearest to ln 2, so that ``e`` stays relatively accurate
near 0, and the others minimise the largest relative error of ``1 + e``: 1.1e-7
before rounding.
"""

import torch

# c5 to c1, each a float32.
COEFFICIENTS = (0.00133006054, 0.00966969132, 0.0555055849, 0.240222827, 0.693147182)
# 2^-127 has no normal number: the exponent bits of n = -127 are those of 0.
ZERO_EXPONENT = -127.0
# From here on tanh is 1 in float32.
TANH_LIMIT = 10.0
TWO_LOG2_E = 2.88539004
# Adding it leaves no bits below 1: round to nearest, ties to even, for |x| < 2^22.
_ROUND = 12582912.0


def exp2(x: torch.Tensor) -> torch.Tensor:
    """``2^x`` of float32 ``x <= 0``, within 3 units in the last place.

    Exactly 1 at 0, and 0 where x rounds to ZERO_EXPONENT or less.
    """
    excess, power = _parts(x.clamp(min=ZERO_EXPONENT))
    return excess.add_(1.0).mul_(power)


def tanh(x: torch.Tensor) -> torch.Tensor:
    """``tanh(x)`` of float32 x, within 12 units in the last place.

    ``f / (f + 2)`` with ``f = e^(2|x|) - 1``: nothing cancels near 0, where n is 0 and
    f is ``e(r)`` itself.
    """
    excess, power = _parts(x.abs().clamp_(max=TANH_LIMIT).mul_(TWO_LOG2_E))
    f = excess.mul_(power).add_(power - 1.0)
    return torch.copysign(f / (f + 2.0), x)


def _parts(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """``e(r)`` and ``2^n`` of x in [ZERO_EXPONENT, 127]."""
    n = (x + _ROUND).sub_(_ROUND)
    r = x - n
    excess = r * COEFFICIENTS[0]
    for coefficient in COEFFICIENTS[1:]:
        excess.add_(coefficient).mul_(r)
    power = n.to(torch.int32).add_(127).bitwise_left_shift_(23).view(torch.float32)
    return excess, power
