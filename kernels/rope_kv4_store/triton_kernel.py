# SPDX-License-Identifier: Apache-2.0
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
"""Triton kernel that rotates queries and keys by their positions and stores K and V.

Launched without fused multiply-adds, as the store, whose bytes it writes.
"""

import triton
import triton.language as tl

from ..kv4_store.triton_kernel import store_tokens, transformed


@triton.jit
def nearest(x, dtype: tl.constexpr):
    """float32 values that a dtype holds: to nearest, ties to even.

    The interpreter truncates to bfloat16; what is a bfloat16 already converts exactly.
    """
    if dtype == tl.bfloat16:
        bits = x.to(tl.int32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000
        x = tl.where(x == x, bits.to(tl.float32, bitcast=True), x)
    return x.to(dtype).to(tl.float32)


@triton.jit
def rope(row_ptr, cos_ptr, there, known, HALF: tl.constexpr, PADDED_HALF: tl.constexpr):
    """Rotate heads in place, and return what was written as float32 halves.

    Args:
        row_ptr: pointers ``[rows]`` to the first element of a head.
        cos_ptr: pointers ``[rows]`` to the cosines of a position; sines follow.
        there: which rows exist; others are zeros.
        known: which positions exist; the rows of others become NaN.
    """
    dtype: tl.constexpr = row_ptr.dtype.element_ty
    column = tl.arange(0, PADDED_HALF)
    inside = there[:, None] & (column < HALF)[None, :]
    at = row_ptr[:, None] + column[None, :]
    low = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    high = tl.load(at + HALF, mask=inside, other=0.0).to(tl.float32)
    angle = cos_ptr[:, None] + column[None, :]
    exists = inside & known[:, None]
    cos = tl.load(angle, mask=exists, other=0.0).to(tl.float32)
    sin = tl.load(angle + HALF, mask=exists, other=0.0).to(tl.float32)
    cos = tl.where(inside & ~known[:, None], float("nan"), cos)
    first = nearest(low * cos - high * sin, dtype)
    second = nearest(high * cos + low * sin, dtype)
    tl.store(at, first.to(dtype), mask=inside)
    tl.store(at + HALF, second.to(dtype), mask=inside)
    return first, second


@triton.jit
def rope_store(
    query_ptr,
    key_ptr,
    value_ptr,
    position_ptr,
    cos_ptr,
    cache_ptr,
    slot_ptr,
    table_ptr,
    tokens,
    stored,
    positions,
    slots,
    kv_heads,
    query_token_stride,
    query_head_stride,
    key_token_stride,
    key_head_stride,
    value_token_stride,
    value_head_stride,
    position_stride,
    page_stride,
    head_stride,
    BLOCK_SIZE: tl.constexpr,
    HALF: tl.constexpr,
    PADDED: tl.constexpr,
    PADDED_HALF: tl.constexpr,
    ROWS: tl.constexpr,
    ROTATE: tl.constexpr,
):
    """ROWS tokens of one head a program, KV heads first: they take longer.

    Grid ``[cdiv(tokens, ROWS), kv_heads + heads]``. The first ``stored`` tokens have
    slots; a slot outside of ``[0, slots)`` is not written.
    """
    token = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    head = tl.program_id(1).to(tl.int64)
    there = token < tokens
    position = tl.load(position_ptr + token, mask=there, other=0).to(tl.int64)
    known = (position >= 0) & (position < positions)
    angle_ptr = cos_ptr + tl.where(known, position, 0) * position_stride
    if head < kv_heads:
        row_ptr = key_ptr + token * key_token_stride + head * key_head_stride
        low, high = rope(row_ptr, angle_ptr, there, known, HALF, PADDED_HALF)
        low, high, finite = transformed(
            low, high, table_ptr, HALF, PADDED, PADDED_HALF, ROTATE
        )
        slot = tl.load(slot_ptr + token, mask=token < stored, other=-1)
        store_tokens(
            low,
            high,
            finite,
            value_ptr + token * value_token_stride + head * value_head_stride,
            there,
            slot.to(tl.int64),
            slots,
            cache_ptr + head * head_stride,
            page_stride,
            table_ptr,
            BLOCK_SIZE,
            HALF,
            PADDED,
            PADDED_HALF,
        )
    else:
        row_ptr = query_ptr + token * query_token_stride
        row_ptr += (head - kv_heads) * query_head_stride
        rope(row_ptr, angle_ptr, there, known, HALF, PADDED_HALF)
