# SPDX-License-Identifier: Apache-2.0
"""Products with tables of +1 and -1, and the kernel of ``hadamard/triton.py``."""

import triton
import triton.language as tl


@triton.jit
def add_product(
    total, left, right, SPLIT: tl.constexpr, PARTS: tl.constexpr, DOT: tl.constexpr
):
    """``total + left @ right``, one a table and the other float32 in bfloat16 parts.

    A part is the upper half of what is left of a value, and the last one is rounded:
    without conversions, which are slow, and an Inf or NaN stays one.

    Args:
        SPLIT: which is split, 0 for left and 1 for right.
    """
    values = right if SPLIT else left
    for index in tl.static_range(PARTS):
        bits = values.to(tl.int32, bitcast=True)
        if index > 0 and index == PARTS - 1:
            bits += 0x8000
        part = (bits & -65536).to(tl.float32, bitcast=True)
        values = values - part
        half = part if tl.float32 == DOT else _upper(bits)
        if SPLIT:
            total = tl.dot(left.to(DOT), half, total)
        else:
            total = tl.dot(half, right.to(DOT), total)
    return total


@triton.jit
def _upper(bits):
    return (bits >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True)
