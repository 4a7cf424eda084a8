# SPDX-License-Identifier: Apache-2.0
"""A sweep as a table, for the terminal and for sweep.md."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.table import Column, Table

from .plan import Plan, Run
from .store import FLOAT, Record

MISSING = "-"


@dataclass(frozen=True)
class Figure:
    """A column.

    Attributes:
        title: its head.
        of: a record, None where that has none.
        digits: after the point.
    """

    title: str
    of: Callable[[Record], float | None]
    digits: int

    def cell(self, records: Sequence[Record]) -> str:
        """Mean, and the least to the most where they differ."""
        values = [v for record in records if (v := self.of(record)) is not None]
        if not values:
            return MISSING
        mean = math.fsum(values) / len(values)
        shown = [f"{v:.{self.digits}f}" for v in (mean, min(values), max(values))]
        return shown[0] if len(set(shown)) == 1 else "{} ({} to {})".format(*shown)


TEXT = (
    Figure("perplexity", lambda r: r.perplexity, 3),
    Figure("gap", lambda r: r.gap, 4),
)
TASKS = (
    Figure("accuracy", lambda r: None if r.mean is None else r.mean["accuracy"], 4),
)
SECONDS = (Figure("seconds", lambda r: r.calibration_seconds, 0),)


class SweepTable:
    """Rows of a recipe and scheme each, over the seeds that were measured.

    Args:
        plan: whose runs are shown.
        records: of those that were measured as the plan says.
        directory: of the sweep.
    """

    def __init__(
        self, plan: Plan, records: Mapping[str, Record], directory: Path
    ) -> None:
        self.plan, self.directory = plan, directory
        asked = {run.name for run in plan.runs}
        self.records = {n: r for n, r in records.items() if n in asked}
        text = TEXT if plan.evaluation.data is not None else ()
        tasks = TASKS if plan.evaluation.tasks else ()
        self.columns = (*text, *tasks, *SECONDS)

    @property
    def head(self) -> list[str]:
        return ["recipe", "scheme", "seeds", *(c.title for c in self.columns)]

    def rows(self) -> list[list[str]]:
        """The float model, then recipes and schemes in the order of the plan."""
        groups: dict[tuple[str, str], list[Record]] = {}
        for run in self.plan.runs:
            found = groups.setdefault(_group(run), [])
            if self.is_done(run):
                found.append(self.records[run.name])
        rows = []
        for group, records in groups.items():
            seeds = ", ".join(str(r.seed) for r in records if r.seed is not None)
            cells = [column.cell(records) for column in self.columns]
            rows.append([*group, seeds or MISSING, *cells])
        return rows

    def is_done(self, run: Run) -> bool:
        record = self.records.get(run.name)
        return record is not None and record.is_done(
            run.made_from, self.plan.measured_on
        )

    def _done(self) -> list[Record]:
        return [self.records[run.name] for run in self.plan.runs if self.is_done(run)]

    def failures(self) -> dict[str, str]:
        """Last line of each run that failed, by its name."""
        found = {}
        for run in self.plan.runs:
            record = self.records.get(run.name)
            if record is not None and record.error is not None:
                found[run.name] = last_line(record.error)
        return found

    def waiting(self) -> int:
        """Runs that were not measured yet, and did not fail."""
        left = sum(not self.is_done(run) for run in self.plan.runs)
        return left - len(self.failures())

    def rich(self) -> Table:
        """For the terminal."""
        table = Table(*(Column(title, overflow="fold") for title in self.head))
        for row in self.rows():
            table.add_row(*row)
        return table

    def notes(self) -> list[str]:
        """What is to be known of the figures, a line each."""
        evaluation, lines = self.plan.evaluation, []
        if evaluation.data is not None:
            tokens = max((r.tokens or 0 for r in self._done()), default=0)
            lines.append(
                f"perplexity of {Path(evaluation.data).name}, {tokens} predicted "
                f"tokens, windows of {evaluation.seq_len}; gap: log perplexity over "
                "that of the float model"
            )
        if evaluation.tasks:
            names = ", ".join(self.plan.measured_on["tasks"])
            limit = "" if evaluation.limit is None else f", {evaluation.limit} of each"
            lines.append(f"accuracy: mean of the tasks {names}{limit}")
        lines.append(
            f"by the reference model in float32; calibrated on {self.plan.text.name}, "
            "which took the seconds; mean of the seeds (least to most)"
        )
        return lines

    def problems(self) -> list[str]:
        """Failed runs with their errors, and how many wait."""
        lines = [f"failed: {name}: {line}" for name, line in self.failures().items()]
        if waiting := self.waiting():
            lines.append(f"not measured yet: {waiting} of {len(self.plan.runs)} runs")
        return lines

    def markdown(self) -> str:
        """sweep.md."""
        table = [self.head, ["---"] * len(self.head), *self.rows()]
        lines = [f"| {' | '.join(map(_escaped, row))} |" for row in table]
        rest = [*self.problems(), *self.notes(), *self._machines()]
        parts = [f"# {self.plan.source.name}", "\n".join(lines), *map(_escaped, rest)]
        return "\n\n".join(parts) + "\n"

    def _machines(self) -> list[str]:
        """CPU, threads, versions and dates of the runs, those that differ apart."""
        found: dict[str, list[str]] = {}
        for record in self._done():
            if record.cpu is not None and record.date is not None:
                versions = ", ".join(f"{n} {v}" for n, v in record.versions.items())
                where = f"{record.cpu}, threads {record.threads}, {versions}"
                found.setdefault(where, []).append(record.date[:10])
        return [
            f"{where}, {' to '.join(sorted({min(dates), max(dates)}))}"
            for where, dates in found.items()
        ]


def last_line(error: str) -> str:
    """Of what a run that failed said."""
    return error.strip().rpartition("\n")[2]


def _group(run: Run) -> tuple[str, str]:
    if run.recipe is None:
        return FLOAT, MISSING
    return run.recipe.name, run.recipe.scheme


def _escaped(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;")
