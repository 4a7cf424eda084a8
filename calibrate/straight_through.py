# SPDX-License-Identifier: Apache-2.0
"""Rounding that gradients pass through; the values are those of the serving grid."""

from typing import Any

import torch

from ..kernels.grid import IntGrid


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        return value

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        return grads[0], None


def straight_through(x: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """``value``, with x's gradient: exact, unlike ``x + (value - x).detach()``."""
    if not (torch.is_grad_enabled() and x.requires_grad):
        return value
    out: torch.Tensor = _StraightThrough.apply(x, value.detach())
    return out


def rounded(x: torch.Tensor) -> torch.Tensor:
    """x to the nearest integer, ties to even."""
    return straight_through(x, torch.round(x))


def stored_as(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """x as it is after it was stored in a dtype, in float32."""
    return straight_through(x.float(), x.to(dtype).float())


def on_grid(
    steps: torch.Tensor, grid: IntGrid, scale: torch.Tensor, zero_point: torch.Tensor
) -> torch.Tensor:
    """What codes nearest to ``steps + zero_point`` stand for.

    With ``steps = x * (1 / scale)`` it equals ``decode(grid.encode(x, ...), ...)`` bit
    for bit. Steps beyond the grid get no gradient, scales and zero points do.

    Args:
        steps: float32 ``[..., n]``.
        grid: of the codes.
        scale: float32 ``[..., 1]``.
        zero_point: integers in float32 or int32, ``[..., 1]``.
    """
    codes = (rounded(steps) + zero_point).clamp(grid.code_min, grid.code_max)
    return (codes - zero_point) * scale
