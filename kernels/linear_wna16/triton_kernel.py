# SPDX-License-Identifier: Apache-2.0
"""The kernel of ``linear_wna16/triton.py``.

Codes become 16-bit floats by putting their bits below those of a power of two, of which
the steps are 1, and subtracting it with the zero: no conversion instruction. A plane is
the codes at one place of each byte; it is multiplied with its own columns of x.
"""

import triton
import triton.language as tl

from ..gpu.split import epilogue
from ..gpu.tiles import place_of, rows_of


@triton.jit
def _number(field, zero, DOT: tl.constexpr):
    """``field - zero`` as DOT, exactly; field int16 in [0, 15], zero in [0, 23]."""
    if tl.bfloat16 == DOT:
        number = (field | 0x4300).to(tl.bfloat16, bitcast=True)
        number = number - (zero + 128).to(tl.float32).to(tl.bfloat16)
    elif tl.float16 == DOT:
        number = (field | 0x6400).to(tl.float16, bitcast=True)
        number = number - (zero + 1024).to(tl.float32).to(tl.float16)
    else:
        number = (field - zero).to(tl.float32)
    return number


@triton.jit
def _field(data, high, plane: tl.constexpr, BITS: tl.constexpr):
    """Unsigned field of a plane; high holds the third bits of 3."""
    WIDTH: tl.constexpr = 4 if BITS == 4 else 2
    field = (data >> (WIDTH * (plane % (8 // WIDTH)))) & ((1 << WIDTH) - 1)
    if BITS == 4:
        # Nibbles are signed: flipping their sign bit adds 8.
        field = field ^ 8
    if BITS == 3:
        field = field | (((high >> plane) & 1) << 2)
    return field


@triton.jit
def linear_kernel(
    x_ptr,
    w_ptr,
    out_ptr,
    scale_ptr,
    zero_ptr,
    bias_ptr,
    index_ptr,
    tiles_ptr,
    M,
    N,
    K,
    row_bytes,
    turns,
    groups,
    experts,
    GROUP: tl.constexpr,
    BITS: tl.constexpr,
    HALF: tl.constexpr,
    ZERO: tl.constexpr,
    BIAS: tl.constexpr,
    EVEN_K: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SWAP: tl.constexpr,
    DOT: tl.constexpr,
    EXPERTS: tl.constexpr,
):
    """A tile of ``out [M, N]``, or of one part of split-K in ``out [PARTS, M, N]``.

    A turn is a group, or a block of the packing where that holds several groups or
    there is one scale a channel (GROUP 0). HALF is the columns of a plane. With EXPERTS
    a row is a pair of token and expert, see ``gpu/tiles.py``.
    """
    PLANES: tl.constexpr = 8 if BITS == 3 else 8 // BITS
    BLOCK: tl.constexpr = PLANES * HALF
    BLOCK_BYTES: tl.constexpr = BLOCK * BITS // 8
    PER_TURN: tl.constexpr = GROUP // BLOCK if GROUP > BLOCK else 1
    PER_GROUP: tl.constexpr = GROUP // HALF if GROUP != 0 else PLANES
    GROUPS_PER_TURN: tl.constexpr = PER_TURN * PLANES // PER_GROUP
    tile_m, tile_n = place_of(M, N, experts, BLOCK_M, BLOCK_N, EXPERTS)
    part = tl.program_id(1)

    rows, end, expert = rows_of(tiles_ptr, tile_m, M, BLOCK_M, EXPERTS)
    if EXPERTS:
        if expert < 0:
            return
        w_ptr += expert.to(tl.int64) * N * row_bytes
        scale_ptr += expert * groups * N
        zero_ptr += expert * groups * N
    columns = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    row = tl.where(rows < end, rows, 0)
    token = tl.load(index_ptr + row) if EXPERTS else row
    column = tl.where(columns < N, columns, 0)
    lane = tl.arange(0, HALF)
    x_row = x_ptr + token[:, None].to(tl.int64) * K
    w_row = w_ptr + column[:, None].to(tl.int64) * row_bytes + lane[None, :]

    if SWAP:
        acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    else:
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    total = tl.zeros_like(acc)
    OFFSET: tl.constexpr = 0 if BITS == 8 else 1 << (BITS - 1)
    zero = tl.full((BLOCK_N, 1), OFFSET, tl.int16)
    if ZERO and GROUP == 0:
        zero += tl.load(zero_ptr + column)[:, None].to(tl.int16)

    share = tl.cdiv(turns, PARTS)
    for turn in range(part * share, tl.minimum((part + 1) * share, turns)):
        for index in tl.static_range(PER_TURN):
            block = turn * PER_TURN + index
            start = block * BLOCK_BYTES
            data = tl.load(w_row + start).to(tl.int16)
            second = data
            high = data
            if BITS == 3:
                second = tl.load(w_row + start + 32).to(tl.int16)
                high = tl.load(w_row + start + 64).to(tl.int16)
            for plane in tl.static_range(PLANES):
                place = index * PLANES + plane
                group = turn * GROUPS_PER_TURN + place // PER_GROUP
                at = group * N + column
                # The last block may reach past the last group.
                exists = at < groups * N
                if GROUP != 0 and place % PER_GROUP == 0:
                    acc = tl.zeros_like(acc)
                    if ZERO:
                        shift = tl.load(zero_ptr + at, mask=exists, other=0)
                        zero = shift[:, None].to(tl.int16) + OFFSET
                if BITS == 8:
                    w = (data - zero).to(tl.float32).to(DOT)
                else:
                    half = second if BITS == 3 and plane >= 4 else data
                    w = _number(_field(half, high, plane, BITS), zero, DOT)
                k = (block * PLANES + plane) * HALF + lane[None, :]
                if EVEN_K:
                    x = tl.load(x_row + k).to(DOT)
                else:
                    x = tl.load(x_row + k, mask=k < K, other=0.0).to(DOT)
                acc = tl.dot(w, x.T, acc) if SWAP else tl.dot(x, w.T, acc)
                if GROUP != 0 and (place + 1) % PER_GROUP == 0:
                    scale = tl.load(scale_ptr + at, mask=exists, other=0.0)
                    if SWAP:
                        total += acc * scale[:, None]
                    else:
                        total += acc * scale[None, :]

    result = acc if GROUP == 0 else total
    if SWAP:
        result = result.T
    if PARTS == 1:
        if GROUP == 0:
            result = result * tl.load(scale_ptr + column)[None, :]
        result = epilogue(result, bias_ptr, bias_ptr, row, column, False, BIAS)
    at = (tl.cast(part, tl.int64) * M + rows[:, None].to(tl.int64)) * N
    inside = (rows < end)[:, None] & (columns < N)[None, :]
    value = result.to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + at + columns[None, :], value, mask=inside)
