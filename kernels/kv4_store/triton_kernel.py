# SPDX-License-Identifier: Apache-2.0
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
"""Triton kernels of the KV4 store: rotation, grid and packing of heads.

They repeat ``hadamard/generic.py`` and the ``kv_*`` functions of ``grid.py`` bit for
bit, and are launched without fused multiply-adds for that.

A head is held as its two halves (elements j and j + D/2 share a byte), each padded to
a power of two.
"""

import triton
import triton.language as tl

# Adding it leaves no bits below 1: round to nearest even, for magnitudes below 2^22.
ROUND = tl.constexpr(12582912.0)
ROUND_BITS = tl.constexpr(0x4B400000)
# Likewise in float64, where the low word is then the integer.
ROUND_64 = tl.constexpr(6755399441055744.0)
FRACTION_BITS = tl.constexpr(30)
INFINITY = tl.constexpr(float("inf"))
NAN_BITS = tl.constexpr(0x7E00)
TINY = tl.constexpr(2.0**-100)
SCALE_MIN = tl.constexpr(2.0**-24)
SCALE_MAX = tl.constexpr(65504.0)
ZERO_MAX = tl.constexpr(1024.0)
ZERO_STEPS = tl.constexpr(64.0)


@triton.jit
def power_of_two(exponent):
    """``2^exponent`` in float64, of int64 exponents of normal numbers."""
    return ((exponent + 1023) << 52).to(tl.float64, bitcast=True)


@triton.jit
def rotated(
    low,
    high,
    table_ptr,
    HALF: tl.constexpr,
    PADDED: tl.constexpr,
    PADDED_HALF: tl.constexpr,
):
    """Orthonormal Hadamard transform of rows, as halves in and out.

    Exact on 31-bit integers: products of four int8 digits, whose sums int32 holds.

    Args:
        low, high: float32 ``[rows, PADDED_HALF]``, zero from HALF on.
        table_ptr: int8 ``[PADDED, PADDED]``, the transposed matrix padded with zeros.
    """
    peak = tl.maximum(tl.max(tl.abs(low), axis=1), tl.max(tl.abs(high), axis=1))
    peak = peak.to(tl.float64)
    exponent = ((peak.to(tl.int64, bitcast=True) >> 52) & 0x7FF) - 1022
    exponent = tl.where(peak > 0.0, exponent, 0)
    # An Inf leaves garbage here; the caller's own look at the values tells.
    up = power_of_two(tl.minimum(-exponent + FRACTION_BITS, 1000))[:, None]
    norm = tl.full((), (2.0 * HALF) ** -0.5, tl.float64)
    down = power_of_two(tl.maximum(exponent - FRACTION_BITS, -1000))[:, None]
    column = tl.arange(0, PADDED_HALF)
    # Rows that belong to the other half or to none meet zeros.
    at = table_ptr + column[:, None] * PADDED + column[None, :]
    inside = tl.broadcast_to((column < HALF)[None, :], (PADDED_HALF, PADDED_HALF))
    none = tl.zeros(low.shape, tl.int32)
    left = tl.load(at, mask=inside, other=0)
    right = tl.load(at + HALF, mask=inside, other=0)
    a0, a1, a2, a3, b0, b1, b2, b3 = _add_products(
        none, none, none, none, none, none, none, none, low, up, left, right
    )
    at += HALF * PADDED
    left = tl.load(at, mask=inside, other=0)
    right = tl.load(at + HALF, mask=inside, other=0)
    a0, a1, a2, a3, b0, b1, b2, b3 = _add_products(
        a0, a1, a2, a3, b0, b1, b2, b3, high, up, left, right
    )
    low = (_recombine(a0, a1, a2, a3) * norm * down).to(tl.float32)
    high = (_recombine(b0, b1, b2, b3) * norm * down).to(tl.float32)
    return low, high


