# SPDX-License-Identifier: Apache-2.0
"""The kernel of ``linear_w4a4/triton.py``.

For the int8 units a nibble is unpacked to 16 times its code, which needs no sign
extension: accumulators are 16 times theirs until the end (of a group), exactly.

For the e4m3 units (E4M3) a code c of 4 bits becomes c 2^-9: its byte is the sign and,
in the last four bits, the magnitude (up to 7 subnormal, 8 the least normal number). A
product of two is a multiple of u = 2^-18, at most 64 u. The units add 32 products and
the accumulator at a time. Of each they drop what is some bits below the largest of the
exponents (2^6 u for every product), and then of the sum:

* Hopper's keep 13 bits below the leading one, of both: multiples of u up to 2^14 u are
  exact. They add IMPRECISE = 128 products, at most 2^13 u, to a sum of their own; those
  sums are added in float32 outside of them.
* Blackwell's keep 25, and 23 of the sum, a float32: exact up to 2^24 u, for any number
  of products. sm_103 is taken to be like sm_100 here.

float32 holds the sums of any K: 64 MAX_K = 2^23. Widths are those of MMA-Sim, models
compared bit for bit with the cards (arXiv 2511.10909); DeepSeek-V3 reported Hopper's
first (arXiv 2412.19437, section 3.3.2). This kernel has run on no card yet: ``python -m
benchmarks.gpu`` compares with the reference on sums that need all of 13 bits.
"""

import triton
import triton.language as tl

from ..gpu.split import epilogue
from ..gpu.tiles import place_of, rows_of

# Four bytes at a time. A byte of s is 0xFF where the code is negative: its magnitude is
# that of its complement, plus one.
E4M3_CODES = tl.constexpr("""{ .reg .b32 s, t;
    prmt.b32 s, $1, 0, 0xBA98;
    lop3.b32 t, $1, s, 0x0F0F0F0F, 0x28;
    and.b32 s, s, 0x81818181;
    add.u32 $0, t, s; }""")
E4M3_PLANES = tl.constexpr("""{ .reg .b32 s, t;
    shl.b32 s, $2, 4;
    prmt.b32 s, s, 0, 0xBA98;
    lop3.b32 t, $2, s, 0x0F0F0F0F, 0x28;
    and.b32 s, s, 0x81818181;
    add.u32 $0, t, s;
    prmt.b32 s, $2, 0, 0xBA98;
    shr.u32 t, $2, 4;
    lop3.b32 t, t, s, 0x0F0F0F0F, 0x28;
    and.b32 s, s, 0x81818181;
    add.u32 $1, t, s; }""")
SIXTEENFOLD_PLANES = tl.constexpr("""{ .reg .b32 t;
    shl.b32 t, $2, 4;
    and.b32 $0, t, 0xF0F0F0F0;
    and.b32 $1, $2, 0xF0F0F0F0; }""")


@triton.jit
def _e4m3(codes, PTX: tl.constexpr):
    """int8 codes from -8 to 7 as e4m3 numbers."""
    if PTX:
        return tl.inline_asm_elementwise(
            E4M3_CODES, "=r,r", [codes], dtype=tl.float8e4nv, is_pure=True, pack=4
        )
    return (tl.abs(codes) | (codes & -128)).to(tl.float8e4nv, bitcast=True)


@triton.jit
def _planes(pairs, E4M3: tl.constexpr, PTX: tl.constexpr):
    """The low and the high nibble of int8 pairs: 16 times the code, or as e4m3."""
    if PTX:
        unpack: tl.constexpr = E4M3_PLANES if E4M3 else SIXTEENFOLD_PLANES
        low, high = tl.inline_asm_elementwise(
            unpack, "=&r,=r,r", [pairs], dtype=(tl.int8, tl.int8), is_pure=True, pack=4
        )
        if E4M3:
            low = low.to(tl.float8e4nv, bitcast=True)
            high = high.to(tl.float8e4nv, bitcast=True)
    elif E4M3:
        low = _e4m3(pairs << 4 >> 4, PTX)
        high = _e4m3(pairs >> 4, PTX)
    else:
        low = pairs << 4
        high = pairs & -16
    return low, high


@triton.jit
def _product(a, w, acc, SWAP: tl.constexpr, IMPRECISE: tl.constexpr):
    """``acc + a w^T``, or its transpose ``acc + w a^T`` when SWAP."""
    if SWAP:
        left, right = w, a.T
    else:
        left, right = a, w.T
    return tl.dot(
        left, right, acc, max_num_imprecise_acc=IMPRECISE, out_dtype=acc.dtype
    )


@triton.jit
def _load_codes(a_ptr, start, K, COLUMNS: tl.constexpr, EVEN_K: tl.constexpr):
    """Columns of the activations; zeros beyond K."""
    columns = start + tl.arange(0, COLUMNS)
    if EVEN_K:
        return tl.load(a_ptr + columns[None, :])
    return tl.load(a_ptr + columns[None, :], mask=columns[None, :] < K, other=0)


