# SPDX-License-Identifier: Apache-2.0
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
"""Triton kernel that encodes the queries of KV4 attention."""

import triton
import triton.language as tl

from ..kv4_store.triton_kernel import load_halves
from .triton_part import LOW_OVER_HIGH, LOW_UNIT

QUERY_EXPONENT = tl.constexpr(15)  # encoded queries stay below 2^15


@triton.jit
def encode_queries(
    query_ptr,
    table_ptr,
    encoded_ptr,
    sum_ptr,
    factor_ptr,
    score_factor,
    rows,
    heads,
    token_stride,
    head_stride,
    encoded_token_stride,
    encoded_head_stride,
    HALF: tl.constexpr,
    PADDED: tl.constexpr,
    PADDED_HALF: tl.constexpr,
    ROWS: tl.constexpr,
    ROTATE: tl.constexpr,
):
    """Rotate queries and round them to fp16 of their own scale, in planes.

    Row ``token * heads + head``; grid ``[cdiv(rows, ROWS)]``. sum and factor are
    float32 ``[rows]``; the planes of high codes are stored divided by 16.
    """
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    live = row < rows
    token, head = row // heads, row % heads
    low, high, finite = load_halves(
        query_ptr + token * token_stride + head * head_stride,
        live,
        table_ptr,
        HALF,
        PADDED,
        PADDED_HALF,
        ROTATE,
    )
    peak = tl.maximum(tl.max(tl.abs(low), axis=1), tl.max(tl.abs(high), axis=1))
    # 2^126 and 2^-126 are the last powers of two that have a normal inverse.
    exponent = (peak.to(tl.int32, bitcast=True) >> 23) - 126
    exponent = tl.minimum(tl.maximum(exponent, QUERY_EXPONENT - 126), 126)
    up = ((-exponent + (QUERY_EXPONENT + 127)) << 23).to(tl.float32, bitcast=True)
    down = ((exponent + (127 - QUERY_EXPONENT)) << 23).to(tl.float32, bitcast=True)
    low = (low * up[:, None]).to(tl.float16)
    high = (high * up[:, None]).to(tl.float16)
    total = tl.sum(low.to(tl.float32), axis=1) + tl.sum(high.to(tl.float32), axis=1)
    tl.store(sum_ptr + row, total * (1.0 / LOW_UNIT), mask=live)
    factor = tl.where(finite, down * LOW_UNIT * score_factor, float("nan"))
    tl.store(factor_ptr + row, factor, mask=live)

    column = tl.arange(0, PADDED_HALF)
    place = token * encoded_token_stride + head * encoded_head_stride
    plane = (column % 2) * (HALF // 2) + column // 2
    at = encoded_ptr + place[:, None] + plane[None, :]
    mask = live[:, None] & (column < HALF)[None, :]
    tl.store(at, low, mask=mask)
    high = (high.to(tl.float32) * LOW_OVER_HIGH).to(tl.float16)
    tl.store(at + HALF, high, mask=mask)
