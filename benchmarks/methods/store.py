# SPDX-License-Identifier: Apache-2.0
"""methods.json, and running cells: each in a process of its own, kept at once."""

import contextlib
import datetime
import json
import os
import queue
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from ..environment import describe
from .cells import Cell
from .protocol import ROOT

ERROR_CHARACTERS = 2000
# The slowest recipe takes a tenth of it on a quiet machine.
TIMEOUT_SECONDS = 3 * 3600
Record = dict[str, Any]


class Store:
    """The contents of methods.json.

    Attributes:
        path: of the file.
        environments: machine and versions; a record has the index of its own.
        cells: record of each cell that was run, by its key.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.environments: list[dict[str, str]] = []
        self.cells: dict[str, Record] = {}
        self._lock = threading.Lock()
        if path.is_file():
            data = json.loads(path.read_text())
            self.environments, self.cells = data["environments"], data["cells"]

    def done(self, cell: Cell, fingerprint: str) -> bool:
        """Whether a cell was measured as it would be now, without an error."""
        record = self.cells.get(cell.key, {})
        return "error" not in record and record.get("fingerprint") == fingerprint

    def result(self, key: str) -> Record | None:
        """What a cell measured, None when it was not, or failed."""
        record = self.cells.get(key)
        return None if record is None or "error" in record else record

    def errors(self) -> dict[str, str]:
        """Last line of every cell that failed."""
        return {
            key: record["error"].strip().rpartition("\n")[2]
            for key, record in self.cells.items()
            if "error" in record
        }

    def write(self, cell: Cell, record: Record) -> None:
        """Keep a record, and write the file so that it is never half there."""
        here = describe()
        del here["date"]
        with self._lock:
            if here not in self.environments:
                self.environments.append(here)
            record["environment"] = self.environments.index(here)
            self.cells[cell.key] = record
            data = {"environments": self.environments, "cells": self.cells}
            self.path.parent.mkdir(parents=True, exist_ok=True)
            staging = self.path.with_suffix(".json.new")
            staging.write_text(json.dumps(data, indent=1) + "\n")
            os.replace(staging, self.path)


def run_all(
    cells: Sequence[tuple[Cell, str]],
    workers: int,
    minutes: float | None,
    logs: Path,
    keep: Callable[[Cell, Record], None],
) -> int:
    """Measure cells side by side, each on its share of the cores.

    Args:
        cells: with their fingerprints, in the order to start them.
        workers: cells at a time.
        minutes: after which no other is started, None for no limit.
        logs: directory that gets what each cell prints.
        keep: called with a cell and its record, from any thread.

    Returns:
        how many were not started.
    """
    ends = time.monotonic() + 60 * minutes if minutes is not None else None
    shares: queue.Queue[list[int]] = queue.Queue()
    cores = sorted(os.sched_getaffinity(0))
    for worker in range(workers):
        shares.put(cores[worker::workers] or cores)
    running: set[subprocess.Popen[bytes]] = set()
    stopped = threading.Event()
    left = 0

    def run(cell: Cell, fingerprint: str) -> None:
        nonlocal left
        if ends is not None and time.monotonic() > ends:
            left += 1
            return
        share = shares.get()
        try:
            record = _run(cell, fingerprint, share, logs, running)
            if not stopped.is_set():
                keep(cell, record)
        finally:
            shares.put(share)

    with ThreadPoolExecutor(workers) as pool:
        try:
            for future in [pool.submit(run, *each) for each in cells]:
                future.result()
        except BaseException:
            stopped.set()
            pool.shutdown(wait=False, cancel_futures=True)
            for process in list(running):
                _kill(process)
            raise
    return left


def _run(
    cell: Cell,
    fingerprint: str,
    cores: list[int],
    logs: Path,
    running: set[subprocess.Popen[bytes]],
) -> Record:
    record: Record = {
        "fingerprint": fingerprint,
        "date": datetime.datetime.now().isoformat(timespec="seconds"),
        "load_average_before": round(os.getloadavg()[0], 2),
    }
    started = time.monotonic()
    logs.mkdir(parents=True, exist_ok=True)
    log = logs / (re.sub("[^a-z0-9]+", "-", cell.key.lower()) + ".log")
    with tempfile.TemporaryDirectory() as directory, log.open("w") as file:
        output = Path(directory) / "result.json"
        words = ["-m", "benchmarks.methods", "--one", cell.key, "--output", str(output)]
        process = subprocess.Popen(
            [sys.executable, *words],
            cwd=ROOT,
            env={"OMP_NUM_THREADS": str(len(cores)), **os.environ},
            preexec_fn=partial(os.sched_setaffinity, 0, cores),
            stdout=file,
            stderr=subprocess.STDOUT,
            process_group=0,
        )
        running.add(process)
        try:
            code: int | str = process.wait(TIMEOUT_SECONDS)
        except subprocess.TimeoutExpired:
            code = f"none after {TIMEOUT_SECONDS} s"
        finally:
            # An engine that outlived its cell would run beside the next one.
            _kill(process)
            running.discard(process)
        if code == 0 and output.is_file():
            record |= json.loads(output.read_text())
        else:
            tail = log.read_text(errors="replace")[-ERROR_CHARACTERS:]
            record["error"] = f"exit code {code}\n{tail}"
    record["seconds"] = round(time.monotonic() - started, 1)
    return record


def _kill(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
