# SPDX-License-Identifier: Apache-2.0
"""From a plain checkpoint and a recipe to a lowbit checkpoint."""

import os
from pathlib import Path

import torch

from ..errors import ConfigError
from ..schema import LowbitConfig, Provenance
from .calibration import Announce, Calibration, Progress
from .denormals import flushed_denormals
from .learn.snapshot import Snapshot
from .plan import plan, residual_is_replaced, written_tensors
from .publish import Report, publish
from .recipe import Recipe
from .record import CALIBRATION
from .scratch import Scratch
from .source import Source
from .text import calibration_windows
from .writer import CheckpointWriter


def held_out_windows(samples: int) -> int:
    """Windows set aside to measure on: a quarter as many, from 1 to 32."""
    return min(32, max(1, samples // 4))


@flushed_denormals()
def calibrate(
    model: str,
    output: Path,
    recipe: Recipe,
    text: Path,
    device: str = "auto",
    progress: Progress = lambda done, total, what: None,
    resume: bool = False,
    scratch: Path | None = None,
    announce: Announce = lambda estimate: None,
) -> Report:
    """Make a lowbit checkpoint.

    Args:
        model: plain checkpoint, a directory or a hub name.
        output: directory to make; must not exist, or be empty.
        recipe: what is done.
        text: UTF-8 file whose windows are calibrated on.
        device: ``auto``, ``cpu``, ``cuda`` or any of torch's.
        progress: called with linears done, their number, and the current one; before
            that, where transforms are learned, with steps, their number and the loss.
        resume: go on with learning where an interrupted run left its state, in
            ``OUTPUT.snapshot``.
        scratch: directory for hidden states and float weights, which then take disk
            instead of memory; for ``device`` cpu. The checkpoint is the same.
        announce: called with what the run will take, before it starts.

    Raises:
        LowbitError: before anything is written where that can be known; otherwise
            what was written is removed.
    """
    device = choose_device(device)
    source = Source.open(model)
    recipe = recipe.sized(source.shape)
    config = configure(source, recipe, model)
    samples, seq_len = recipe.data.samples, recipe.data.seq_len
    held_out, used = held_out_windows(samples), recipe.training_samples()
    everything = calibration_windows(
        str(source.directory), text, used + held_out, seq_len, recipe.seed
    )
    windows = torch.cat((everything[:samples], everything[used:]))
    training = everything[:used]
    snapshot = Snapshot.of(output, recipe, resume)
    place = open_scratch(scratch, device)
    run = Calibration(
        source,
        config,
        recipe,
        windows,
        training,
        device,
        progress,
        place,
    )
    run.check_resources(announce)
    with CheckpointWriter(output, written_tensors(source, config)) as writer:
        run.learn(snapshot)
        losses = run.run(writer)
        tokens, untouched = held_out * (seq_len - 1), run.untouched_experts
        replaced = residual_is_replaced(recipe, config)
        config = run.served_config()
        report = Report(config, *losses, tokens, untouched, replaced)
        writer.write_text(CALIBRATION, run.record.text())
        publish(writer, source, recipe, text, report)
    snapshot.remove()
    return report


def configure(source: Source, recipe: Recipe, model: str) -> LowbitConfig:
    """The config of the checkpoint that a sized recipe makes.

    Args:
        source: the model.
        recipe: of :meth:`.recipe.Recipe.sized`.
        model: what errors call it.

    Raises:
        UnsupportedError: when the recipe does not fit the model.
    """
    provenance = Provenance(
        base_model=source.name,
        base_revision=source.revision,
        recipe=recipe.name,
        recipe_sha256=recipe.sha256(),
    )
    return plan(source.shape, recipe, f"{model}/config.json", provenance)


def choose_device(device: str) -> str:
    """``auto`` is CUDA where there is one.

    Raises:
        ConfigError: for a device that torch does not have here.
    """
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        first = str(error).partition("\n")[0]
        raise ConfigError(f"--device {device}: {first}") from None
    return device


def open_scratch(directory: Path | None, device: str) -> Scratch:
    """Where large tensors live.

    Raises:
        ConfigError: for a directory that cannot be used, or a device that needs none.
    """
    if directory is None:
        return Scratch()
    if not directory.is_dir() or not os.access(directory, os.W_OK | os.X_OK):
        raise ConfigError(f"scratch {directory}: not a directory that can be written")
    if device != "cpu":
        raise ConfigError(
            f"scratch {directory}: files serve --device cpu only, got {device}"
        )
    return Scratch(directory)
