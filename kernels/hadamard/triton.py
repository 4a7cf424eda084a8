# SPDX-License-Identifier: Apache-2.0
"""Hadamard transform on the matrix units of a GPU.

``H_n = L (x) R``: a block is a matrix ``X`` of which ``L X R^T`` is computed with
tables of +1 and -1. Values are split into bfloat16 parts, whose products are exact, and
added in float32: 3 parts are a float32 whole, 2 lose at most 2^-15 of a value. Rows are
scaled by a power of two first, so that no sum overflows.
"""

import functools
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from ..gpu.target import INTERPRETED
from .matrices import factor, matrix
from .reference import check_blocks

# The interpreter multiplies the bit patterns of bfloat16.
DOT = tl.float32 if INTERPRETED else tl.bfloat16
DIRECT = 128
# Rows and columns that a product has at least.
SMALLEST = 16
# What the sides of the left table are multiples of, where a row is taken in tiles: a
# larger one takes several steps. The right table is no larger.
TABLE_BLOCK = 64
# Elements of the tiles of a row that registers hold until all are known.
LARGEST_KEPT = 1 << 14
LARGEST_KEPT_WIDE = 1 << 15
# Elements of a tile, fewer where it is transformed on both sides on chips whose matrix
# units take operands from registers alone: more would spill.
LARGEST_TILE = 1 << 14
LARGEST_TWO_SIDED = 1 << 13
WIDE = {"sm_90", "sm_100", "sm_103", "gfx942", "gfx950", "interpreter"}


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
    """The tile of a row of n elements, None where ``blocks_of`` is for it.

    Args:
        n, order, stride, transpose: of the transform.
        device: that the tables are for.
        arch: of the device (see ``gpu/target.py``).

    Raises:
        ValueError: for an unknown order, or blocks that do not divide n.
    """
    check_blocks(n, order, stride)
    _, power = factor(order)
    if stride == 1 and order > DIRECT and n > order:
        return None
    if stride > 1:
        columns, left_order, right_order = stride, order, 1
    elif order <= DIRECT:
        columns, left_order, right_order = order, 1, order
    else:
        columns = right_order = min(DIRECT, power)
        left_order = order // columns
    rows = n // columns
    padded = _padded(rows), _padded(columns)
    two_sided = left_order > 1 and right_order > 1
    largest = LARGEST_TWO_SIDED if two_sided and arch not in WIDE else LARGEST_TILE
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
class Blocks:
    """A row that is taken in tiles, with the columns of its blocks side by side.

    Attributes:
        left: order of the left table, rows of a block.
        inner: columns of a block.
        left_table: bfloat16, transposed, padded with zeros to multiples of TABLE_BLOCK.
        right_table: bfloat16, transposed, of one block or of more; None where nothing
            is multiplied from the right.
        block_m, block_c: rows and columns of a tile, powers of two.
        kept: whether the tiles of a row fit the registers of a program together.
    """

    left: int
    inner: int
    left_table: torch.Tensor
    right_table: torch.Tensor | None
    block_m: int
    block_c: int
    kept: bool


@functools.lru_cache(maxsize=256)
def blocks_of(
    n: int, order: int, stride: int, transpose: bool, device: torch.device, arch: str
) -> Blocks:
    """The blocks of a row of any size; arguments and errors as of ``tile_of``."""
    check_blocks(n, order, stride)
    right = 1 if stride > 1 else _right_order(order)
    left, right_table = order // right, None
    if right > 1:
        # A product has SMALLEST columns: of several blocks where one has fewer.
        several = torch.eye(max(1, SMALLEST // right), dtype=torch.int8, device="cpu")
        values = torch.kron(several, _oriented(right, not transpose))
        right_table = _table(values, len(values), device)
    columns, block_m = n // left, _block_m(left)
    steps = -(-left // block_m)
    # Several steps take registers of their own, and on some chips all of them.
    kept = steps == 1 or (arch in WIDE and right < TABLE_BLOCK)
    largest = LARGEST_KEPT_WIDE if arch in WIDE else LARGEST_KEPT
    kept = kept and steps * block_m * columns <= largest
    block_m = block_m if kept else min(block_m, 32)
    block_c = (8192 if kept and steps == 1 else 4096) // block_m
    block_c = min(_padded(columns), max(SMALLEST, right, block_c))
    size = -(-left // TABLE_BLOCK) * TABLE_BLOCK
    return Blocks(
        left,
        max(stride, right),
        _table(_oriented(left, transpose).t(), size, device),
        right_table,
        block_m,
        block_c,
        kept,
    )


def _right_order(order: int) -> int:
    """The power of two with the fewest products, of those that padding adds too."""
    _, power = factor(order)

    def cost(right: int) -> float:
        left = order // right
        padded = -(-left // _block_m(left)) * _block_m(left)
        return padded / left * (padded + max(SMALLEST, right))

    orders = (1 << i for i in range(min(TABLE_BLOCK, power).bit_length()))
    return min(reversed(list(orders)), key=cost)


def _block_m(left: int) -> int:
    return min(TABLE_BLOCK, _padded(left))


def scaling(order: int) -> tuple[float, float]:
    """Power of two before a transform, and the factor after it."""
    exponent = (order - 1).bit_length()
    return 2.0**-exponent, 2.0**exponent * order**-0.5


def _padded(size: int) -> int:
    return max(SMALLEST, triton.next_power_of_2(size))


def _oriented(order: int, transpose: bool) -> torch.Tensor:
    h = matrix(order)
    return h.t().contiguous() if transpose else h


def _table(values: torch.Tensor, size: int, device: torch.device) -> torch.Tensor:
    """bfloat16 with zero rows and columns up to a size."""
    table = torch.zeros((size, size), dtype=torch.bfloat16, device="cpu")
    table[: len(values), : len(values)] = values
    return table.to(device)
