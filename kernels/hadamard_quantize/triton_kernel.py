# SPDX-License-Identifier: Apache-2.0
"""The kernels of ``hadamard_quantize/triton.py``; a program is a token, or a part."""

import triton
import triton.language as tl

from ..gpu.grid import grid_encode, grid_parameters
from ..hadamard.triton_kernel import add_product


@triton.jit
def read(
    x_ptr,
    weight_ptr,
    input_scale_ptr,
    at,
    mask,
    N,
    factor,
    PROLOGUE: tl.constexpr,
    SCALED: tl.constexpr,
):
    """Elements of a row in float32, normalised (1) or gated (2), and scaled."""
    x = tl.load(x_ptr + at, mask=mask, other=0.0).to(tl.float32)
    if PROLOGUE == 1:
        x = x * factor * tl.load(weight_ptr + at, mask=mask, other=0.0).to(tl.float32)
    if PROLOGUE == 2:
        up = tl.load(x_ptr + N + at, mask=mask, other=0.0).to(tl.float32)
        x = x / (1.0 + tl.exp(-x)) * up
    if SCALED:
        x = x * tl.load(input_scale_ptr + at, mask=mask, other=0.0)
    return x


@triton.jit
def rms_factor(row_ptr, N, epsilon, BLOCK: tl.constexpr):
    """What an RMSNorm multiplies a row of N elements by."""
    squares = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, N, BLOCK):
        at = start + tl.arange(0, BLOCK)
        x = tl.load(row_ptr + at, mask=at < N, other=0.0).to(tl.float32)
        squares += x * x
    return tl.rsqrt(tl.sum(squares, axis=0) / N + epsilon)


@triton.jit
def tile_kernel(
    x_ptr,
    weight_ptr,
    input_scale_ptr,
    left_ptr,
    right_ptr,
    out_ptr,
    scale_ptr,
    zero_ptr,
    x_stride,
    epsilon,
    clip_ratio,
    before,
    after,
    N: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    PADDED_ROWS: tl.constexpr,
    PADDED_COLUMNS: tl.constexpr,
    LEFT: tl.constexpr,
    RIGHT: tl.constexpr,
    PARTS: tl.constexpr,
    PROLOGUE: tl.constexpr,
    SCALED: tl.constexpr,
    QUANTIZE: tl.constexpr,
    CODE_MIN: tl.constexpr,
    CODE_MAX: tl.constexpr,
    SYMMETRIC: tl.constexpr,
    DOT: tl.constexpr,
):
    """A token: read, transform ``L X R``, and write codes (values unless QUANTIZE)."""
    token = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, PADDED_ROWS)[:, None]
    j = tl.arange(0, PADDED_COLUMNS)[None, :]
    mask = (i < ROWS) & (j < COLUMNS)
    at = i * COLUMNS + j
    row_ptr = x_ptr + token * x_stride
    factor = 1.0
    if PROLOGUE == 1:
        x = tl.load(row_ptr + at, mask=mask, other=0.0).to(tl.float32)
        factor = tl.rsqrt(tl.sum(tl.sum(x * x, axis=1), axis=0) / N + epsilon)
    x = read(
        row_ptr, weight_ptr, input_scale_ptr, at, mask, N, factor, PROLOGUE, SCALED
    )
    x = x * before
    if RIGHT:
        k = tl.arange(0, PADDED_COLUMNS)[:, None]
        table = tl.load(right_ptr + k * PADDED_COLUMNS + j)
        x = add_product(tl.zeros_like(x), x, table, 0, PARTS, DOT)
    if LEFT:
        k = tl.arange(0, PADDED_ROWS)[None, :]
        table = tl.load(left_ptr + i * PADDED_ROWS + k)
        parts: tl.constexpr = 2 if RIGHT else PARTS
        x = add_product(tl.zeros_like(x), table, x, 1, parts, DOT)
    x = x * after
    if QUANTIZE:
        infinity = float("inf")
        low = tl.min(tl.min(tl.where(mask, x, infinity), axis=1), axis=0)
        high = tl.max(tl.max(tl.where(mask, x, -infinity), axis=1), axis=0)
        odd = tl.where(mask & ~(tl.abs(x) < infinity), 1, 0)
        broken = tl.max(tl.max(odd, axis=1), axis=0) > 0
        scale, inverse, zero = grid_parameters(
            low, high, broken, clip_ratio, CODE_MIN, CODE_MAX, SYMMETRIC
        )
        tl.store(scale_ptr + token, scale)
        tl.store(zero_ptr + token, zero)
        x = grid_encode(x, inverse, zero, broken, CODE_MIN, CODE_MAX)
    tl.store(out_ptr + token * N + at, x, mask=mask)