@triton.jit
def _add_products(a0, a1, a2, a3, b0, b1, b2, b3, x, up, left, right):
    """Add the products of ``round(x * up)`` with left to a, and those with right to b.

    By signed bytes, the lowest first, so that few of them are held at a time.
    """
    steps = (x.to(tl.float64) * up + ROUND_64).to(tl.int64, bitcast=True)
    rest = steps.to(tl.int32)
    digit = ((rest + 128) & 255) - 128
    rest = (rest - digit) >> 8
    a0 = tl.dot(digit.to(tl.int8), left, a0, out_dtype=tl.int32)
    b0 = tl.dot(digit.to(tl.int8), right, b0, out_dtype=tl.int32)
    digit = ((rest + 128) & 255) - 128
    rest = (rest - digit) >> 8
    a1 = tl.dot(digit.to(tl.int8), left, a1, out_dtype=tl.int32)
    b1 = tl.dot(digit.to(tl.int8), right, b1, out_dtype=tl.int32)
    digit = ((rest + 128) & 255) - 128
    rest = (rest - digit) >> 8
    a2 = tl.dot(digit.to(tl.int8), left, a2, out_dtype=tl.int32)
    b2 = tl.dot(digit.to(tl.int8), right, b2, out_dtype=tl.int32)
    a3 = tl.dot(rest.to(tl.int8), left, a3, out_dtype=tl.int32)
    b3 = tl.dot(rest.to(tl.int8), right, b3, out_dtype=tl.int32)
    return a0, a1, a2, a3, b0, b1, b2, b3


@triton.jit
def _recombine(s0, s1, s2, s3):
    """``s0 + s1 2^8 + s2 2^16 + s3 2^24``, exact in float64."""
    return (s2 + s3 * 256).to(tl.float64) * 65536.0 + (s0 + s1 * 256).to(tl.float64)


@triton.jit
def load_halves(
    row_ptr,
    live,
    table_ptr,
    HALF: tl.constexpr,
    PADDED: tl.constexpr,
    PADDED_HALF: tl.constexpr,
    ROTATE: tl.constexpr,
):
    """Heads as float32 halves, rotated if asked, and whether each row is finite.

    Args:
        row_ptr: pointers ``[rows]`` to the first element of a head.
        live: which rows exist; others are zeros.

    Returns:
        two ``[rows, PADDED_HALF]`` with zeros from HALF on, and bool ``[rows]``.
    """
    column = tl.arange(0, PADDED_HALF)
    inside = live[:, None] & (column < HALF)[None, :]
    at = row_ptr[:, None] + column[None, :]
    low = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    high = tl.load(at + HALF, mask=inside, other=0.0).to(tl.float32)
    return transformed(low, high, table_ptr, HALF, PADDED, PADDED_HALF, ROTATE)


@triton.jit
def transformed(
    low,
    high,
    table_ptr,
    HALF: tl.constexpr,
    PADDED: tl.constexpr,
    PADDED_HALF: tl.constexpr,
    ROTATE: tl.constexpr,
):
    """As :func:`load_halves`, of halves that are there already."""
    finite = (tl.abs(low) < INFINITY) & (tl.abs(high) < INFINITY)
    if ROTATE:
        low, high = rotated(low, high, table_ptr, HALF, PADDED, PADDED_HALF)
        finite = finite & (tl.abs(low) < INFINITY) & (tl.abs(high) < INFINITY)
    return low, high, tl.sum(finite.to(tl.int32), axis=1) == PADDED_HALF


@triton.jit
def _steps(x, inverse, zero):
    """Unsigned codes: nearest step in [0, 15], ties to even."""
    steps = x * inverse[:, None] + zero[:, None]
    steps = tl.minimum(tl.maximum(steps, 0.0), 15.0) + ROUND
    return steps.to(tl.int32, bitcast=True) & 15


@triton.jit
def store_heads(
    low,
    high,
    finite,
    live,
    codes_ptr,
    scale_ptr,
    zero_ptr,
    HALF: tl.constexpr,
    PADDED_HALF: tl.constexpr,
):
    """Quantize rows and write their bytes, scale and zero: ``kv_parameters`` and
    ``kv_encode``.

    Args:
        codes_ptr, scale_ptr, zero_ptr: pointers ``[rows]``, the last two to int16.
    """
    column = tl.arange(0, PADDED_HALF)
    inside = (column < HALF)[None, :]
    least = tl.minimum(
        tl.min(tl.where(inside, low, INFINITY), axis=1),
        tl.min(tl.where(inside, high, INFINITY), axis=1),
    )
    most = tl.maximum(
        tl.max(tl.where(inside, low, -INFINITY), axis=1),
        tl.max(tl.where(inside, high, -INFINITY), axis=1),
    )
    peak = tl.maximum(most, -least)
    scale = tl.div_rn(most * 0.5 - least * 0.5, tl.full(most.shape, 7.5, tl.float32))
    scale = tl.maximum(scale, peak * (1.0 / ZERO_MAX))
    scale = tl.where(least == most, peak, scale)
    scale = tl.where(peak < TINY, 1.0, scale)
    scale = tl.minimum(tl.maximum(scale, SCALE_MIN), SCALE_MAX).to(tl.float16)
    inverse = tl.div_rn(tl.full(most.shape, 1.0, tl.float32), scale.to(tl.float32))
    zero = tl.minimum(tl.maximum(-least * inverse, -ZERO_MAX), ZERO_MAX)
    steps = (zero * ZERO_STEPS + ROUND).to(tl.int32, bitcast=True) - ROUND_BITS
    zero = tl.where(peak < TINY, 0.0, steps.to(tl.float32) * (1.0 / ZERO_STEPS))
    stored_zero = zero.to(tl.float16)
    zero = stored_zero.to(tl.float32)

    packed = _steps(low, inverse, zero) | (_steps(high, inverse, zero) << 4)
    packed = tl.where(finite[:, None], packed, 0).to(tl.uint8)
    tl.store(codes_ptr[:, None] + column[None, :], packed, mask=live[:, None] & inside)
    scale_bits = scale.to(tl.int16, bitcast=True)
    zero_bits = stored_zero.to(tl.int16, bitcast=True)
    tl.store(scale_ptr, tl.where(finite, scale_bits, NAN_BITS).to(tl.int16), mask=live)
    tl.store(zero_ptr, tl.where(finite, zero_bits, NAN_BITS).to(tl.int16), mask=live)


