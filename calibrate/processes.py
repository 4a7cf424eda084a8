# SPDX-License-Identifier: Apache-2.0
"""Independent jobs side by side, on this machine or on a Ray cluster.

What a job is only the caller knows: it gives a function that is called where the job
runs, and starts a process there by :meth:`Processes.run`.
"""

import contextlib
import ctypes
import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from ..errors import ConfigError

# An interrupted process has so long to save its state.
GRACE_SECONDS = 60.0
TAIL_CHARACTERS = 2000
_SET_PARENT_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG of prctl(2)
_libc = ctypes.CDLL(None)

J = TypeVar("J")
R = TypeVar("R")
# Called with the job, cores it may run on, and where it starts its process.
Work = Callable[[J, list[int], "Processes"], R]
Keep = Callable[[J, R], object]


@dataclass(frozen=True)
class Ended:
    """How a process ended.

    Attributes:
        code: exit code, negative for a signal, None when it took too long.
        result: the JSON it wrote, None when it wrote none or failed.
        tail: the last characters of what it printed.
        seconds: that it took.
    """

    code: int | None
    result: Any
    tail: str
    seconds: float


class Processes:
    """Processes under way, which can be ended together from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._running: set[subprocess.Popen[bytes]] = set()
        self.ended = False

    def run(
        self,
        words: Sequence[str],
        cores: list[int],
        log: Path,
        timeout: float | None = None,
        directory: Path | None = None,
        variables: Mapping[str, str] | None = None,
    ) -> Ended:
        """Run this Python in a process group of its own, and wait for it.

        When this process dies, or is interrupted while it waits, the other one is
        interrupted too.

        Args:
            words: its arguments; ``--output FILE`` is added, where it writes JSON.
            cores: it may run on, and as many OpenMP threads it has, unless the
                environment or ``variables`` say otherwise.
            log: file that gets what it prints.
            timeout: seconds after which it is killed.
            directory: it starts in, None for the current one.
            variables: added to its environment.
        """
        started = time.monotonic()
        log.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory() as scratch, log.open("w") as file:
            output = Path(scratch) / "result.json"
            threads = {"OMP_NUM_THREADS": str(len(cores))}
            process = subprocess.Popen(
                [sys.executable, *words, "--output", str(output)],
                cwd=directory,
                env={**threads, **os.environ, **(variables or {})},
                preexec_fn=partial(_prepare, cores),
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                process_group=0,
            )
            code = self._wait(process, timeout)
            result = None
            if code == 0 and output.is_file():
                result = json.loads(output.read_text())
            tail = log.read_text(errors="replace")[-TAIL_CHARACTERS:]
        return Ended(code, result, tail, round(time.monotonic() - started, 1))

    def _wait(
        self, process: subprocess.Popen[bytes], timeout: float | None
    ) -> int | None:
        with self._lock:
            self._running.add(process)
            late = self.ended
        try:
            if late:
                _signal(process, signal.SIGINT)
            # With a limit it polls: Ray interrupts without a signal, which would not
            # end one system call that waits.
            return process.wait(float("inf") if timeout is None else timeout)
        except subprocess.TimeoutExpired:
            return None
        except BaseException:
            _interrupt([process])
            raise
        finally:
            # What it started itself would run beside the next one.
            _signal(process, signal.SIGKILL)
            process.wait()
            with self._lock:
                self._running.discard(process)

    def end(self) -> None:
        """Interrupt all, and kill those that take too long to save their state."""
        with self._lock:
            self.ended = True
            running = list(self._running)
        if running:
            _say_ending(len(running))
        _interrupt(running)


def run_here(
    jobs: Sequence[J],
    work: Work[J, R],
    workers: int,
    keep: Keep[J, R],
    minutes: float | None = None,
) -> int:
    """Do jobs side by side, each on its share of the cores.

    Args:
        jobs: in the order to start them.
        work: does one.
        workers: jobs at a time.
        keep: called with a job and its result, from any thread.
        minutes: after which no other is started, None for no limit.

    Returns:
        how many were not started.
    """
    ends = _end(minutes)
    shares: queue.Queue[list[int]] = queue.Queue()
    cores = sorted(os.sched_getaffinity(0))
    for worker in range(workers):
        shares.put(cores[worker::workers] or cores)
    processes = Processes()

    def run(job: J) -> bool:
        if processes.ended or time.monotonic() > ends:
            return False
        share = shares.get()
        try:
            result = work(job, share, processes)
            if not processes.ended:
                keep(job, result)
        finally:
            shares.put(share)
        return True

    with ThreadPoolExecutor(workers) as pool:
        try:
            futures = [pool.submit(run, job) for job in jobs]
            # As they end: the error of one is not to wait for all before it.
            return sum(not future.result() for future in as_completed(futures))
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            processes.end()
            raise


def run_on_cluster(
    jobs: Sequence[J],
    work: Work[J, R],
    address: str,
    keep: Keep[J, R],
    lost: Callable[[J, str], R],
    minutes: float | None = None,
    variables: Mapping[str, str] | None = None,
) -> int:
    """Do jobs on a Ray cluster, each on one core.

    As many are under way as the cluster has cores; one whose node dies is done again,
    twice at most.

    Args:
        jobs, keep, minutes: as for :func:`run_here`; ``keep`` from this thread.
        work: does one; importable on every node.
        address: of the cluster; ``auto`` finds the one of this machine, ``local``
            starts one here.
        lost: result of a job that failed where it ran, or whose nodes died, from
            a line that says so.
        variables: added to the environment there.

    Returns:
        how many were not started.

    Raises:
        ConfigError: when there is no cluster at the address.
        ModuleNotFoundError: where Ray is missing.
    """
    import ray

    ends, left = _end(minutes), list(jobs)
    environment = {"env_vars": dict(variables or {})}
    try:
        ray.init(address=address, runtime_env=environment, log_to_driver=False)
    except (ConnectionError, RuntimeError, ValueError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise ConfigError(f"--ray {address}: {reason}") from None
    remote: Any = ray.remote(num_cpus=1, max_retries=2)(_there)
    running: dict[Any, J] = {}
    try:
        while running or left:
            while left and len(running) < _cores(ray) and time.monotonic() < ends:
                job = left.pop(0)
                running[remote.remote(work, job)] = job
            if not running:
                break
            done, _ = ray.wait(list(running), timeout=10)
            for task in done:
                job = running.pop(task)
                try:
                    result = ray.get(task)
                except ray.exceptions.RayError as error:
                    result = lost(job, _reason(ray, error))
                keep(job, result)
    finally:
        try:
            if running:
                _cancel(ray, list(running))
        finally:
            ray.shutdown()
    return len(left)


def _reason(ray: Any, error: Exception) -> str:
    """One line: the end of a traceback, or the start of Ray's explanation."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[-1 if isinstance(error, ray.exceptions.RayTaskError) else 0]


