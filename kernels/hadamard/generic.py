# SPDX-License-Identifier: Apache-2.0
"""Hadamard transform in plain torch whose result no order of additions can change.

Definition shared by every backend that promises equal codes: each block of ``order``
elements is rounded to FRACTION_BITS-bit fixed point (relative to its largest
magnitude), the transform of those integers is exact, and the sum is multiplied by
``unit / sqrt(order)`` in float64 and rounded once to float32. The rounding moves an
element by at most 2^-31 of its block's largest. A row never depends on the batch,
the thread count or the library that multiplies.
"""

import functools

import torch

from ..exact import fixed_point
from .matrices import factor, matrix
from .reference import check_blocks

FRACTION_BITS = 30


def hadamard(
    x: torch.Tensor, order: int, stride: int = 1, *, transpose: bool = False
) -> torch.Tensor:
    """As the reference, returned in float32; an Inf or NaN spreads over its block."""
    check_blocks(x.shape[-1], order, stride)
    blocks = x.unflatten(-1, (-1, order, stride)).transpose(-1, -2)
    integers, unit = fixed_point(blocks, FRACTION_BITS)
    left, right = kronecker(order, transpose, x.device)
    sums = integers.reshape(-1, left.shape[0], right.shape[0]) @ right
    if left.shape[0] > 1:
        sums = left @ sums
    y = sums.view(blocks.shape) * (unit * order**-0.5)
    return y.transpose(-1, -2).reshape(x.shape).float()


@functools.lru_cache(maxsize=64)
def kronecker(
    order: int, transpose: bool, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Factors with ``H = left (x) right^T``, of about equal size, float64."""
    core, power = factor(order)
    small = 1
    while power > 1 and core * power > 2 * small and core * power > 64:
        power, small = power // 2, small * 2
    left, right = matrix(core * power), matrix(small)
    if small == 1:
        left, right = right, left
    if transpose:
        left, right = left.t(), right.t()
    return left.to(device, torch.float64), right.t().to(device, torch.float64)
