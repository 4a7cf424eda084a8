# SPDX-License-Identifier: Apache-2.0
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
"""Triton kernels of KV4 attention: attend, and merge splits."""

import triton
import triton.language as tl

from .splits import LEVELS
from .triton_part import INFINITY, add_sink, fold, part, write_out

LEVEL_1 = tl.constexpr(LEVELS[1][0])
LEVEL_2 = tl.constexpr(LEVELS[2][0])
SIZE_0 = tl.constexpr(LEVELS[0][1])
SIZE_1 = tl.constexpr(LEVELS[1][1])
SIZE_2 = tl.constexpr(LEVELS[2][1])
SPLITS_1 = tl.constexpr(LEVELS[1][0] // LEVELS[0][1])
SPLITS_2 = tl.constexpr(
    LEVELS[1][0] // LEVELS[0][1] + (LEVELS[2][0] - LEVELS[1][0]) // LEVELS[1][1]
)


@triton.jit
def split_of(token):
    """The split that holds a token."""
    return tl.where(
        token < LEVEL_1,
        token // SIZE_0,
        tl.where(
            token < LEVEL_2,
            SPLITS_1 + (token - LEVEL_1) // SIZE_1,
            SPLITS_2 + (token - LEVEL_2) // SIZE_2,
        ),
    )


@triton.jit
def start_of(split):
    """First token of a split."""
    return tl.where(
        split < SPLITS_1,
        split * SIZE_0,
        tl.where(
            split < SPLITS_2,
            LEVEL_1 + (split - SPLITS_1) * SIZE_1,
            LEVEL_2 + (split - SPLITS_2) * SIZE_2,
        ),
    )


@triton.jit
def sequence_of(block, starts_ptr, num_seqs, BLOCK_Q: tl.constexpr):
    """The sequence of a query block, where sequence i has the blocks from
    ``starts[i] // BLOCK_Q + i`` on: at least as many as it needs."""
    low = 0
    high = num_seqs - 1
    while low < high:
        middle = (low + high + 1) // 2
        if tl.load(starts_ptr + middle) // BLOCK_Q + middle <= block:
            low = middle
        else:
            high = middle - 1
    return low


@triton.jit
def attend(
    encoded_ptr,
    sum_ptr,
    factor_ptr,
    cache_ptr,
    table_ptr,
    starts_ptr,
    lengths_ptr,
    sinks_ptr,
    out_ptr,
    partial_ptr,
    peak_ptr,
    total_ptr,
    num_seqs,
    num_heads,
    max_splits,
    window,
    cap_factor,
    encoded_token_stride,
    encoded_head_stride,
    out_token_stride,
    out_head_stride,
    page_stride,
    head_stride,
    table_stride,
    GROUP: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    ROWS: tl.constexpr,
    QUARTER: tl.constexpr,
    PADDED: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TILE: tl.constexpr,
    MODE: tl.constexpr,
    BY_SEQUENCE: tl.constexpr,
    WINDOW: tl.constexpr,
    CAP: tl.constexpr,
    SINKS: tl.constexpr,
    LAZY: tl.constexpr,
    PTX: tl.constexpr,
):
    """Attention of blocks of BLOCK_Q tokens times GROUP heads over one KV head.

    Grid ``[sequences or query blocks, kv_heads, programs over splits]``. MODE:
    ``partial`` writes each split for ``merge``; ``fold`` merges splits itself, to the
    same bits; ``whole`` does not cut the context.
    """
    head = tl.program_id(1)
    if BY_SEQUENCE:
        seq = tl.program_id(0)
    else:
        seq = sequence_of(tl.program_id(0), starts_ptr, num_seqs, BLOCK_Q)
    start = tl.load(starts_ptr + seq)
    count = tl.load(starts_ptr + seq + 1) - start
    context = tl.load(lengths_ptr + seq) - count
    if BY_SEQUENCE:
        block = 0
        last_block = tl.cdiv(count, BLOCK_Q)
    else:
        block = tl.program_id(0) - (start // BLOCK_Q + seq)
        last_block = tl.minimum(block + 1, tl.cdiv(count, BLOCK_Q))
    cache_ptr += tl.cast(head, tl.int64) * head_stride
    table_ptr += tl.cast(seq, tl.int64) * table_stride
    row = tl.arange(0, ROWS)
    column = tl.arange(0, PADDED)
    while block < last_block:
        local = block * BLOCK_Q + row // GROUP
        live = (row < BLOCK_Q * GROUP) & (local < count)
        token = (start + local).to(tl.int64)
        query_head = head * GROUP + row % GROUP
        index = token * num_heads + query_head
        mask = live[:, None] & (column < QUARTER)[None, :]
        place = token * encoded_token_stride + query_head * encoded_head_stride
        query_ptr = encoded_ptr + place[:, None] + column[None, :]
        qa = tl.load(query_ptr, mask=mask, other=0.0)
        qb = tl.load(query_ptr + QUARTER, mask=mask, other=0.0)
        qc = tl.load(query_ptr + 2 * QUARTER, mask=mask, other=0.0)
        qd = tl.load(query_ptr + 3 * QUARTER, mask=mask, other=0.0)
        factor = tl.load(factor_ptr + index, mask=live, other=0.0)
        query_sum = tl.load(sum_ptr + index, mask=live, other=0.0) * factor
        position = context + local
        end = context + tl.minimum(count, (block + 1) * BLOCK_Q)
        begin = 0
        if WINDOW:
            begin = tl.maximum(context + block * BLOCK_Q - window + 1, 0)
            begin = begin // TILE * TILE
        if MODE == "whole":
            peak, total, a, b, c, d = part(
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
                QUARTER,
                PADDED,
                BLOCK_SIZE,
                TILE,
                WINDOW,
                CAP,
                LAZY,
                PTX,
            )
        else:
            peak = tl.full((ROWS,), -INFINITY, tl.float32)
            total = tl.zeros((ROWS,), tl.float32)
            a = tl.zeros((ROWS, PADDED), tl.float32)
            b = tl.zeros((ROWS, PADDED), tl.float32)
            c = tl.zeros((ROWS, PADDED), tl.float32)
            d = tl.zeros((ROWS, PADDED), tl.float32)
            split = split_of(begin) + tl.program_id(2)
            while (split <= split_of(end - 1)) & (end > 0):
                peak_2, total_2, a_2, b_2, c_2, d_2 = part(
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
                    tl.maximum(start_of(split), begin),
                    tl.minimum(start_of(split + 1), end),
                    window,
                    cap_factor,
                    QUARTER,
                    PADDED,
                    BLOCK_SIZE,
                    TILE,
                    WINDOW,
                    CAP,
                    LAZY,
                    PTX,
                )
                if MODE == "fold":
                    peak, total, a, b, c, d = fold(
                        peak, total, a, b, c, d, peak_2, total_2, a_2, b_2, c_2, d_2
                    )
                else:
                    place = index * max_splits + split
                    tl.store(peak_ptr + place, peak_2, mask=live)
                    tl.store(total_ptr + place, total_2, mask=live)
                    value_ptr = partial_ptr + place[:, None] * (4 * QUARTER)
                    value_ptr += column[None, :]
                    tl.store(value_ptr, a_2, mask=mask)
                    tl.store(value_ptr + QUARTER, b_2, mask=mask)
                    tl.store(value_ptr + 2 * QUARTER, c_2, mask=mask)
                    tl.store(value_ptr + 3 * QUARTER, d_2, mask=mask)
                split += tl.num_programs(2)
        if MODE != "partial":
            if SINKS:
                total = add_sink(peak, total, tl.load(sinks_ptr + query_head))
            place = token * out_token_stride + query_head * out_head_stride
            write_out(out_ptr + place, live, total, a, b, c, d, QUARTER, PADDED)
        block += 1


@triton.jit
def merge(
    partial_ptr,
    peak_ptr,
    total_ptr,
    starts_ptr,
    lengths_ptr,
    sinks_ptr,
    out_ptr,
    num_heads,
    max_splits,
    window,
    out_token_stride,
    out_head_stride,
    QUARTER: tl.constexpr,
    PADDED: tl.constexpr,
    WINDOW: tl.constexpr,
    SINKS: tl.constexpr,
    AHEAD: tl.constexpr,
):
    """Merge the splits of a sequence's rows in ascending order, AHEAD loaded at once.

    Grid ``[sequences, heads]``.
    """
    seq = tl.program_id(0)
    head = tl.program_id(1)
    start = tl.load(starts_ptr + seq)
    stop = tl.load(starts_ptr + seq + 1)
    context = tl.load(lengths_ptr + seq) - (stop - start)
    one = tl.arange(0, 1)
    column = tl.arange(0, PADDED)[None, :]
    for row in range(start, stop):
        position = context + row - start
        first = 0
        if WINDOW:
            first = split_of(tl.maximum(position - window + 1, 0))
        # A position before the sequence sees nothing, and nothing was written for it.
        last = tl.where(position < 0, 0, split_of(tl.cast(position, tl.int32)) + 1)
        place = (tl.cast(row, tl.int64) * num_heads + head) * max_splits
        peak = tl.full((1,), -INFINITY, tl.float32)
        total = tl.zeros((1,), tl.float32)
        a = tl.zeros((1, PADDED), tl.float32)
        b = tl.zeros((1, PADDED), tl.float32)
        c = tl.zeros((1, PADDED), tl.float32)
        d = tl.zeros((1, PADDED), tl.float32)
        for split in range(first, last, AHEAD):
            for i in tl.static_range(AHEAD):
                live = one + (split + i) < last
                index = place + one + (split + i)
                mask = live[:, None] & (column < QUARTER)
                peak_2 = tl.load(peak_ptr + index, mask=live, other=-INFINITY)
                total_2 = tl.load(total_ptr + index, mask=live, other=0.0)
                value_ptr = partial_ptr + index[:, None] * (4 * QUARTER) + column
                a_2 = tl.load(value_ptr, mask=mask, other=0.0)
                b_2 = tl.load(value_ptr + QUARTER, mask=mask, other=0.0)
                c_2 = tl.load(value_ptr + 2 * QUARTER, mask=mask, other=0.0)
                d_2 = tl.load(value_ptr + 3 * QUARTER, mask=mask, other=0.0)
                peak, total, a, b, c, d = fold(
                    peak, total, a, b, c, d, peak_2, total_2, a_2, b_2, c_2, d_2
                )
        if SINKS:
            total = add_sink(peak, total, tl.load(sinks_ptr + head + one))
        place = tl.cast(row, tl.int64) * out_token_stride + head * out_head_stride
        write_out(out_ptr + place + one, one == 0, total, a, b, c, d, QUARTER, PADDED)
