# SPDX-License-Identifier: Apache-2.0
"""Hadamard transform on the matrix units of a GPU.

``H_n = L (x) R``: a block is a matrix ``X`` of which ``L X R^T`` is computed with
tables of +1 and -1. Values are split into bfloat16 parts, whose products are exact, and
added in float32: 3 parts are a float32 whole, 2 lose 2^-17 of a value. Rows are scaled
by a power of two first, so that no sum overflows.
"""

import functools
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from ..gpu.checks import check_tensor
from ..gpu.target import INTERPRETED
from .matrices import factor, matrix
from .reference import check_blocks
from .triton_kernel import factor_kernel

# The interpreter multiplies the bit patterns of bfloat16.
DOT = tl.float32 if INTERPRETED else tl.bfloat16
DIRECT = 128
LARGEST_FACTOR = 256
# Elements of a tile that is transformed on one side, and on both: more would spill
# registers on chips whose matrix units take operands from registers alone.
LARGEST_TILE = 1 << 15
LARGEST_TWO_SIDED = 1 << 13
WIDE = {"sm_90", "sm_100", "sm_103", "gfx942", "gfx950", "interpreter"}
LARGEST_TWO_SIDED_WIDE = 1 << 14


@dataclass(frozen=True)
class Tile:
    """A row as one matrix whose transform fits a block of threads.

    Attributes:
        rows, columns: of the matrix; rows times columns is the row's size.
        left: bfloat16 ``[padded rows, padded rows]`` or None.
        right: bfloat16 ``[padded columns, padded columns]``, transposed, or None.
        padded: sizes of the tile, powers of two, at least 16.
    """

    rows: int
    columns: int
    left: torch.Tensor | None
    right: torch.Tensor | None
    padded: tuple[int, int]


@functools.lru_cache(maxsize=256)
def tile_of(
    n: int, order: int, stride: int, transpose: bool, device: torch.device, arch: str
) -> Tile | None:
    """The tile of a row of n elements, None when it is too large for one.

    Args:
        n, order, stride, transpose: of the transform.
        device: that the tables are for.
        arch: of the device (see ``gpu/target.py``).

    Raises:
        ValueError: for an unknown order, or blocks that do not divide n.
    """
    check_blocks(n, order, stride)
    _, power = factor(order)
    if stride > 1:
        columns, left_order, right_order = stride, order, 1
    elif order <= DIRECT:
        columns, left_order, right_order = order, 1, order
    else:
        columns = right_order = min(DIRECT, power)
        left_order = order // columns
    rows = n // columns
    padded = _padded(rows), _padded(columns)
    largest = LARGEST_TILE
    if left_order > 1 and right_order > 1:
        largest = LARGEST_TWO_SIDED_WIDE if arch in WIDE else LARGEST_TWO_SIDED
    if padded[0] * padded[1] > largest:
        return None
    if padded[1] > DIRECT or (left_order > 1 and padded[0] > DIRECT):
        return None
    left = right = None
    if left_order > 1:
        blocks = torch.eye(rows // left_order, dtype=torch.int8, device="cpu")
        h = _oriented(left_order, transpose)
        left = _table(torch.kron(blocks, h), padded[0], device)
    if right_order > 1:
        right = _table(_oriented(right_order, transpose).t(), padded[1], device)
    return Tile(rows, columns, left, right, padded)


@dataclass(frozen=True)
class Factor:
    """One pass of a transform: ``order`` elements ``stride`` apart.

    Attributes:
        order: of the factor.
        stride: between its elements.
        table: bfloat16, padded to multiples of 64.
    """

    order: int
    stride: int
    table: torch.Tensor


@functools.lru_cache(maxsize=256)
def factors_of(
    order: int, stride: int, transpose: bool, device: torch.device
) -> tuple[Factor, ...]:
    """Passes that together are a transform, the innermost first."""
    core, power = factor(order)
    found = []
    while power > 1 and core * power > LARGEST_FACTOR:
        part = min(DIRECT, power)
        found.append((part, stride))
        power, stride = power // part, stride * part
    found.append((core * power, stride))
    return tuple(
        Factor(
            part,
            step,
            _table(_oriented(part, transpose), -(-part // 64) * 64, device),
        )
        for part, step in found
        if part > 1
    )


def scaling(order: int) -> tuple[float, float]:
    """Power of two before a transform, and the factor after it."""
    exponent = (order - 1).bit_length()
    return 2.0**-exponent, 2.0**exponent * order**-0.5


def hadamard(
    x: torch.Tensor, order: int, stride: int = 1, *, transpose: bool = False
) -> torch.Tensor:
    """Transform of contiguous float32 rows of any size: a pass over memory a factor.

    Arguments as in the reference.

    Raises:
        ValueError: for x of another form, an unknown order, or blocks that do not
            divide the last dimension.
    """
    check_tensor(x, "x", (torch.float32,), (None, None))
    check_blocks(x.shape[1], order, stride)
    if x.numel() == 0:
        return x
    for part in factors_of(order, stride, transpose, x.device):
        y = torch.empty_like(x)
        columns = x.numel() // part.order
        size = part.table.shape[0]
        before, after = scaling(part.order)
        factor_kernel[(triton.cdiv(columns, 64), size // 64)](
            x,
            y,
            part.table,
            columns,
            before,
            after,
            ORDER=part.order,
            STRIDE=part.stride,
            SIZE=size,
            BLOCK=64,
            DOT=DOT,
            num_warps=8,
            num_stages=2,
        )
        x = y
    return x


def _padded(size: int) -> int:
    return max(16, triton.next_power_of_2(size))


def _oriented(order: int, transpose: bool) -> torch.Tensor:
    h = matrix(order)
    return h.t() if transpose else h


def _table(values: torch.Tensor, size: int, device: torch.device) -> torch.Tensor:
    """bfloat16 with zero rows and columns up to a size."""
    table = torch.zeros((size, size), dtype=torch.bfloat16, device="cpu")
    table[: len(values), : len(values)] = values
    return table.to(device)
