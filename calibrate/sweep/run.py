# SPDX-License-Identifier: Apache-2.0
"""Doing a sweep: what is not measured yet, and nothing twice."""

import datetime
import os
import shutil
import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ...errors import ConfigError
from ...lowbit_checkpoint import read_config
from ...schema import validate
from ..files import replace_text
from ..learn.snapshot import snapshot_path
from ..processes import Ended, Processes, run_here, run_on_cluster
from .one import Calibration, Task
from .plan import Plan, Run
from .store import FLOAT, Record, Store, locked
from .table import SweepTable, last_line

MODULE = "vllm_lowbit.calibrate.sweep.one"
TABLE = "sweep.md"
Say = Callable[[str], object]


@dataclass(frozen=True)
class Where:
    """On what runs are spread.

    Attributes:
        workers: at a time on this machine; None is a core for each that is left to do.
        ray: address of a cluster instead, a core for each.
    """

    workers: int | None = None
    ray: str | None = None

    def workers_for(self, runs: int) -> int:
        """How many of so many runs are under way at a time on this machine."""
        return self.workers or max(1, min(runs, len(os.sched_getaffinity(0))))

    def threads_for(self, runs: int) -> int:
        """Of each: OMP_NUM_THREADS as everywhere, else its share of the cores."""
        workers = self.workers_for(runs)
        cores = 1 if self.ray else len(os.sched_getaffinity(0)) // workers
        chosen = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0]
        return int(chosen) if chosen.isdigit() else max(1, cores)


@dataclass(frozen=True)
class Job:
    """A process to start."""

    run: Run
    task: Task
    log: Path
    threads: int


def work(job: Job, cores: list[int], running: Processes) -> Ended:
    """Do one job, on whatever machine."""
    # -P: what lies in the current directory is no package of anybody.
    words = ["-P", "-m", MODULE, "--task", job.task.model_dump_json()]
    threads = {"OMP_NUM_THREADS": str(job.threads)}
    return running.run(words, cores, job.log, variables=threads)


