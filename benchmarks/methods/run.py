# SPDX-License-Identifier: Apache-2.0
"""Running cells, each in a process of its own: on this machine, or on a cluster."""

import datetime
import os
import re
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from vllm_lowbit.calibrate import processes
from vllm_lowbit.calibrate.processes import Processes

from ..environment import describe
from .cells import Cell
from .protocol import ROOT
from .store import Record

# The slowest recipe takes a tenth of it on a quiet machine.
TIMEOUT_SECONDS = 3 * 3600
Keep = Callable[[Cell, Record], None]
# A cell and its fingerprint.
Job = tuple[Cell, str]


def run_here(
    cells: Sequence[Job], workers: int, minutes: float | None, logs: Path, keep: Keep
) -> int:
    """Measure cells side by side, as :func:`processes.run_here`.

    Args:
        cells: with their fingerprints, in the order to start them.
        workers: cells at a time.
        minutes: after which no other is started, None for no limit.
        logs: directory that gets what each cell prints.
        keep: called with a cell and its record, from any thread.

    Returns:
        how many were not started.
    """
    work = partial(_work, logs)
    return processes.run_here(cells, work, workers, _kept(keep), minutes)


def run_on_cluster(
    cells: Sequence[Job], address: str, minutes: float | None, logs: Path, keep: Keep
) -> int:
    """Measure cells on a Ray cluster, as :func:`processes.run_on_cluster`.

    Every node has this repository at the same path, with the same packages. Arguments
    and result as for :func:`run_here`; ``logs`` is a directory on each node.
    """
    return processes.run_on_cluster(
        cells,
        partial(_work, logs),
        address,
        _kept(keep),
        lambda job, reason: _begun(job[1]) | {"error": reason, "seconds": 0.0},
        minutes,
        {"PYTHONPATH": str(ROOT)},
    )


def _work(logs: Path, job: Job, cores: list[int], running: Processes) -> Record:
    return measure(*job, cores, logs, running)


def _kept(keep: Keep) -> Callable[[Job, Record], None]:
    return lambda job, record: keep(job[0], record)


def measure(
    cell: Cell, fingerprint: str, cores: list[int], logs: Path, running: Processes
) -> Record:
    """Run one cell; its record holds the error where it fails.

    Args:
        cell: to measure.
        fingerprint: kept in the record.
        cores: it may run on.
        logs: directory that gets what it prints.
        running: has its process while there is one.
    """
    record = _begun(fingerprint)
    log = logs / (re.sub("[^a-z0-9]+", "-", cell.key.lower()) + ".log")
    words = ["-m", "benchmarks.methods", "--one", cell.key]
    ended = running.run(words, cores, log, TIMEOUT_SECONDS, ROOT)
    if ended.result is not None:
        record |= ended.result
    else:
        code = f"none after {TIMEOUT_SECONDS} s" if ended.code is None else ended.code
        record["error"] = f"exit code {code}\n{ended.tail}"
    record["seconds"] = ended.seconds
    return record


def _begun(fingerprint: str) -> Record:
    environment = describe()
    del environment["date"]
    return {
        "fingerprint": fingerprint,
        "date": datetime.datetime.now().isoformat(timespec="seconds"),
        "environment": environment,
        "load_average_before": round(os.getloadavg()[0], 2),
    }
