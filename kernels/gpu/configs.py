# SPDX-License-Identifier: Apache-2.0
"""Launch configurations of the linears: one JSON table per chip, in ``configs/``.

``{operator: {scheme: [rows]}}`` with the rows in ascending ``max_m``; the first whose
``max_m`` is not below the number of tokens is taken, the last has none. Schemes are
``channel`` and ``group`` (one scale, or several, along the input). A chip without a
table takes ``other.json``, which fits every chip.
"""

import functools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TABLES = Path(__file__).parent / "configs"
FALLBACK = "other"
SCHEMES = ("channel", "group")


@dataclass(frozen=True)
class LinearConfig:
    """One launch of a linear.

    Attributes:
        block_m: tokens of a tile.
        block_n: output channels of a tile.
        warps: of a block.
        stages: of the software pipeline.
        swap: multiply weight by activations, so that the weight is the first operand
            (in registers on sm_90) and tokens the narrow side.
        split_k: most parts that the input is cut into; fewer are used when the tiles
            alone fill the chip.
        e4m3: multiply codes of 4 bits as e4m3 numbers, to the same result
            (linear_w4a4, on chips of ``target.E4M3_SUMS``). Wider codes that take a
            table's row are multiplied as int8.
    """

    block_m: int
    block_n: int
    warps: int
    stages: int
    swap: bool
    split_k: int = 1
    e4m3: bool = False


@dataclass(frozen=True)
class Row:
    """A configuration and the most tokens it is for, None for any number."""

    max_m: int | None
    config: LinearConfig


def architectures() -> tuple[str, ...]:
    """Chips that have a table of their own."""
    names = sorted(path.stem for path in TABLES.glob("*.json"))
    return tuple(name for name in names if name != FALLBACK)


@functools.cache
def table(arch: str) -> dict[str, dict[str, tuple[Row, ...]]]:
    """Rows by operator and scheme, of a chip or the fallback."""
    path = TABLES / f"{arch}.json"
    if not path.is_file():
        path = TABLES / f"{FALLBACK}.json"
    return read(path)


def read(path: Path) -> dict[str, dict[str, tuple[Row, ...]]]:
    """Rows by operator and scheme, of a file."""
    content: dict[str, dict[str, list[dict[str, Any]]]] = json.loads(path.read_text())
    return {
        operator: {scheme: tuple(map(_row, rows)) for scheme, rows in schemes.items()}
        for operator, schemes in content.items()
    }


def choose(arch: str, operator: str, scheme: str, m: int) -> LinearConfig:
    """The configuration for m tokens."""
    return _chosen(table(arch)[operator][scheme], m)


def _chosen(rows: tuple[Row, ...], m: int) -> LinearConfig:
    return next(row.config for row in rows if row.max_m is None or m <= row.max_m)


def rows_for_experts(arch: str, operator: str, scheme: str) -> tuple[Row, ...]:
    """Rows of an operator where its tokens go to experts.

    Those of ``linear_experts_w4a4`` for ``linear_w4a4`` and so on, where a table has
    them: an expert's tile holds its rows' numbers, which takes registers.
    """
    of_experts = operator.replace("linear_", "linear_experts_")
    own = table(arch).get(of_experts, {}).get(scheme)
    return own or table(arch)[operator][scheme]


def choose_for_experts(arch: str, operator: str, scheme: str, m: int) -> LinearConfig:
    """The configuration for m tokens of each of many experts."""
    return _chosen(rows_for_experts(arch, operator, scheme), m)


def parts(config: LinearConfig, m: int, n: int, steps: int, processors: int) -> int:
    """Parts that K is cut into: tiles times parts fill the chip about twice.

    Args:
        config: gives the tile and the limit.
        m: tokens.
        n: output channels.
        steps: of the loop over K; a part has at least two.
        processors: of the chip.
    """
    tiles = -(-m // config.block_m) * -(-n // config.block_n)
    wanted = -(-2 * processors // tiles)
    return max(1, min(config.split_k, wanted, steps // 2))


def _row(entry: dict[str, Any]) -> Row:
    entry = dict(entry)
    return Row(entry.pop("max_m"), LinearConfig(**entry))