@triton.jit
def store_tokens(
    low,
    high,
    finite,
    value_ptr,
    there,
    slot,
    slots,
    cache_ptr,
    page_stride,
    table_ptr,
    BLOCK_SIZE: tl.constexpr,
    HALF: tl.constexpr,
    PADDED: tl.constexpr,
    PADDED_HALF: tl.constexpr,
):
    """Quantize K, given as halves, and V of some tokens into the pages of one head.

    Args:
        finite: bool ``[rows]``, of K.
        value_ptr: pointers ``[rows]`` to the first element of a head of V.
        there: which rows of V exist.
        slot: int64 ``[rows]``; outside of ``[0, slots)`` nothing is written.
        cache_ptr: first page of the head.
    """
    live = (slot >= 0) & (slot < slots)
    slot = tl.where(live, slot, 0)
    offset = slot % BLOCK_SIZE
    page_ptr = cache_ptr + (slot // BLOCK_SIZE) * page_stride
    codes_ptr = page_ptr + offset * HALF
    # After the planes of codes those of 2 bytes: K scale, K zero, V scale, V zero.
    parameter_ptr = (page_ptr + 2 * BLOCK_SIZE * HALF + 2 * offset).to(
        tl.pointer_type(tl.int16)
    )
    store_heads(
        low,
        high,
        finite,
        live,
        codes_ptr,
        parameter_ptr,
        parameter_ptr + BLOCK_SIZE,
        HALF,
        PADDED_HALF,
    )
    low, high, finite = load_halves(
        value_ptr, there, table_ptr, HALF, PADDED, PADDED_HALF, False
    )
    store_heads(
        low,
        high,
        finite,
        live,
        codes_ptr + BLOCK_SIZE * HALF,
        parameter_ptr + 2 * BLOCK_SIZE,
        parameter_ptr + 3 * BLOCK_SIZE,
        HALF,
        PADDED_HALF,
    )


@triton.jit
def store(
    key_ptr,
    value_ptr,
    cache_ptr,
    slot_ptr,
    table_ptr,
    tokens,
    slots,
    key_token_stride,
    key_head_stride,
    value_token_stride,
    value_head_stride,
    page_stride,
    head_stride,
    BLOCK_SIZE: tl.constexpr,
    HALF: tl.constexpr,
    PADDED: tl.constexpr,
    PADDED_HALF: tl.constexpr,
    ROWS: tl.constexpr,
    ROTATE: tl.constexpr,
):
    """ROWS tokens of one KV head a program, grid ``[cdiv(tokens, ROWS), kv_heads]``.

    A slot outside of ``[0, slots)`` is not written.
    """
    token = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    head = tl.program_id(1).to(tl.int64)
    there = token < tokens
    row_ptr = key_ptr + token * key_token_stride + head * key_head_stride
    low, high, finite = load_halves(
        row_ptr, there, table_ptr, HALF, PADDED, PADDED_HALF, ROTATE
    )
    store_tokens(
        low,
        high,
        finite,
        value_ptr + token * value_token_stride + head * value_head_stride,
        there,
        tl.load(slot_ptr + token, mask=there, other=-1).to(tl.int64),
        slots,
        cache_ptr + head * head_stride,
        page_stride,
        table_ptr,
        BLOCK_SIZE,
        HALF,
        PADDED,
        PADDED_HALF,
    )
