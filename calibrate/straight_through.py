# SPDX-License-Identifier: Apache-2.0
"""The serving grids and rounding, with a gradient.

Forward is the grid itself, bit for bit. Of a range that follows the data, written as
``q = x + scale * r``, the error r of a code in units of the scale is a number that
jumps; backward takes it as constant and all else as it is::

    dq = dx + r * dscale

The first term is the straight-through estimator (Bengio et al., 2013). The second is
what makes transforms learnable: a dynamic scale follows the largest element of its
row, so the gradient tells how much a smaller range would be worth (for a learned scale
this is LSQ, Esser et al., 2020). With the first term alone, rotations that change no
result in exact arithmetic would get hardly any gradient. An element beyond the range,
more than a step away from its code, moves with the scale only.

A scale is the range times a clip ratio, which gets the scale's gradient. There every
element beyond the range counts as such, however near: its error grows as the ratio
falls, that of an element within shrinks.
"""

from dataclasses import replace
from typing import Any

import torch
from torch.autograd import Function

from ..kernels.grid import (
    KV_LEVELS,
    IntGrid,
    decode,
    kv_decode,
    kv_encode,
    kv_parameters,
)


def fake_quantize(
    x: torch.Tensor, grid: IntGrid, clip_ratio: torch.Tensor | float | None = None
) -> torch.Tensor:
    """x on a grid, every input or group of it with its own range; float32.

    Args:
        x: ``[..., n]``, float32.
        grid: the codes, and the groups if any.
        clip_ratio: fraction of the range that is kept, a float or ``[..., 1]``, of
            groups ``[..., groups, 1]``; None takes the grid's. One number, ``[]``, may
            ask for a gradient, where x does or not.
    """
    if grid.group_size is not None:
        whole = replace(grid, group_size=None)
        return fake_quantize(grid.rows(x), whole, clip_ratio).flatten(-2)
    learned = isinstance(clip_ratio, torch.Tensor) and clip_ratio.requires_grad
    if not (torch.is_grad_enabled() and (x.requires_grad or learned)):
        scale, zero_point = grid.parameters(x, clip_ratio)
        return decode(grid.encode(x, scale, zero_point), scale, zero_point)
    return _Integer.apply(x, grid, clip_ratio)


def through_cache(x: torch.Tensor) -> torch.Tensor:
    """x ``[..., head_dim]`` quantized to the 4-bit cache and read back."""
    if torch.is_grad_enabled() and x.requires_grad:
        return _Cache.apply(x)
    scale, zero = kv_parameters(x)
    return kv_decode(kv_encode(x, scale, zero), scale, zero).to(x.dtype)


class _Integer(Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        grid: IntGrid,
        clip_ratio: torch.Tensor | float | None,
    ) -> torch.Tensor:
        clip_ratio = grid.clip_ratio if clip_ratio is None else clip_ratio
        scale, zero_point = grid.parameters(x, clip_ratio)
        quantized = decode(grid.encode(x, scale, zero_point), scale, zero_point)
        steps = grid.code_max - grid.code_min
        ctx.symmetric, ctx.step = grid.symmetric, clip_ratio / steps
        if grid.symmetric:
            ctx.step = clip_ratio / grid.code_max
        ctx.of_ratio = None
        if ctx.needs_input_grad[2]:
            error = quantized - x
            inside = error.abs() <= scale / 2
            ctx.of_ratio = torch.where(inside, error, quantized) / clip_ratio
        _save(ctx, x, quantized, scale)
        return quantized

    @staticmethod
    def backward(
        ctx: Any, grad: torch.Tensor
    ) -> tuple[torch.Tensor, None, torch.Tensor | None]:
        of_ratio = None if ctx.of_ratio is None else (grad * ctx.of_ratio).sum()
        result, of_scale, high, low, at_high, at_low = _start(ctx, grad)
        of_scale = of_scale * ctx.step
        if ctx.symmetric:
            above = high > -low
            result.scatter_add_(-1, at_high, of_scale * above)
            result.scatter_add_(-1, at_low, -of_scale * ~above)
        else:
            # A range always includes zero.
            result.scatter_add_(-1, at_high, of_scale * (high > 0))
            result.scatter_add_(-1, at_low, -of_scale * (low < 0))
        return result, None, of_ratio


class _Cache(Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        scale, zero = kv_parameters(x)
        quantized = kv_decode(kv_encode(x, scale, zero), scale, zero).to(x.dtype)
        _save(ctx, x, quantized, scale.float())
        return quantized

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        result, of_scale, _, _, at_high, at_low = _start(ctx, grad)
        # Of the range; the floor under it, max|x| / 1024, is for rows with an offset
        # of a hundred ranges, where it keeps the zero representable.
        of_scale = of_scale / KV_LEVELS
        result.scatter_add_(-1, at_high, of_scale)
        result.scatter_add_(-1, at_low, -of_scale)
        return result


def _save(
    ctx: Any, x: torch.Tensor, quantized: torch.Tensor, scale: torch.Tensor
) -> None:
    high, at_high = x.max(dim=-1, keepdim=True)
    low, at_low = x.min(dim=-1, keepdim=True)
    error = (quantized - x) / scale
    clipped = error.abs() > 1
    clips = bool(clipped.any())
    if clips:
        error = torch.where(clipped, quantized / scale, error)
    kept = clipped if clips else None
    ctx.save_for_backward(error, kept, high, low, at_high, at_low)


def _start(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Gradient without that of the scale, that of the scale, and the range."""
    error, clipped, *spread = ctx.saved_tensors
    of_scale = (grad * error).sum(dim=-1, keepdim=True)
    result = grad.clone() if clipped is None else grad.masked_fill(clipped, 0.0)
    return result, of_scale, *spread


class _StraightThrough(Function):
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
