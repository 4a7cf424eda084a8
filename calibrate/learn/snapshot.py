# SPDX-License-Identifier: Apache-2.0
"""The state of learning in a file beside the output, to go on from."""

import json
import os
import signal
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ...errors import ConfigError, OutputError
from ..recipe import Recipe

Curve = list[tuple[int, float]]


@dataclass(frozen=True)
class State:
    """Where learning is.

    Attributes:
        step: steps done.
        curve: steps done and loss, after each.
        tensors: everything the next step depends on, by name.
    """

    step: int
    curve: Curve
    tensors: dict[str, torch.Tensor]


def snapshot_path(output: Path) -> Path:
    """Of the run that makes a checkpoint."""
    output = output.absolute()
    return output.with_name(f"{output.name}.snapshot")


class Snapshot:
    """One file, replaced as a whole; what it belongs to is recorded in it.

    Args:
        path: of the file.
        resume: whether a file that is there is gone on from.

    Raises:
        ConfigError: when there is none to resume from, or one nobody asked for.
    """

    def __init__(self, path: Path, resume: bool) -> None:
        self.path, self.resume = path, resume
        if resume and not path.is_file():
            raise ConfigError(f"--resume: {path} is not there; run without it")
        if not resume and path.exists():
            raise ConfigError(
                f"{path} is what an unfinished run left: go on with --resume, or "
                "remove it to start anew"
            )

    @classmethod
    def of(cls, output: Path, recipe: Recipe, resume: bool) -> "Snapshot":
        """That of a checkpoint to be.

        Raises:
            ConfigError: as the class, or when there is nothing to resume in a recipe.
        """
        if resume and not recipe.learns:
            raise ConfigError(
                f"--resume: the recipe {recipe.name} learns nothing that could be gone "
                "on with; run without it"
            )
        return cls(snapshot_path(output), resume)

    def save(self, state: State, origin: Mapping[str, str]) -> None:
        """Replace the file.

        Args:
            state: to go on from.
            origin: names and hashes of all that the run depends on.

        Raises:
            OutputError: when it cannot be written; an older one stays.
        """
        metadata = {
            "origin": json.dumps(dict(origin)),
            "step": str(state.step),
            "curve": json.dumps(state.curve),
        }
        tensors = {
            name: tensor.detach().cpu().contiguous()
            for name, tensor in state.tensors.items()
        }
        temporary = self.path.with_name(f".{self.path.name}.part")
        try:
            save_file(tensors, temporary, metadata)
            os.replace(temporary, self.path)
        except (OSError, SafetensorError) as error:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)
            raise OutputError(f"{self.path} cannot be written: {error}") from None

    def load(self, origin: Mapping[str, str]) -> State | None:
        """The state to go on from, None to start.

        Raises:
            ConfigError: when the file is damaged, or belongs to another run.
        """
        if not self.resume:
            return None
        try:
            with safe_open(self.path, framework="pt") as file:
                metadata: dict[str, Any] = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            step, curve = int(metadata["step"]), json.loads(metadata["curve"])
            saved = json.loads(metadata["origin"])
        except (OSError, SafetensorError, KeyError, ValueError) as error:
            raise ConfigError(
                f"{self.path} cannot be read: {error}; remove it to start anew"
            ) from None
        other = [name for name in origin if saved.get(name) != origin[name]]
        if other:
            raise ConfigError(
                f"{self.path} is of another run: {', '.join(other)} differ; use what "
                "it was started with, or remove it to start anew"
            )
        return State(step, [(int(n), float(loss)) for n, loss in curve], tensors)

    def remove(self) -> None:
        """When the checkpoint is there."""
        self.path.unlink(missing_ok=True)


@contextmanager
def deferred_interrupt() -> Iterator[list[int]]:
    """Ctrl-C once is noted in the list it yields; twice interrupts as usual."""
    noted: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield noted
        return
    previous = signal.getsignal(signal.SIGINT)

    def note(number: int, frame: FrameType | None) -> None:
        noted.append(number)
        signal.signal(signal.SIGINT, previous)

    signal.signal(signal.SIGINT, note)
    try:
        yield noted
    finally:
        signal.signal(signal.SIGINT, previous)