def _cores(ray: Any) -> int:
    return int(ray.cluster_resources().get("CPU", 0))


def _cancel(ray: Any, tasks: list[Any]) -> None:
    """End tasks; not by force: one that is interrupted ends its own process."""
    _say_ending(len(tasks))
    for task in tasks:
        ray.cancel(task)
    # Workers would go with the connection, before their processes have.
    ray.wait(tasks, num_returns=len(tasks), timeout=GRACE_SECONDS)


def _there(work: Work[J, R], job: J) -> R:
    return work(job, sorted(os.sched_getaffinity(0)), Processes())


def _end(minutes: float | None) -> float:
    return float("inf") if minutes is None else time.monotonic() + 60 * minutes


def _say_ending(count: int) -> None:
    print(
        f"ending {count} under way; another interrupt does not wait for their state",
        file=sys.stderr,
        flush=True,
    )


def _prepare(cores: list[int]) -> None:
    """In the new process: a place to run, and interrupts that arrive.

    A shell starts background jobs with interrupts ignored, Ray with them blocked.
    """
    os.sched_setaffinity(0, cores)
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    _libc.prctl(_SET_PARENT_DEATH_SIGNAL, signal.SIGINT)


def _signal(process: subprocess.Popen[bytes], number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, number)


def _interrupt(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    try:
        for process in processes:
            _signal(process, signal.SIGINT)
        ends = time.monotonic() + GRACE_SECONDS
        for process in processes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(max(0.0, ends - time.monotonic()))
    finally:
        for process in processes:
            _signal(process, signal.SIGKILL)
