# SPDX-License-Identifier: Apache-2.0
"""sweep.json: what is known of every run of a directory, and never half a file."""

import fcntl
import json
import math
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field

from ...errors import ConfigError
from ...schema import StrictModel, validate
from ..files import read_bytes, replace_text

FILE, LOCK = "sweep.json", ".sweep.lock"
MAX_BYTES = 1 << 26
FLOAT = "float"


class Record(StrictModel):
    """A run: what it is of, and what was measured, None where it is not yet.

    Attributes:
        recipe, scheme, seed: None, ``float`` and None for the float model.
        made_from: hashes of all that the checkpoint follows from.
        measured_on: hashes and sizes of all that the figures follow from beside it.
        threads: of its process, the same when it goes on.
        perplexity, tokens: of the text, and how many were predicted.
        gap: log perplexity over that of the float model.
        mean, tasks: accuracies as in :class:`.choices.Score`, of all tasks together and
            of each.
        calibration_seconds: None where it was interrupted, too.
        seconds: of the process that measured it, or failed.
        date: when that ended.
        cpu, versions: with which.
        error: last words of a run that failed.
    """

    recipe: str | None = None
    scheme: str
    seed: int | None = None
    made_from: dict[str, str]
    threads: int
    measured_on: dict[str, Any] | None = None
    perplexity: float | None = None
    tokens: int | None = None
    gap: float | None = None
    mean: dict[str, int | float] | None = None
    tasks: dict[str, dict[str, int | float]] | None = None
    calibration_seconds: float | None = None
    seconds: float | None = None
    date: str | None = None
    cpu: str | None = None
    versions: dict[str, str] = Field(default_factory=dict)
    error: str | None = None

    def is_done(self, made_from: Any, measured_on: Any) -> bool:
        """Whether it was measured as it would be now, without an error."""
        return (
            self.error is None
            and self.made_from == made_from
            and self.measured_on == measured_on
        )


class Contents(StrictModel):
    """The file."""

    format_version: Literal[1] = 1
    model: str
    runs: dict[str, Record] = Field(default_factory=dict)


class Store:
    """The records of a directory, by the names of their runs.

    Args:
        directory: of the sweep.
        model: name of the model that it is of.
    """

    def __init__(self, directory: Path, model: str) -> None:
        self.directory, self.model = directory, model
        self.runs: dict[str, Record] = {}
        self.lock = threading.RLock()

    @classmethod
    def open(cls, directory: Path, model: str) -> Self:
        """What is in a directory, which need not be there.

        Raises:
            ConfigError: when it holds something else than a sweep of this model.
        """
        store, path = cls(directory, model), directory / FILE
        if not path.exists():
            _check_free(directory)
            return store
        try:
            data = json.loads(read_bytes(path, MAX_BYTES))
        except ValueError as error:
            raise ConfigError(f"{path}: is not JSON: {error}") from None
        contents = validate(Contents, data, str(path))
        if contents.model != model:
            raise ConfigError(
                f"{directory} holds a sweep of {contents.model}, not of {model}; "
                "choose another directory"
            )
        store.runs = dict(contents.runs)
        return store

    def write(self) -> None:
        """Replace the file, gaps filled in."""
        with self.lock:
            self.runs = {name: self._with_gap(r) for name, r in self.runs.items()}
            contents = Contents(model=self.model, runs=self.runs)
            text = contents.model_dump_json(indent=1, exclude_none=True)
            replace_text(self.directory / FILE, text + "\n")

    def _with_gap(self, record: Record) -> Record:
        base, gap = self.runs.get(FLOAT), None
        if (
            base is not None
            and base.perplexity is not None
            and record.perplexity is not None
            and record.recipe is not None
            and base.measured_on == record.measured_on
            and base.made_from["model"] == record.made_from["model"]
        ):
            gap = math.log(record.perplexity / base.perplexity)
        return record.model_copy(update={"gap": gap})


def _check_free(directory: Path) -> None:
    if directory.exists() and not directory.is_dir():
        raise ConfigError(f"output {directory} exists and is not a directory")
    if directory.exists() and any(p.name != LOCK for p in directory.iterdir()):
        raise ConfigError(
            f"output directory {directory} holds something else than a sweep, as "
            f"{FILE} is not there; choose another"
        )
    parent = directory.absolute().parent
    if not parent.is_dir():
        raise ConfigError(f"output {directory}: {parent} is not a directory")


@contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Make the directory, and keep other sweeps out of it while the block runs.

    Raises:
        ConfigError: when it cannot be made, or another one is in it.
    """
    try:
        directory.mkdir(exist_ok=True)
        file = (directory / LOCK).open("w")
    except OSError as error:
        raise ConfigError(f"output {directory}: {error.strerror}") from None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(f"output {directory}: another sweep is at work") from None
        yield
