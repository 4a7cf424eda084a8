# SPDX-License-Identifier: Apache-2.0
"""Launch configurations of the linears: one JSON table per chip, in ``configs/``.

``{operator: {scheme: [rows]}}``: the first row that is for the weight and the number of
tokens is taken; the last is for any. Schemes are ``channel`` and ``group`` (one scale,
or several, along the input). A chip without a table takes ``other.json``, which fits
every chip.
"""

import functools
import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

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
        registers: most of a thread on NVIDIA's chips. None leaves it to ptxas, which
            spills a few where that makes room for one more block.
    """

    block_m: int
    block_n: int
    warps: int
    stages: int
    swap: bool
    split_k: int = 1
    e4m3: bool = False
    registers: int | None = None

    def options(self) -> dict[str, int]:
        """Of the launch."""
        limit = {} if self.registers is None else {"maxnreg": self.registers}
        return {"num_warps": self.warps, "num_stages": self.stages, **limit}


class Weight(NamedTuple):
    """What a configuration depends on of a weight, and of tokens that it multiplies.

    Attributes:
        bits: stored width.
        group_size: columns of a group, 0 for one scale a channel.
        zeros: whether it has zero points.
        token_groups: whether tokens have a scale and a zero point for each of its
            groups, else one (linear_w4a4).
    """

    bits: int
    group_size: int
    zeros: bool
    token_groups: bool = False

    @property
    def scheme(self) -> str:
        return "group" if self.group_size else "channel"


@dataclass(frozen=True)
class Row:
    """A configuration and what it is for.

    Attributes:
        max_m: most tokens, None for any number.
        config: of the launch.
        bits: stored widths of the weight, None for all.
        groups: sizes of the weight's groups, None for any.
        zeros: whether the weight has zero points, None for either.
        token_groups: whether tokens have scales for each group, None for either.
    """

    max_m: int | None
    config: LinearConfig
    bits: tuple[int, ...] | None = None
    groups: tuple[int, ...] | None = None
    zeros: bool | None = None
    token_groups: bool | None = None

    def takes(self, weight: Weight) -> bool:
        """Whether it is for a weight, with some number of tokens."""
        return (
            (self.bits is None or weight.bits in self.bits)
            and (self.groups is None or weight.group_size in self.groups)
            and self.zeros in (None, weight.zeros)
            and self.token_groups in (None, weight.token_groups)
        )


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


def choose(
    arch: str, operator: str, weight: Weight, m: int, experts: int = 0
) -> LinearConfig:
    """The configuration for m rows.

    Args:
        arch: of the chip.
        operator: ``linear_w4a4`` or ``linear_wna16``.
        weight: that they are multiplied with.
        m: tokens, or with experts pairs of a token and one of its experts.
        experts: that pairs go to, taken to be as many for each; 0 for one weight.
    """
    if experts:
        rows, m = rows_for_experts(arch, operator, weight.scheme), -(-m // experts)
    else:
        rows = table(arch)[operator][weight.scheme]
    return next(
        row.config
        for row in rows_of(rows, weight)
        if row.max_m is None or m <= row.max_m
    )


def rows_for_experts(arch: str, operator: str, scheme: str) -> tuple[Row, ...]:
    """Rows of an operator where its tokens go to experts.

    Those of ``linear_experts_w4a4`` for ``linear_w4a4`` and so on, where a table has
    them: an expert's tile holds its rows' numbers, which takes registers.
    """
    of_experts = operator.replace("linear_", "linear_experts_")
    own = table(arch).get(of_experts, {}).get(scheme)
    return own or table(arch)[operator][scheme]


def rows_of(rows: tuple[Row, ...], weight: Weight) -> tuple[Row, ...]:
    """Those that some number of tokens takes with a weight."""
    taken: list[Row] = []
    most = 0
    for row in rows:
        if not row.takes(weight):
            continue
        if row.max_m is None:
            return (*taken, row)
        if row.max_m > most:
            taken.append(row)
            most = row.max_m
    return tuple(taken)


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
    for name in ("bits", "groups"):
        if name in entry:
            entry[name] = tuple(entry[name])
    own = {f.name: entry.pop(f.name) for f in fields(Row) if f.name in entry}
    return Row(config=LinearConfig(**entry), **own)


def entry(row: Row) -> dict[str, Any]:
    """A row as it is in a table's file."""
    conditions = {
        "bits": row.bits,
        "groups": row.groups,
        "zeros": row.zeros,
        "token_groups": row.token_groups,
    }
    return {
        "max_m": row.max_m,
        **{k: v for k, v in conditions.items() if v is not None},
        **asdict(row.config),
    }
