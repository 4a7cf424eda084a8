# SPDX-License-Identifier: Apache-2.0
"""One run of a sweep, in a process of its own: calibrate, then measure.

    python -m vllm_lowbit.calibrate.sweep.one --task JSON --output FILE

What it prints is the run's log; its last line is the error where there is one.
"""

import argparse
import datetime
import json
import platform
import time
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from ...errors import LowbitError
from ...schema import StrictModel
from ..choices import Score, read_tasks, score_tasks, tokenize_tasks
from ..evaluate import text_perplexity, text_windows
from ..learn.snapshot import snapshot_path
from ..pipeline import calibrate
from ..publish import PACKAGES
from ..recipe import parse_recipe
from ..scoring import Target, open_scorer

LOG_SECONDS = 10.0


class Evaluation(StrictModel):
    """What every model is measured on; one of ``data`` and ``tasks`` at least.

    Attributes:
        data: text file for the perplexity.
        seq_len: tokens of its windows.
        max_tokens: of it, from its start; None is all of it.
        tasks: files and directories of :func:`.choices.read_tasks`.
        limit: questions of each task; None is all of them.
    """

    data: str | None = None
    seq_len: int = 512
    max_tokens: int | None = None
    tasks: tuple[str, ...] = ()
    limit: int | None = None


class Calibration(StrictModel):
    """What makes a checkpoint: arguments of :func:`.pipeline.calibrate`.

    Attributes:
        model: directory or hub name.
        recipe: text of the recipe.
        text: file that is calibrated on.
        output: the checkpoint; where it is there already it is only measured.
        scratch: directory for large tensors.
    """

    model: str
    recipe: str
    text: str
    output: str
    scratch: str | None = None


class Task(StrictModel):
    """One run; without a calibration ``model`` itself is measured."""

    name: str
    model: str
    calibration: Calibration | None = None
    evaluation: Evaluation


def run(task: Task) -> dict[str, Any]:
    """What a record of sweep.json keeps of a run.

    ``calibration_seconds`` is None where this process did not do all of it: the
    checkpoint was there, or learning went on from a snapshot.

    Raises:
        LowbitError: as :func:`.pipeline.calibrate` and :func:`.evaluate.evaluate`.
    """
    model, seconds = task.model, None
    if task.calibration is not None:
        model = task.calibration.output
        if not Path(model).exists():
            seconds = _calibrate(task.name, task.calibration)
    print(f"measuring {model}", flush=True)
    return {
        "calibration_seconds": seconds,
        **measure(model, task.evaluation),
        "threads": torch.get_num_threads(),
        "cpu": f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}",
        "versions": {package: version(package) for package in PACKAGES},
    }


def _calibrate(name: str, asked: Calibration) -> float | None:
    recipe = parse_recipe(asked.recipe.encode(), name)
    output = Path(asked.output)
    resume = recipe.learns and snapshot_path(output).exists()
    started = time.monotonic()
    calibrate(
        asked.model,
        output,
        recipe,
        Path(asked.text),
        "cpu",
        _log(),
        resume,
        None if asked.scratch is None else Path(asked.scratch),
        lambda estimate: print(estimate, flush=True),
    )
    return None if resume else round(time.monotonic() - started, 1)


def measure(model: str, evaluation: Evaluation) -> dict[str, Any]:
    """Perplexity and accuracy by the reference model, None for what is not asked.

    Raises:
        LowbitError: for what cannot be measured, before the model is loaded.
    """
    target = Target.open(model)
    parts: list[torch.Tensor] = []
    if evaluation.data is not None:
        data = Path(evaluation.data)
        parts = text_windows(target, data, evaluation.seq_len, evaluation.max_tokens)
    tasks = read_tasks([Path(path) for path in evaluation.tasks], evaluation.limit)
    choices = tokenize_tasks(target, tasks)
    lengths = [len(scored.token_ids) for task in choices for scored in task]
    found: dict[str, Any] = {}
    with open_scorer(target, max(lengths + [len(part) for part in parts])) as scorer:
        if parts:
            text = text_perplexity(
                scorer, parts, evaluation.seq_len, str(evaluation.data)
            )
            found |= {"perplexity": text.perplexity, "tokens": text.tokens}
        if tasks:
            answers = score_tasks(scorer, tasks, choices)
            found["tasks"] = {score.task: _figures(score) for score in answers.tasks}
            found["mean"] = _figures(answers.mean)
    return found


def _figures(score: Score) -> dict[str, float]:
    figures = asdict(score)
    del figures["task"]
    return figures


def _log() -> Any:
    """Prints where a calibration is, now and then."""
    last = float("-inf")

    def progress(done: int, total: int, what: str) -> None:
        nonlocal last
        if time.monotonic() >= last + LOG_SECONDS:
            last = time.monotonic()
            now = datetime.datetime.now().isoformat(" ", "seconds")
            print(f"{now} {done}/{total} {what}", flush=True)

    return progress


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--task", required=True)
    parser.add_argument("--output", required=True, type=Path)
    arguments = parser.parse_args()
    try:
        result = run(Task.model_validate_json(arguments.task))
    except LowbitError as error:
        print(f"error: {error}", flush=True)
        raise SystemExit(1) from None
    except KeyboardInterrupt:
        print("interrupted", flush=True)
        raise SystemExit(130) from None
    arguments.output.write_text(json.dumps(result))


if __name__ == "__main__":
    main()