@triton.jit
def _by_channel(values, SWAP: tl.constexpr):
    return values[:, None] if SWAP else values[None, :]


@triton.jit
def _by_token(values, SWAP: tl.constexpr):
    return values[None, :] if SWAP else values[:, None]


@triton.jit
def _add_group(
    total,
    acc,
    row_sum,
    group,
    groups,
    columns,
    N,
    token,
    zero,
    token_ptr,
    zero_ptr,
    scale_ptr,
    weight_zero_ptr,
    sum_ptr,
    UNIT: tl.constexpr,
    ZERO: tl.constexpr,
    WEIGHT_ZERO: tl.constexpr,
    TOKEN_GROUPS: tl.constexpr,
    SWAP: tl.constexpr,
):
    """Correct the sums of a group by the zero points, scale and add them.

    With TOKEN_GROUPS a token has a scale and a zero point of its own in every group.

    acc is UNIT times the sums of codes; the product with the scale over UNIT, a power
    of two, rounds as that of the plain sums with the scale would. float32 sums are of
    codes of 4 bits: below 2^8 times the columns of a group, fewer than 2^16, so exact.
    """
    at = group * N + columns
    # The last block may reach past the last group.
    exists = at < groups * N
    if WEIGHT_ZERO:
        shift = tl.load(weight_zero_ptr + at, mask=exists, other=0).to(acc.dtype) * UNIT
        acc -= _by_channel(shift, SWAP) * _by_token(row_sum.to(acc.dtype), SWAP)
    if TOKEN_GROUPS:
        # What there is no group for is multiplied with a scale of 0.
        of_group = token.to(tl.int64) * groups + tl.minimum(group, groups - 1)
        if ZERO:
            zero = tl.load(zero_ptr + of_group)
    if ZERO:
        sums = tl.load(sum_ptr + at, mask=exists, other=0).to(acc.dtype) * UNIT
        acc -= _by_channel(sums, SWAP) * _by_token(zero.to(acc.dtype), SWAP)
    scale = tl.load(scale_ptr + at, mask=exists, other=0.0) * (1.0 / UNIT)
    part = acc.to(tl.float32) * _by_channel(scale, SWAP)
    if TOKEN_GROUPS:
        part = part * _by_token(tl.load(token_ptr + of_group), SWAP)
    return total + part


