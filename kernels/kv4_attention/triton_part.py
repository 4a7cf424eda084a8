# SPDX-License-Identifier: Apache-2.0
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
"""What the kernels of KV4 attention share: softmax and values of a part of a context.

Cached codes become fp16 without arithmetic: ``u`` in the low bits of a half is the
subnormal ``u 2^-24`` and in bits 4 to 7 it is ``u 2^-20``, both exact. A 16-bit word
of a page holds elements 2j, 2j + 1, 2j + D/2 and 2j + 1 + D/2, so a head is four
planes of D/4 elements here; K and V are read as words, and each plane has a product of
its own. ``triton.py`` describes the arithmetic.
"""

import math

import triton
import triton.language as tl

INFINITY = tl.constexpr(float("inf"))
LOG2_E = tl.constexpr(1.0 / math.log(2.0))
LOW_UNIT = tl.constexpr(2.0**24)  # of codes in bits 0 to 3
HIGH_UNIT = tl.constexpr(2.0**20)  # of codes in bits 4 to 7
LOW_OVER_HIGH = tl.constexpr(2.0**-4)


@triton.jit
def unpack(words, PTX: tl.constexpr):
    """The four codes of 16-bit words as fp16 bits: elements 2j and 2j + 1 of each half
    of a head."""
    if PTX:
        a, b, c, d = tl.inline_asm_elementwise(
            """{
            .reg .b32 next;
            shr.u32 next, $4, 8;
            and.b32 $0, $4, 0x000F000F;
            and.b32 $1, next, 0x000F000F;
            and.b32 $2, $4, 0x00F000F0;
            and.b32 $3, next, 0x00F000F0;
            }""",
            "=&r,=&r,=&r,=&r,r",
            [words],
            dtype=(tl.float16, tl.float16, tl.float16, tl.float16),
            is_pure=True,
            pack=2,
        )
    else:
        following = words >> 8
        a = (words & 0x0F).to(tl.float16, bitcast=True)
        b = (following & 0x0F).to(tl.float16, bitcast=True)
        c = (words & 0xF0).to(tl.float16, bitcast=True)
        d = (following & 0xF0).to(tl.float16, bitcast=True)
    return a, b, c, d


@triton.jit
def finite_or_zero(x):
    """-inf, the peak of nothing, as 0: differences with it are no NaN."""
    return tl.where(x == -INFINITY, 0.0, x)


@triton.jit
def fold(peak, total, a, b, c, d, peak_2, total_2, a_2, b_2, c_2, d_2):
    """Merge the later of two parts of a context into the earlier.

    Multiply-adds are explicit, so that every kernel rounds alike.
    """
    new = tl.maximum(peak, peak_2)
    keep = tl.exp2(peak - finite_or_zero(new))
    take = tl.exp2(peak_2 - finite_or_zero(new))
    total = tl.fma(total, keep, total_2 * take)
    keep = tl.broadcast_to(keep[:, None], a.shape)
    take = tl.broadcast_to(take[:, None], a.shape)
    a = tl.fma(a, keep, a_2 * take)
    b = tl.fma(b, keep, b_2 * take)
    c = tl.fma(c, keep, c_2 * take)
    d = tl.fma(d, keep, d_2 * take)
    return new, total, a, b, c, d


