# SPDX-License-Identifier: Apache-2.0
"""The end of a linear: from sums to outputs, shared by the GEMMs and by split-K."""

import triton
import triton.language as tl


@triton.jit
def epilogue(
    total,
    token_ptr,
    bias_ptr,
    rows,
    columns,
    TOKEN: tl.constexpr,
    BIAS: tl.constexpr,
):
    """Token scale and bias of a float32 tile; the order is that of the reference.

    Args:
        total: float32 ``[BM, BN]``.
        token_ptr: float32, one per row, when TOKEN.
        bias_ptr: any float, one per column, when BIAS.
        rows: of the tile, within bounds.
        columns: of the tile, within bounds.
    """
    if TOKEN:
        total = total * tl.load(token_ptr + rows)[:, None]
    if BIAS:
        total = total + tl.load(bias_ptr + columns).to(tl.float32)[None, :]
    return total


@triton.jit
def reduce_parts(
    part_ptr,
    out_ptr,
    token_ptr,
    zero_ptr,
    scale_ptr,
    sum_ptr,
    bias_ptr,
    M,
    N,
    PARTS: tl.constexpr,
    INTEGER: tl.constexpr,
    CHANNEL: tl.constexpr,
    TOKEN: tl.constexpr,
    ZERO: tl.constexpr,
    BIAS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Add the parts ``[PARTS, M, N]`` of split-K in ascending order and finish.

    int32 parts when INTEGER (their sum is exact), else float32. CHANNEL applies the
    one scale of a channel, ZERO the zero point of tokens times the sums of the weight.
    """
    row = tl.program_id(0)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = columns < N
    inside = tl.where(mask, columns, 0)
    at = tl.cast(row, tl.int64) * N + inside
    size = tl.cast(M, tl.int64) * N
    acc = tl.load(part_ptr + at)
    for part in tl.static_range(1, PARTS):
        acc += tl.load(part_ptr + part * size + at)
    if ZERO:
        acc -= tl.load(zero_ptr + row) * tl.load(sum_ptr + inside)
    total = acc.to(tl.float32) if INTEGER else acc
    if CHANNEL:
        total = total * tl.load(scale_ptr + inside)
    if TOKEN:
        total = total * tl.load(token_ptr + row)
    if BIAS:
        total = total + tl.load(bias_ptr + inside).to(tl.float32)
    tl.store(out_ptr + at, total.to(out_ptr.dtype.element_ty), mask=mask)
