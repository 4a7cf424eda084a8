# SPDX-License-Identifier: Apache-2.0
"""Jobs in processes of their own, with a deadline: a kernel may hang or crash."""

import multiprocessing
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from multiprocessing.connection import Connection, wait
from typing import Any, NamedTuple

Job = Callable[[], Any]


class Done(NamedTuple):
    """What became of a job.

    Attributes:
        index: of the job.
        value: what it returned.
        fault: why it returned nothing, or None.
    """

    index: int
    value: Any
    fault: str | None


class _Worker:
    """A process that takes one job after another."""

    def __init__(self, context: Any) -> None:
        self.connection, there = context.Pipe()
        self.process = context.Process(target=_serve, args=(there,), daemon=True)
        self.process.start()
        there.close()
        self.index: int | None = None

    def stop(self) -> None:
        self.process.kill()
        self.process.join()
        self.connection.close()


def run(jobs: Sequence[Job], number: int, ends: float) -> Iterator[Done]:
    """Results of picklable jobs, as they come, from so many processes.

    A process that dies takes only its job with it, and one that has seen an exception
    is replaced, since a device may be unusable after one. Jobs that have not ended when
    time is up have a fault.

    Args:
        ends: ``time.monotonic()`` when everything is stopped.
    """
    context = multiprocessing.get_context("spawn")
    waiting = deque(range(len(jobs)))
    workers: list[_Worker] = []
    try:
        while waiting or any(worker.index is not None for worker in workers):
            missing = min(number, len(waiting)) - sum(w.index is None for w in workers)
            room = number - len(workers)
            workers += [_Worker(context) for _ in range(min(missing, room))]
            for worker in workers:
                if worker.index is None and waiting:
                    worker.index = waiting.popleft()
                    # One that has died is found where its answer is read.
                    with suppress(OSError):
                        worker.connection.send(jobs[worker.index])
            busy = {w.connection: w for w in workers if w.index is not None}
            ready = wait(list(busy), max(0.0, ends - time.monotonic()))
            for connection in ready:
                done, alive = _result(busy[connection])
                if not alive:
                    busy[connection].stop()
                    workers.remove(busy[connection])
                yield done
            if not ready:
                break
        for worker in workers:
            if worker.index is not None:
                yield Done(worker.index, None, "not finished when time was up")
        for index in waiting:
            yield Done(index, None, "not started when time was up")
    finally:
        for worker in workers:
            worker.stop()


def _result(worker: _Worker) -> tuple[Done, bool]:
    """Of a job that has ended, and whether its process may take another."""
    assert worker.index is not None
    index, worker.index = worker.index, None
    try:
        value, fault = worker.connection.recv()
    except (EOFError, OSError):
        worker.process.join()
        fault = f"the process ended with {worker.process.exitcode}"
        return Done(index, None, fault), False
    return Done(index, value, fault), fault is None


def _serve(connection: Connection) -> None:
    while True:
        try:
            job = connection.recv()
        except EOFError:
            return
        try:
            answer = job(), None
        except Exception as error:
            answer = None, f"{type(error).__name__}: {error}"
        connection.send(answer)
