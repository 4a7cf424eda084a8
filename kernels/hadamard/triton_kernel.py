# SPDX-License-Identifier: Apache-2.0
"""Products with tables of +1 and -1, and the kernel of ``hadamard/triton.py``."""

import triton
import triton.language as tl


@triton.jit
def left_product(table, values, PARTS: tl.constexpr, DOT: tl.constexpr):
    """``table @ values`` of float32 values in bfloat16 parts."""
    part = values.to(tl.bfloat16)
    total = tl.dot(table.to(DOT), part.to(DOT))
    for _ in tl.static_range(1, PARTS):
        values = values - part.to(tl.float32)
        part = values.to(tl.bfloat16)
        total = tl.dot(table.to(DOT), part.to(DOT), total)
    return total


@triton.jit
def right_product(values, table, PARTS: tl.constexpr, DOT: tl.constexpr):
    """``values @ table``, likewise."""
    part = values.to(tl.bfloat16)
    total = tl.dot(part.to(DOT), table.to(DOT))
    for _ in tl.static_range(1, PARTS):
        values = values - part.to(tl.float32)
        part = values.to(tl.bfloat16)
        total = tl.dot(part.to(DOT), table.to(DOT), total)
    return total


@triton.jit
def factor_kernel(
    x_ptr,
    y_ptr,
    table_ptr,
    columns,
    before,
    after,
    ORDER: tl.constexpr,
    STRIDE: tl.constexpr,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    DOT: tl.constexpr,
):
    """One factor of a transform of contiguous float32 rows.

    x is ``[blocks, ORDER, STRIDE]`` with ``columns = blocks * STRIDE``; SIZE is that of
    the padded table.
    """
    out = tl.program_id(1) * 64 + tl.arange(0, 64)
    column = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    exists = (column < columns)[None, :]
    base = (column // STRIDE * (ORDER * STRIDE) + column % STRIDE)[None, :]
    total = tl.zeros((64, BLOCK), tl.float32)
    for start in range(0, SIZE, 64):
        index = start + tl.arange(0, 64)
        table = tl.load(table_ptr + out[:, None] * SIZE + index[None, :])
        mask = exists & (index < ORDER)[:, None]
        x = tl.load(x_ptr + base + index[:, None] * STRIDE, mask=mask, other=0.0)
        total += left_product(table, x * before, 3, DOT)
    mask = exists & (out < ORDER)[:, None]
    tl.store(y_ptr + base + out[:, None] * STRIDE, total * after, mask=mask)
