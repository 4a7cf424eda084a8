# SPDX-License-Identifier: Apache-2.0
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
"""Transform and quantization of a row that no tile holds, in one kernel.

A block of the transform is ``X [LEFT, INNER]`` (see ``hadamard/triton.py``), a row the
columns of all its blocks side by side: ``[LEFT, COLUMNS]``. It is taken in tiles of
BLOCK_M by BLOCK_C outputs, each the sum over LEFT of products of the left table with
parts of X, multiplied by the right table.
"""

import triton
import triton.language as tl

from ..gpu.grid import grid_encode, grid_parameters
from ..hadamard.triton_kernel import add_product
from .triton_kernel import read, rms_factor

# Of the left table's sides.
TABLE_BLOCK = tl.constexpr(64)


@triton.jit
def _places(
    tile,
    N: tl.constexpr,
    LEFT: tl.constexpr,
    INNER: tl.constexpr,
    RIGHT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Where the values of a tile are in the row, and which of them are."""
    first = tile // tl.cdiv(LEFT, BLOCK_M) * BLOCK_C
    i = tile % tl.cdiv(LEFT, BLOCK_M) * BLOCK_M
    if RIGHT > 1:
        row = tl.arange(0, BLOCK_M * BLOCK_C // RIGHT)[:, None]
        i += row % BLOCK_M
        within = row // BLOCK_M * RIGHT + tl.arange(0, RIGHT)[None, :]
    else:
        i += tl.arange(0, BLOCK_M)[None, :]
        within = tl.arange(0, BLOCK_C)[:, None]
    column = first + within
    at = column // INNER * (LEFT * INNER) + i * INNER + column % INNER
    return at, (i < LEFT) & (column < N // LEFT)


@triton.jit
def _range(y, mask, lows, highs, odd):
    """The range so far with a tile's values, and whether any is not finite."""
    lows = tl.minimum(lows, tl.where(mask, y, float("inf")))
    highs = tl.maximum(highs, tl.where(mask, y, -float("inf")))
    return lows, highs, odd | tl.where(mask & ~(tl.abs(y) < float("inf")), 1, 0)


@triton.jit
def _tile(
    row_ptr,
    weight_ptr,
    input_scale_ptr,
    left_ptr,
    right,
    factor,
    before,
    after,
    tile,
    N: tl.constexpr,
    LEFT: tl.constexpr,
    INNER: tl.constexpr,
    RIGHT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    PARTS: tl.constexpr,
    PROLOGUE: tl.constexpr,
    SCALED: tl.constexpr,
    DOT: tl.constexpr,
):
    """Values of a tile, where they are in the row, and which of them are."""
    COLUMNS: tl.constexpr = N // LEFT
    SIZE: tl.constexpr = (LEFT + TABLE_BLOCK - 1) // TABLE_BLOCK * TABLE_BLOCK
    first = tile // tl.cdiv(LEFT, BLOCK_M) * BLOCK_C
    top = tile % tl.cdiv(LEFT, BLOCK_M) * BLOCK_M
    i = top + tl.arange(0, BLOCK_M)[None, :]
    column = first + tl.arange(0, BLOCK_C)[:, None]
    base = column // INNER * (LEFT * INNER) + column % INNER
    y = tl.zeros((BLOCK_C, BLOCK_M), tl.float32)
    # Transposed: the larger side of a tile is the one that warps share.
    for start in range(0, LEFT, BLOCK_M):
        k = start + tl.arange(0, BLOCK_M)
        table = tl.load(left_ptr + k[:, None] * SIZE + i)
        at = base + k[None, :] * INNER
        mask = (column < COLUMNS) & (k < LEFT)[None, :]
        x = read(
            row_ptr, weight_ptr, input_scale_ptr, at, mask, N, factor, PROLOGUE, SCALED
        )
        y = add_product(y, x * before, table, 0, PARTS, DOT)
    if RIGHT > 1:
        y = tl.reshape(y, (BLOCK_C // RIGHT, RIGHT, BLOCK_M))
        y = tl.reshape(tl.permute(y, (0, 2, 1)), (BLOCK_C // RIGHT * BLOCK_M, RIGHT))
        y = add_product(tl.zeros_like(y), y, right, 0, 2, DOT)
    at, mask = _places(tile, N, LEFT, INNER, RIGHT, BLOCK_M, BLOCK_C)
    return y * after, at, mask


@triton.jit
def blocks_kernel(
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
    LEFT: tl.constexpr,
    INNER: tl.constexpr,
    RIGHT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    KEPT: tl.constexpr,
    PARTS: tl.constexpr,
    PROLOGUE: tl.constexpr,
    SCALED: tl.constexpr,
    QUANTIZE: tl.constexpr,
    CODE_MIN: tl.constexpr,
    CODE_MAX: tl.constexpr,
    SYMMETRIC: tl.constexpr,
    DOT: tl.constexpr,
):
    """A token: codes (values unless QUANTIZE).

    Where KEPT, its values stay in registers until the range of all is known. Otherwise
    they are computed twice, the second time from a row that the caches hold.
    """
    # Written out: for Triton 3.6 a cdiv is no constant.
    ROWS: tl.constexpr = (LEFT + BLOCK_M - 1) // BLOCK_M
    TILES: tl.constexpr = ROWS * ((N // LEFT + BLOCK_C - 1) // BLOCK_C)
    WIDTH: tl.constexpr = BLOCK_M if RIGHT == 1 else RIGHT
    HEIGHT: tl.constexpr = BLOCK_M * BLOCK_C // WIDTH
    token = tl.program_id(0).to(tl.int64)
    row_ptr = x_ptr + token * x_stride
    out_row_ptr = out_ptr + token * N
    factor = 1.0
    if PROLOGUE == 1:
        factor = rms_factor(row_ptr, N, epsilon, 2048)
    q = tl.arange(0, RIGHT)
    right = tl.load(right_ptr + q[:, None] * RIGHT + q[None, :])
    pointers = (row_ptr, weight_ptr, input_scale_ptr, left_ptr)
    numbers = (right, factor, before, after)
    if not QUANTIZE:
        for tile in range(TILES):
            y, at, mask = _tile(
                *pointers,
                *numbers,
                tile,
                N,
                LEFT,
                INNER,
                RIGHT,
                BLOCK_M,
                BLOCK_C,
                PARTS,
                PROLOGUE,
                SCALED,
                DOT,
            )
            tl.store(out_row_ptr + at, y, mask=mask)
    else:
        lows = tl.full((HEIGHT, WIDTH), float("inf"), tl.float32)
        highs = tl.full((HEIGHT, WIDTH), -float("inf"), tl.float32)
        odd = tl.zeros((HEIGHT, WIDTH), tl.int32)
        kept = ()
        if KEPT:
            for tile in tl.static_range(TILES):
                y, at, mask = _tile(
                    *pointers,
                    *numbers,
                    tile,
                    N,
                    LEFT,
                    INNER,
                    RIGHT,
                    BLOCK_M,
                    BLOCK_C,
                    PARTS,
                    PROLOGUE,
                    SCALED,
                    DOT,
                )
                kept = kept + (y,)  # type: ignore[assignment]
            for tile in tl.static_range(TILES):
                _, mask = _places(tile, N, LEFT, INNER, RIGHT, BLOCK_M, BLOCK_C)
                lows, highs, odd = _range(kept[tile], mask, lows, highs, odd)
        else:
            for tile in range(TILES):
                y, at, mask = _tile(
                    *pointers,
                    *numbers,
                    tile,
                    N,
                    LEFT,
                    INNER,
                    RIGHT,
                    BLOCK_M,
                    BLOCK_C,
                    PARTS,
                    PROLOGUE,
                    SCALED,
                    DOT,
                )
                lows, highs, odd = _range(y, mask, lows, highs, odd)
        low = tl.min(tl.min(lows, axis=1), axis=0)
        high = tl.max(tl.max(highs, axis=1), axis=0)
        broken = tl.max(tl.max(odd, axis=1), axis=0) > 0
        scale, inverse, zero = grid_parameters(
            low, high, broken, clip_ratio, CODE_MIN, CODE_MAX, SYMMETRIC
        )
        tl.store(scale_ptr + token, scale)
        tl.store(zero_ptr + token, zero)
        if KEPT:
            for tile in tl.static_range(TILES):
                at, mask = _places(tile, N, LEFT, INNER, RIGHT, BLOCK_M, BLOCK_C)
                codes = grid_encode(
                    kept[tile], inverse, zero, broken, CODE_MIN, CODE_MAX
                )
                tl.store(out_row_ptr + at, codes, mask=mask)
        else:
            for tile in range(TILES):
                y, at, mask = _tile(
                    *pointers,
                    *numbers,
                    tile,
                    N,
                    LEFT,
                    INNER,
                    RIGHT,
                    BLOCK_M,
                    BLOCK_C,
                    PARTS,
                    PROLOGUE,
                    SCALED,
                    DOT,
                )
                codes = grid_encode(y, inverse, zero, broken, CODE_MIN, CODE_MAX)
                tl.store(out_row_ptr + at, codes, mask=mask)
