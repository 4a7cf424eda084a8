# SPDX-License-Identifier: Apache-2.0
"""Checksums of a lowbit checkpoint, computed beside its loading."""

import threading
from pathlib import Path

from .errors import CheckpointError
from .manifest import data_problem, read_manifest


class Verification:
    """Reads every tensor in a thread and compares it with the manifest.

    Hashing releases the interpreter, so it runs while the weights load; what the
    loader has read lies in the page cache. With several ranks each takes its share:
    one that finds a problem fails, and the engine with it.

    Args:
        directory: of the checkpoint.
        rank: of this worker.
        world_size: number of workers.

    Raises:
        CheckpointError, ConfigError: for a manifest that cannot be read.
    """

    def __init__(self, directory: Path, rank: int = 0, world_size: int = 1) -> None:
        entries = read_manifest(directory).tensors
        names = list(entries)[rank::world_size]
        self._todo = [(n, entries[n].file, entries[n].sha256) for n in names]
        self._directory = directory
        self._problem: str | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def finish(self) -> None:
        """Wait for the end; may be called again.

        Raises:
            CheckpointError: naming the first tensor whose data is not what it was.
        """
        self._thread.join()
        if self._problem is not None:
            raise CheckpointError(self._problem)

    def _run(self) -> None:
        # Set until the end is reached: a thread that dies must not pass for a success.
        self._problem = f"{self._directory}: its tensors could not be verified"
        for name, file, sha256 in self._todo:
            problem = data_problem(self._directory, name, file, sha256)
            if problem is not None:
                self._problem = f"{self._directory / file}: tensor {name} {problem}"
                return
        self._problem = None
