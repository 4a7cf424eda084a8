# SPDX-License-Identifier: Apache-2.0
"""Which tile of the output a program makes, with experts or without.

The rows of experts are pairs of a token and one of its experts, sorted by expert. No
tile has rows of two: ``tiles [count, 3]`` holds the expert, the first row and the row
after its expert's last one, of as many tiles as there can be. Those that are not needed
have the expert -1, so the grid does not depend on where tokens went.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl


class Sent(NamedTuple):
    """Where tokens go.

    Attributes:
        rows: int64 ``[pairs]``, the token of each pair, in the order of experts.
        offsets: int32 ``[experts + 1]``, pairs of expert e are
            ``offsets[e]:offsets[e + 1]``.
    """

    rows: torch.Tensor
    offsets: torch.Tensor

    @property
    def experts(self) -> int:
        return len(self.offsets) - 1


class RowTiles(NamedTuple):
    """How many tiles there are along the rows, and with experts token and place of
    each row."""

    number: int
    tokens: torch.Tensor | None = None
    table: torch.Tensor | None = None


def row_tiles(m: int, block_m: int, sent: Sent | None) -> RowTiles:
    """Tiles of m rows, sent to experts or not."""
    if sent is None:
        return RowTiles(-(-m // block_m))
    table = tiles_of(sent.offsets, m, block_m)
    return RowTiles(len(table), sent.rows, table)


def tiles_of(offsets: torch.Tensor, pairs: int, block_m: int) -> torch.Tensor:
    """The tiles of every expert; looks at no value on the host.

    Args:
        offsets: int32 ``[experts + 1]``, rows of expert e are
            ``offsets[e]:offsets[e + 1]``.
        pairs: number of rows.
        block_m: rows of a tile.

    Returns:
        int32 ``[ceil(pairs / block_m) + experts, 3]``.
    """
    experts = len(offsets) - 1
    needed = (offsets[1:] - offsets[:-1] + block_m - 1) // block_m
    ends = needed.cumsum(0)
    tile = torch.arange(-(-pairs // block_m) + experts, device=offsets.device)
    expert = torch.searchsorted(ends, tile, right=True)
    own = expert.clamp(max=experts - 1)
    first = offsets[own] + (tile - (ends - needed)[own]) * block_m
    expert = torch.where(expert < experts, expert, -1)
    return torch.stack((expert, first, offsets[own + 1]), dim=1).int()


@triton.jit
def place_of(
    M,
    N,
    experts,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    EXPERTS: tl.constexpr,
):
    """Row and column of this program's tile; those that share weights run together."""
    tiles_m = tl.cdiv(M, BLOCK_M)
    if EXPERTS:
        tiles_m += experts
    band = 8 * tl.cdiv(N, BLOCK_N)
    first = tl.program_id(0) // band * 8
    height = tl.minimum(tiles_m - first, 8)
    tile_m = first + tl.program_id(0) % band % height
    tile_n = tl.program_id(0) % band // height
    return tile_m, tile_n


@triton.jit
def rows_of(tiles_ptr, tile_m, M, BLOCK_M: tl.constexpr, EXPERTS: tl.constexpr):
    """Rows of a tile, the first row that is not its, and its expert."""
    if EXPERTS:
        expert = tl.load(tiles_ptr + 3 * tile_m)
        first = tl.load(tiles_ptr + 3 * tile_m + 1)
        end = tl.load(tiles_ptr + 3 * tile_m + 2)
    else:
        expert = 0
        first = tile_m * BLOCK_M
        end = M
    return first + tl.arange(0, BLOCK_M), end, expert
