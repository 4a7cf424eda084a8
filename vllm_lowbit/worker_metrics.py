# SPDX-License-Identifier: Apache-2.0
"""What workers measure, for the process that answers /metrics.

Only the processes that serve HTTP export metrics, and prometheus_client shares values
between processes only if a directory is set before it is imported, which vLLM does for
several API servers. So each worker writes a small file, in a directory that the first
process makes before it starts any other; its name is inherited with the environment.
"""

import contextlib
import functools
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

DIRECTORY = "LOWBIT_METRICS_DIR"
_made: tempfile.TemporaryDirectory[str] | None = None
_worker: tuple[int, int] | None = None
_seconds = 0.0


def make_directory() -> None:
    """Make the directory, unless a parent process (or the user) has."""
    global _made
    if DIRECTORY not in os.environ:
        _made = tempfile.TemporaryDirectory(prefix="vllm-lowbit-")
        os.environ[DIRECTORY] = _made.name


def identify(engine: int, rank: int) -> None:
    """Name this worker: the data parallel index of its engine, its rank in there."""
    global _worker, _seconds
    _worker, _seconds = (engine, rank), 0.0


def load_time(function: Callable[..., None]) -> Callable[..., None]:
    """Counts the time of a method that quantizes, converts or packs loaded weights."""

    @functools.wraps(function)
    def timed(*args: Any, **kwargs: Any) -> None:
        with _clock():
            function(*args, **kwargs)

    return timed


@contextlib.contextmanager
def _clock() -> Iterator[None]:
    global _seconds
    start = time.perf_counter()
    yield
    _seconds += time.perf_counter() - start
    _write()


def _write() -> None:
    directory = Path(os.environ.get(DIRECTORY, ""))
    # A worker on another machine than the server's has no such directory.
    if _worker is None or DIRECTORY not in os.environ or not directory.is_dir():
        return
    engine, rank = _worker
    partial = directory / f"{engine}-{rank}.{os.getpid()}"
    partial.write_text(json.dumps({"load_seconds": _seconds}))
    partial.replace(directory / f"{engine}-{rank}.json")


def load_seconds(engine: int) -> dict[int, float]:
    """Rank to seconds, of the workers of one engine that run on this machine."""
    directory = os.environ.get(DIRECTORY)
    if directory is None:
        return {}
    found = {}
    for path in sorted(Path(directory).glob(f"{engine}-*.json")):
        rank = int(path.stem.partition("-")[2])
        found[rank] = float(json.loads(path.read_text())["load_seconds"])
    return found
