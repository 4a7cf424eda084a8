# SPDX-License-Identifier: Apache-2.0
"""Running cells, each in a process of its own: on this machine, or on a cluster."""

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
from .store import Record

ERROR_CHARACTERS = 2000
# The slowest recipe takes a tenth of it on a quiet machine.
TIMEOUT_SECONDS = 3 * 3600
Keep = Callable[[Cell, Record], None]
Cells = Sequence[tuple[Cell, str]]


def run_here(
    cells: Cells, workers: int, minutes: float | None, logs: Path, keep: Keep
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
    ends = _end(minutes)
    shares: queue.Queue[list[int]] = queue.Queue()
    cores = sorted(os.sched_getaffinity(0))
    for worker in range(workers):
        shares.put(cores[worker::workers] or cores)
    running: set[subprocess.Popen[bytes]] = set()
    stopped = threading.Event()
    left = 0

    def run(cell: Cell, fingerprint: str) -> None:
        nonlocal left
        if time.monotonic() > ends:
            left += 1
            return
        share = shares.get()
        try:
            record = measure(cell, fingerprint, share, logs, running)
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


def run_on_cluster(
    cells: Cells, address: str, minutes: float | None, logs: Path, keep: Keep
) -> int:
    """Measure cells on a Ray cluster, each on one core.

    Every node has this repository at the same path, with the same packages. As many
    cells are under way as the cluster has cores; one whose node dies is run again.

    Args:
        cells: as for :func:`run_here`.
        address: of the cluster; ``auto`` finds the one of this machine, ``local``
            starts one here.
        minutes: after which no other is started, None for no limit.
        logs: directory, on each node, that gets what its cells print.
        keep: called with a cell and its record.

    Returns:
        how many were not started.
    """
    import ray

    ends, left = _end(minutes), list(cells)
    path = {"PYTHONPATH": str(ROOT)}
    ray.init(address=address, runtime_env={"env_vars": path}, log_to_driver=False)
    remote: Any = ray.remote(num_cpus=1, max_retries=2)(_measure_there)
    running: dict[Any, Cell] = {}
    try:
        while running or left:
            while left and len(running) < _cores(ray) and time.monotonic() < ends:
                cell, fingerprint = left.pop(0)
                running[remote.remote(cell, fingerprint, logs)] = cell
            if not running:
                break
            done, _ = ray.wait(list(running), timeout=10)
            for task in done:
                keep(running.pop(task), ray.get(task))
    finally:
        # Not by force: a task that is told to end ends its own process as well.
        for task in running:
            ray.cancel(task)
        ray.shutdown()
    return len(left)


def _cores(ray: Any) -> int:
    return int(ray.cluster_resources().get("CPU", 0))


def _measure_there(cell: Cell, fingerprint: str, logs: Path) -> Record:
    return measure(cell, fingerprint, sorted(os.sched_getaffinity(0)), logs, set())


def _end(minutes: float | None) -> float:
    return float("inf") if minutes is None else time.monotonic() + 60 * minutes


def measure(
    cell: Cell,
    fingerprint: str,
    cores: list[int],
    logs: Path,
    running: set[subprocess.Popen[bytes]],
) -> Record:
    """Run one cell; its record holds the error where it fails.

    Args:
        cell: to measure.
        fingerprint: kept in the record.
        cores: it may run on.
        logs: directory that gets what it prints.
        running: has its process while there is one.
    """
    environment = describe()
    del environment["date"]
    record: Record = {
        "fingerprint": fingerprint,
        "date": datetime.datetime.now().isoformat(timespec="seconds"),
        "environment": environment,
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