class Sweep:
    """A plan in a directory.

    Args:
        plan: what is done.
        directory: gets sweep.json, sweep.md, ``logs`` and the checkpoints; need not be
            there, and goes on where an earlier sweep in it stopped.
        where: on what it is spread.
        keep_checkpoints: whether they stay after they were measured.
        say: called with a line after each run.
    """

    def __init__(
        self,
        plan: Plan,
        directory: Path,
        where: Where,
        keep_checkpoints: bool,
        say: Say,
    ) -> None:
        self.plan, self.directory = plan, directory.absolute()
        self.where, self.keep_checkpoints, self.say = where, keep_checkpoints, say
        self.store = Store(self.directory, plan.source.name)

    @property
    def table(self) -> SweepTable:
        return SweepTable(self.plan, self.store.runs, self.directory)

    def run(self) -> SweepTable:
        """Do what is left, and write sweep.json and sweep.md after each run.

        Raises:
            ConfigError: before anything is started or removed, for a directory that
                holds something else, or checkpoints that were made from other inputs,
                or has another sweep at work; for too little memory, or a cluster that
                is not there.
            OutputError: when a file cannot be written; ends all runs.
        """
        left = self._open()
        if self.where.ray is None:
            self.plan.check_memory(left, self.where.workers_for(len(left)))
        with locked(self.directory):
            # It may have changed while nobody was kept out.
            left = self._open()
            for run in left:
                self._clear(run)
                self._expect(run, self.where.threads_for(len(left)))
            self._write()
            self.say(f"{len(left)} of {len(self.plan.runs)} runs to do")
            self._spread([self._job(run) for run in left])
        return self.table

    def _open(self) -> list[Run]:
        """Read the directory; what is left to do in it."""
        self.store = Store.open(self.directory, self.plan.source.name)
        table = self.table
        left = [run for run in self.plan.runs if not table.is_done(run)]
        for run in left:
            self._check_checkpoint(run)
        others = [str(self._checkpoint(run)) for run in left if self._is_other(run)]
        if others:
            raise ConfigError(
                f"{', '.join(others)}: made from another recipe, model or text than "
                "now; remove what you do not need, or choose another directory"
            )
        return left

    def _spread(self, jobs: list[Job]) -> None:
        done = 0
        if not jobs:
            return

        def keep(job: Job, ended: Ended) -> None:
            nonlocal done
            with self.store.lock:
                record = self._record(job, ended)
                self.store.runs[job.run.name] = record
                self._write()
                done += 1
                self.say(f"{done}/{len(jobs)} {job.run.name}: {_summary(record)}")
            if record.error is None and not self.keep_checkpoints:
                shutil.rmtree(self._checkpoint(job.run), ignore_errors=True)

        if self.where.ray is None:
            run_here(jobs, work, self.where.workers_for(len(jobs)), keep)
        else:
            lost = lambda job, reason: Ended(1, None, reason, 0.0)
            run_on_cluster(jobs, work, self.where.ray, keep, lost)

    def _checkpoint(self, run: Run) -> Path:
        return self.directory / run.name

    def _is_made(self, run: Run) -> bool:
        """Whether what is there of a run is as it would be made now."""
        record = self.store.runs.get(run.name)
        return record is not None and record.made_from == run.made_from

    def _is_other(self, run: Run) -> bool:
        """Whether a checkpoint is there that this sweep made from other inputs."""
        kept = run.recipe is not None and self._checkpoint(run).exists()
        return kept and not self._is_made(run)

    def _check_checkpoint(self, run: Run) -> None:
        """Refuse a checkpoint that is in the place of one of ours."""
        checkpoint = self._checkpoint(run)
        if run.recipe is None or not checkpoint.exists():
            return
        if run.name not in self.store.runs:
            raise ConfigError(
                f"{checkpoint} is there, and not of this sweep; remove it or choose "
                "another directory"
            )
        if self._is_made(run):
            _, config = read_config(str(checkpoint))
            made = None if config is None else config.provenance
            if made is None or made.recipe_sha256 != run.made_from["recipe"]:
                raise ConfigError(
                    f"{checkpoint}: is not what the sweep made by its recipe; remove it"
                )

    def _clear(self, run: Run) -> None:
        """Remove what is not gone on with: of other inputs, or of a killed process."""
        for staging in self.directory.glob(f".{run.name}-????????"):
            shutil.rmtree(staging)
        snapshot = snapshot_path(self._checkpoint(run))
        if snapshot.exists() and not self._is_made(run):
            snapshot.unlink()
            self.say(
                f"{run.name}: its recipe, model or text is another one than when "
                "learning was interrupted; it starts anew"
            )

    def _expect(self, run: Run, threads: int) -> None:
        """Have a record of a run before it starts: it says what is made there."""
        recipe, before = run.recipe, self.store.runs.get(run.name)
        kept = before if self._is_made(run) else None
        learning = kept if snapshot_path(self._checkpoint(run)).exists() else None
        self.store.runs[run.name] = Record(
            recipe=None if recipe is None else recipe.name,
            scheme=FLOAT if recipe is None else recipe.scheme,
            seed=None if recipe is None else recipe.seed,
            made_from=run.made_from,
            # Learning goes on only where sums are taken in the same order.
            threads=threads if learning is None else learning.threads,
            calibration_seconds=None if kept is None else kept.calibration_seconds,
        )

    def _job(self, run: Run) -> Job:
        plan, calibration = self.plan, None
        if run.recipe is not None:
            calibration = Calibration(
                model=str(plan.source.directory.absolute()),
                recipe=run.recipe.text(),
                text=str(plan.text),
                output=str(self._checkpoint(run)),
                scratch=None if plan.scratch is None else str(plan.scratch),
            )
        task = Task(
            name=run.name,
            model=str(plan.source.directory.absolute()),
            calibration=calibration,
            evaluation=plan.evaluation,
        )
        log = self.directory / "logs" / f"{run.name}.log"
        return Job(run, task, log, self.store.runs[run.name].threads)

    def _record(self, job: Job, ended: Ended) -> Record:
        record = self.store.runs[job.run.name]
        now = datetime.datetime.now().isoformat(timespec="seconds")
        if ended.result is None:
            update = {"error": _error(ended), "seconds": ended.seconds, "date": now}
            return record.model_copy(update=update)
        found = dict(ended.result)
        if found["calibration_seconds"] is None:
            found["calibration_seconds"] = record.calibration_seconds
        found |= {"seconds": ended.seconds, "date": now}
        found["measured_on"] = self.plan.measured_on
        kept = record.model_dump(include={"recipe", "scheme", "seed", "made_from"})
        return validate(Record, kept | found, job.run.name)

    def _write(self) -> None:
        self.store.write()
        replace_text(self.directory / TABLE, self.table.markdown())


def _error(ended: Ended) -> str:
    if ended.code is None or ended.code >= 0:
        return ended.tail.strip() or f"exit code {ended.code}, nothing printed"
    name = signal.Signals(-ended.code).name
    last = last_line(ended.tail)
    memory = ", perhaps for want of memory" if name == "SIGKILL" else ""
    after = f", after: {last}" if last else ""
    return f"{ended.tail}\nended by {name}{memory}{after}"


def _summary(record: Record) -> str:
    if record.error is not None:
        return f"failed: {last_line(record.error)}"
    figures = []
    if record.perplexity is not None:
        figures.append(f"perplexity {record.perplexity:.3f}")
    if record.mean is not None:
        figures.append(f"accuracy {record.mean['accuracy']:.4f}")
    return ", ".join([*figures, f"{record.seconds:.0f} s"])