@triton.jit
def groups_kernel(
    x_ptr,
    weight_ptr,
    input_scale_ptr,
    out_ptr,
    scale_ptr,
    zero_ptr,
    x_stride,
    epsilon,
    clip_ratio,
    N,
    PROLOGUE: tl.constexpr,
    SCALED: tl.constexpr,
    CODE_MIN: tl.constexpr,
    CODE_MAX: tl.constexpr,
    SYMMETRIC: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """BLOCK elements of a token, every GROUP of them on a grid of its own."""
    token = tl.program_id(0).to(tl.int64)
    row_ptr = x_ptr + token * x_stride
    factor = 1.0
    if PROLOGUE == 1:
        factor = rms_factor(row_ptr, N, epsilon, BLOCK)
    group = tl.program_id(1) * (BLOCK // GROUP) + tl.arange(0, BLOCK // GROUP)
    at = group[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    mask = at < N
    x = read(
        row_ptr, weight_ptr, input_scale_ptr, at, mask, N, factor, PROLOGUE, SCALED
    )
    odd = tl.where(tl.abs(x) < float("inf"), 0, 1)
    broken = tl.max(odd, axis=1) > 0
    scale, inverse, zero = grid_parameters(
        tl.min(x, axis=1),
        tl.max(x, axis=1),
        broken,
        clip_ratio,
        CODE_MIN,
        CODE_MAX,
        SYMMETRIC,
    )
    of_group = token * (N // GROUP) + group
    tl.store(scale_ptr + of_group, scale, mask=group < N // GROUP)
    tl.store(zero_ptr + of_group, zero, mask=group < N // GROUP)
    codes = grid_encode(
        x, inverse[:, None], zero[:, None], broken[:, None], CODE_MIN, CODE_MAX
    )
    tl.store(out_ptr + token * N + at, codes, mask=mask)


@triton.jit
def row_kernel(
    x_ptr,
    weight_ptr,
    input_scale_ptr,
    out_ptr,
    scale_ptr,
    zero_ptr,
    x_stride,
    epsilon,
    clip_ratio,
    N,
    PROLOGUE: tl.constexpr,
    SCALED: tl.constexpr,
    QUANTIZE: tl.constexpr,
    CODE_MIN: tl.constexpr,
    CODE_MAX: tl.constexpr,
    SYMMETRIC: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """As ``tile_kernel`` without a transform, for rows of any size."""
    token = tl.program_id(0).to(tl.int64)
    row_ptr = x_ptr + token * x_stride
    lanes = tl.arange(0, BLOCK)
    factor = 1.0
    if PROLOGUE == 1:
        factor = rms_factor(row_ptr, N, epsilon, BLOCK)
    if not QUANTIZE:
        for start in range(0, N, BLOCK):
            at = start + lanes
            x = read(
                row_ptr,
                weight_ptr,
                input_scale_ptr,
                at,
                at < N,
                N,
                factor,
                PROLOGUE,
                SCALED,
            )
            tl.store(out_ptr + token * N + at, x, mask=at < N)
    else:
        infinity = float("inf")
        lows = tl.full((BLOCK,), infinity, tl.float32)
        highs = tl.full((BLOCK,), -infinity, tl.float32)
        odd = tl.zeros((BLOCK,), tl.int32)
        for start in range(0, N, BLOCK):
            at = start + lanes
            x = read(
                row_ptr,
                weight_ptr,
                input_scale_ptr,
                at,
                at < N,
                N,
                factor,
                PROLOGUE,
                SCALED,
            )
            lows = tl.minimum(lows, tl.where(at < N, x, infinity))
            highs = tl.maximum(highs, tl.where(at < N, x, -infinity))
            odd = odd | tl.where(tl.abs(x) < infinity, 0, 1)
        broken = tl.max(odd, axis=0) > 0
        low, high = tl.min(lows, axis=0), tl.max(highs, axis=0)
        scale, inverse, zero = grid_parameters(
            low, high, broken, clip_ratio, CODE_MIN, CODE_MAX, SYMMETRIC
        )
        tl.store(scale_ptr + token, scale)
        tl.store(zero_ptr + token, zero)
        for start in range(0, N, BLOCK):
            at = start + lanes
            x = read(
                row_ptr,
                weight_ptr,
                input_scale_ptr,
                at,
                at < N,
                N,
                factor,
                PROLOGUE,
                SCALED,
            )
            codes = grid_encode(x, inverse, zero, broken, CODE_MIN, CODE_MAX)
            tl.store(out_ptr + token * N + at, codes, mask=at < N)