@triton.jit
def part(
    qa,
    qb,
    qc,
    qd,
    query_sum,
    factor,
    position,
    cache_ptr,
    table_ptr,
    page_stride,
    begin,
    end,
    window,
    cap_factor,
    QUARTER: tl.constexpr,
    PADDED: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TILE: tl.constexpr,
    WINDOW: tl.constexpr,
    CAP: tl.constexpr,
    LAZY: tl.constexpr,
    PTX: tl.constexpr,
):
    """Softmax and values of the tokens ``[begin, end)``, begin a multiple of TILE.

    Args:
        qa, qb, qc, qd: planes of the queries, fp16 ``[rows, PADDED]``.
        query_sum, factor, position: ``[rows]``.
        cache_ptr: first page of the head; table_ptr: the sequence's row.

    Returns:
        peak and total ``[rows]``, and four planes of values, not yet divided.
    """
    rows: tl.constexpr = qa.shape[0]
    offset = tl.arange(0, TILE)
    column = tl.arange(0, PADDED)
    inside = (column < QUARTER)[None, :]
    peak = tl.full((rows,), -INFINITY, tl.float32)
    a = tl.zeros((rows, PADDED), tl.float32)
    b = tl.zeros((rows, PADDED), tl.float32)
    c = tl.zeros((rows, PADDED), tl.float32)
    d = tl.zeros((rows, PADDED), tl.float32)
    # Sums over tokens: one for each column of a tile while it pays, added at the end.
    if LAZY:
        total = tl.zeros((rows, TILE), tl.float32)
        zeros = tl.zeros((rows, TILE), tl.float32)
    else:
        total = tl.zeros((rows,), tl.float32)
        zeros = tl.zeros((rows,), tl.float32)
    for first in range(begin, end, TILE):
        token = first + offset
        if BLOCK_SIZE % TILE == 0:
            page = tl.load(table_ptr + first // BLOCK_SIZE)
            slot = first % BLOCK_SIZE + offset
        else:
            page = tl.load(table_ptr + token // BLOCK_SIZE, mask=token < end, other=0)
            slot = token % BLOCK_SIZE
        page_ptr = cache_ptr + page.to(tl.int64) * page_stride
        word_ptr = page_ptr.to(tl.pointer_type(tl.uint16)) + slot * QUARTER
        word_ptr = word_ptr[:, None] + column[None, :]
        if PADDED == QUARTER:
            k = tl.load(word_ptr)
            v = tl.load(word_ptr + BLOCK_SIZE * QUARTER)
        else:
            k = tl.load(word_ptr, mask=inside, other=0)
            v = tl.load(word_ptr + BLOCK_SIZE * QUARTER, mask=inside, other=0)
        parameter_ptr = page_ptr + 4 * BLOCK_SIZE * QUARTER
        parameter_ptr = parameter_ptr.to(tl.pointer_type(tl.float16)) + slot
        k_scale = tl.load(parameter_ptr).to(tl.float32)
        k_zero = tl.load(parameter_ptr + BLOCK_SIZE).to(tl.float32)
        v_scale = tl.load(parameter_ptr + 2 * BLOCK_SIZE).to(tl.float32)
        v_zero = tl.load(parameter_ptr + 3 * BLOCK_SIZE).to(tl.float32)

        # What the store does not write for finite values makes NaN the rows that see
        # it; 0 * NaN must not reach the others.
        size = k_scale + v_scale + tl.abs(k_zero) + tl.abs(v_zero)
        good = (tl.minimum(k_scale, v_scale) > 0.0) & (size < INFINITY)
        k_scale = tl.where(good, k_scale, float("nan"))
        v_zero = tl.where(good, v_zero, 0.0)
        bits = tl.where(good, v_scale, 1.0).to(tl.int32, bitcast=True)
        exponent = bits >> 23
        fraction = ((bits & 0x7FFFFF) | 0x3F800000).to(tl.float32, bitcast=True)
        inverse = ((254 - exponent) << 23).to(tl.float32, bitcast=True)
        bias = (exponent - 127).to(tl.float32)

        ka, kb, kc, kd = unpack(k, PTX)
        score = tl.dot(qa, ka.T)
        score = tl.dot(qb, kb.T, score)
        score = tl.dot(qc, kc.T, score)
        score = tl.dot(qd, kd.T, score)
        k_scale = tl.broadcast_to(k_scale[None, :], score.shape)
        bias = tl.broadcast_to(bias[None, :], score.shape)
        correction = tl.broadcast_to(-query_sum[:, None], score.shape)
        k_zero = tl.broadcast_to(k_zero[None, :], score.shape)
        # (codes * factor - zero * sum) * scale, the factor being in the sum.
        score = tl.fma(correction, k_zero, score * factor[:, None])
        if CAP:
            power = tl.exp2(score * k_scale)
            cap = tl.full(score.shape, 1.0, tl.float32) * cap_factor
            score = tl.fma(1.0 - 2.0 / (power + 1.0), cap, bias)
        else:
            score = tl.fma(score, k_scale, bias)
        visible = token[None, :] <= position[:, None]
        if WINDOW:
            visible = visible & (token[None, :] > position[:, None] - window)
        score = tl.where(visible, score, -INFINITY)

        new = tl.maximum(peak, tl.max(score, axis=1))
        p = tl.exp2(score - finite_or_zero(new)[:, None])
        keep = tl.exp2(peak - finite_or_zero(new))
        peak = new
        weight = (p * fraction[None, :]).to(tl.float16)
        shares = p * inverse[None, :]
        products = weight.to(tl.float32) * v_zero[None, :]
        if LAZY:
            old = tl.broadcast_to(keep[:, None], score.shape)
            total = tl.fma(total, old, shares)
            zeros = tl.fma(zeros, old, products)
        else:
            total = tl.fma(total, keep, tl.sum(shares, axis=1))
            zeros = tl.fma(zeros, keep, tl.sum(products, axis=1))
        va, vb, vc, vd = unpack(v, PTX)
        a = tl.dot(weight, va, a * keep[:, None])
        b = tl.dot(weight, vb, b * keep[:, None])
        c = tl.dot(weight, vc, c * keep[:, None])
        d = tl.dot(weight, vd, d * keep[:, None])
    if LAZY:
        total = tl.sum(total, axis=1)
        zeros = tl.sum(zeros, axis=1)
    zeros = zeros[:, None]
    a, b = a * LOW_UNIT - zeros, b * LOW_UNIT - zeros
    c, d = c * HIGH_UNIT - zeros, d * HIGH_UNIT - zeros
    return peak, total, a, b, c, d


@triton.jit
def add_sink(peak, total, sink):
    """Totals of rows with the shares of their sinks, which have no values.

    A total may become infinite, and its row zero, where the sink is far above the peak
    or nothing is visible.
    """
    log2_e = tl.full(peak.shape, 1.0, tl.float32) * LOG2_E
    share = tl.exp2(tl.fma(sink, log2_e, -peak))
    return total + tl.where(sink * log2_e < INFINITY, share, float("nan"))


@triton.jit
def write_out(
    out_ptr, live, total, a, b, c, d, QUARTER: tl.constexpr, PADDED: tl.constexpr
):
    """Divide by the totals and put the planes in their places.

    Args:
        out_ptr: pointers ``[rows]`` to the first element of a head.
    """
    column = tl.arange(0, PADDED)
    mask = live[:, None] & (column < QUARTER)[None, :]
    at = out_ptr[:, None] + 2 * column[None, :]
    inverse = tl.div_rn(tl.full(total.shape, 1.0, tl.float32), total)[:, None]
    dtype = out_ptr.dtype.element_ty
    tl.store(at, (a * inverse).to(dtype), mask=mask)
    tl.store(at + 1, (b * inverse).to(dtype), mask=mask)
    tl.store(at + 2 * QUARTER, (c * inverse).to(dtype), mask=mask)
    tl.store(at + 2 * QUARTER + 1, (d * inverse).to(dtype), mask=mask)
