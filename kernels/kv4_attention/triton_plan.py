# SPDX-License-Identifier: Apache-2.0
"""Tiles and grids of the Triton attention, from what the host knows of a call."""

from dataclasses import dataclass

from ..kv4_store.triton import next_power_of_two
from .splits import split_count

# Rows (tokens times heads of a group) of one tile.
DECODE_ROWS = 16
# Cached tokens of a turn of a decode, on NVIDIA's chips.
TILE = 64


def most_rows(head_dim: int) -> int:
    """Of a tile, which long queries fill: as many as registers hold."""
    return 64 if head_dim <= 128 else DECODE_ROWS


@dataclass(frozen=True)
class Tile:
    """Launch configuration of ``attend``.

    Attributes:
        rows: query rows of a program, tokens times heads of a group.
        tokens: cached tokens of an iteration.
        warps: of a program.
        stages: of the loop's pipeline.
        lazy: add sums over tokens after the loop, from a sum for each column.
        registers: that a thread may have; None leaves it to the compiler.
    """

    rows: int
    tokens: int
    warps: int
    stages: int
    lazy: bool
    registers: int | None

    def options(self) -> dict[str, int]:
        """Those of the launch that are not arguments of the kernel."""
        options = {"num_warps": self.warps, "num_stages": self.stages}
        if self.registers is not None:
            options["maxnreg"] = self.registers
        return options


def tile_of(
    rows: int, head_dim: int, arch: str, mode: str, window: bool, block_size: int
) -> Tile:
    """The configuration for so many query rows; offline compilation chose it.

    Triton gives the warps of a product the columns of 16 rows, but the rows where there
    are more of those; with too few of either they would repeat each other's work.
    """
    amd = arch.startswith("gfx")
    padded = next_power_of_two(head_dim) != head_dim
    # Left to itself ptxas spills a few registers here, for one more resident program.
    crowded = (
        mode == "whole"
        or arch == "sm_120"
        or (head_dim == 64 and rows == DECODE_ROWS)
        or (padded and (mode == "fold" or rows > DECODE_ROWS))
        or (head_dim != 128 and (window or block_size < TILE))
    )
    registers = 255 if crowded and arch.startswith("sm_") else None
    if rows > DECODE_ROWS:
        return Tile(rows, 32, rows // 16, 2, False, registers)
    if head_dim == 64:
        return Tile(rows, 32 if amd else TILE, 1, 2 if amd else 3, False, registers)
    if amd:
        return Tile(rows, 32, 2, 2, False, registers)
    return Tile(rows, TILE, 4, 3, True, registers)


@dataclass(frozen=True)
class Plan:
    """How a call is launched, from what the host knows of it.

    Attributes:
        tile: of ``attend``.
        block_q: tokens of a program.
        by_sequence: whether a program takes all of a sequence's blocks.
        mode: of ``attend``.
        max_splits: splits that a context may have.
        grid: of ``attend``.
    """

    tile: Tile
    block_q: int
    by_sequence: bool
    mode: str
    max_splits: int
    grid: tuple[int, int, int]


def plan(
    tokens: int,
    num_seqs: int,
    group: int,
    kv_heads: int,
    head_dim: int,
    max_seq_len: int,
    split_rows: int,
    programs: int,
    arch: str,
    window: bool,
    block_size: int,
) -> Plan:
    """Choose tiles and grid.

    Args:
        tokens: query rows of the whole batch.
        group: query heads of a KV head.
        max_seq_len: most tokens that a row of the block table can name.
        split_rows: most tokens whose splits have room in the workspace.
        programs: that fill the device.
        window: whether rows see a part of their context only.
        block_size: tokens of a page.
    """
    wanted = -(-tokens // num_seqs) * group
    rows = min(most_rows(head_dim), max(DECODE_ROWS, next_power_of_two(wanted)))
    if group > rows:
        rows = next_power_of_two(group)
    short = wanted <= rows
    block_q = rows // group
    blocks = num_seqs if short else tokens // block_q + num_seqs
    max_splits = split_count(max_seq_len)
    mode, over = ("fold" if rows == DECODE_ROWS and short else "whole"), 1
    if tokens <= split_rows and max_splits > 1:
        mode = "partial"
        over = min(max_splits, max(1, -(-programs // (blocks * kv_heads))))
    return Plan(
        tile_of(rows, head_dim, arch, mode, window, block_size),
        block_q,
        short,
        mode,
        max_splits,
        (blocks, kv_heads, over),
    )