@triton.jit
def linear_kernel(
    a_ptr,
    w_ptr,
    out_ptr,
    token_ptr,
    zero_ptr,
    scale_ptr,
    weight_zero_ptr,
    sum_ptr,
    bias_ptr,
    index_ptr,
    tiles_ptr,
    M,
    N,
    K,
    row_bytes,
    steps,
    groups,
    experts,
    GROUP: tl.constexpr,
    NIBBLES: tl.constexpr,
    ZERO: tl.constexpr,
    WEIGHT_ZERO: tl.constexpr,
    TOKEN_GROUPS: tl.constexpr,
    BIAS: tl.constexpr,
    EVEN_K: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SWAP: tl.constexpr,
    PTX: tl.constexpr,
    EXPERTS: tl.constexpr,
    E4M3: tl.constexpr,
    IMPRECISE: tl.constexpr,
):
    """A tile of ``out [M, N]``, or of one part of split-K in ``out [PARTS, M, N]``.

    A step is one block of codes: 128 columns, or of groups below that two groups
    (nibbles) or one (bytes). GROUP is 0 for one scale a channel. With TOKEN_GROUPS
    tokens have scales and zero points ``[M, groups]``, else one. With EXPERTS a row is
    a pair of token and expert, see ``gpu/tiles.py``. E4M3 takes nibbles and codes of 4
    bits; IMPRECISE is None where the matrix units may add up any K.
    """
    UNIT: tl.constexpr = 2.0**-18 if E4M3 else 16 if NIBBLES else 1
    SUMS: tl.constexpr = tl.float32 if E4M3 else tl.int32
    PLANES: tl.constexpr = 2 if NIBBLES else 1
    NARROW: tl.constexpr = GROUP == 32 or GROUP == 64
    STEP: tl.constexpr = GROUP * PLANES if NARROW else 128
    STEP_BYTES: tl.constexpr = STEP // PLANES
    tile_m, tile_n = place_of(M, N, experts, BLOCK_M, BLOCK_N, EXPERTS)
    part = tl.program_id(1)

    rows, end, expert = rows_of(tiles_ptr, tile_m, M, BLOCK_M, EXPERTS)
    if EXPERTS:
        if expert < 0:
            return
        w_ptr += expert.to(tl.int64) * N * row_bytes
        scale_ptr += expert * groups * N
        weight_zero_ptr += expert * groups * N
        sum_ptr += expert * groups * N
    columns = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    # Rows and columns past the end read the first one and are not stored.
    row = tl.where(rows < end, rows, 0)
    token = tl.load(index_ptr + row) if EXPERTS else row
    column = tl.where(columns < N, columns, 0)
    a_row = a_ptr + token[:, None].to(tl.int64) * K
    w_row = w_ptr + column[:, None].to(tl.int64) * row_bytes
    w_row += tl.arange(0, STEP_BYTES)[None, :]

    if SWAP:
        acc = tl.zeros((BLOCK_N, BLOCK_M), SUMS)
        total = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    else:
        acc = tl.zeros((BLOCK_M, BLOCK_N), SUMS)
        total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    row_sum = tl.zeros((BLOCK_M,), tl.int32)
    zero = tl.zeros((BLOCK_M,), tl.int32)
    if ZERO and not TOKEN_GROUPS:
        zero = tl.load(zero_ptr + token)

    PER_GROUP: tl.constexpr = 1 if GROUP == 0 or NARROW else GROUP // 128
    # A lone step has no sum to be added to.
    PROMOTE: tl.constexpr = IMPRECISE if GROUP == 0 or PER_GROUP > 1 else None
    turns = steps // PER_GROUP
    share = tl.cdiv(turns, PARTS)
    for turn in range(part * share, tl.minimum((part + 1) * share, turns)):
        if NARROW:
            pairs = tl.load(w_row + turn * STEP_BYTES)
            if NIBBLES:
                low, high = _planes(pairs, E4M3, PTX)
            else:
                low, high = pairs, pairs
            for plane in tl.static_range(PLANES):
                a = _load_codes(a_row, turn * STEP + plane * GROUP, K, GROUP, EVEN_K)
                if WEIGHT_ZERO:
                    row_sum = tl.sum(a.to(tl.int32), axis=1)
                if E4M3:
                    a = _e4m3(a, PTX)
                if plane == 0:
                    sums = _product(a, low, tl.zeros_like(acc), SWAP, None)
                else:
                    sums = _product(a, high, tl.zeros_like(acc), SWAP, None)
                total = _add_group(
                    total,
                    sums,
                    row_sum,
                    turn * PLANES + plane,
                    groups,
                    column,
                    N,
                    token,
                    zero,
                    token_ptr,
                    zero_ptr,
                    scale_ptr,
                    weight_zero_ptr,
                    sum_ptr,
                    UNIT,
                    ZERO,
                    WEIGHT_ZERO,
                    TOKEN_GROUPS,
                    SWAP,
                )
        else:
            if GROUP != 0:
                acc = tl.zeros_like(acc)
                row_sum = tl.zeros((BLOCK_M,), tl.int32)
            for block in tl.static_range(PER_GROUP):
                step = turn * PER_GROUP + block
                w = tl.load(w_row + step * STEP_BYTES)
                if NIBBLES:
                    low, high = _planes(w, E4M3, PTX)
                    w = tl.permute(tl.join(low, high), (0, 2, 1))
                    w = tl.reshape(w, (BLOCK_N, 128))
                a = _load_codes(a_row, step * 128, K, 128, EVEN_K)
                if WEIGHT_ZERO:
                    row_sum += tl.sum(a.to(tl.int32), axis=1)
                if E4M3:
                    a = _e4m3(a, PTX)
                acc = _product(a, w, acc, SWAP, PROMOTE)
            if GROUP != 0:
                total = _add_group(
                    total,
                    acc,
                    row_sum,
                    turn,
                    groups,
                    column,
                    N,
                    token,
                    zero,
                    token_ptr,
                    zero_ptr,
                    scale_ptr,
                    weight_zero_ptr,
                    sum_ptr,
                    UNIT,
                    ZERO,
                    WEIGHT_ZERO,
                    TOKEN_GROUPS,
                    SWAP,
                )

    if GROUP == 0:
        if E4M3:
            acc = (acc * (1.0 / UNIT)).to(tl.int32)
        elif NIBBLES:
            acc = acc >> 4
        if WEIGHT_ZERO:
            shift = tl.load(weight_zero_ptr + column)
            acc -= _by_channel(shift, SWAP) * _by_token(row_sum, SWAP)
        if ZERO and PARTS == 1:
            sums = tl.load(sum_ptr + column)
            acc -= _by_channel(sums, SWAP) * _by_token(zero, SWAP)
    result = acc if GROUP == 0 else total
    if SWAP:
        result = result.T
    if PARTS == 1:
        result = result.to(tl.float32)
        if GROUP == 0:
            result = result * tl.load(scale_ptr + column)[None, :]
        result = epilogue(
            result, token_ptr, bias_ptr, token, column, not TOKEN_GROUPS, BIAS
        )
    at = (tl.cast(part, tl.int64) * M + rows[:, None].to(tl.int64)) * N
    inside = (rows < end)[:, None] & (columns < N)[None, :]
    value = result.to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + at + columns[None, :], value, mask=inside)
