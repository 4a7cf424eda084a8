# SPDX-License-Identifier: Apache-2.0
"""What a sweep will do: its runs, and that nothing stands against them."""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...errors import ConfigError
from ...lowbit_checkpoint import expected_tensors
from ...schema import LowbitConfig
from ..choices import read_tasks, tokenize_tasks
from ..estimate import (
    LIBRARIES,
    Estimator,
    Speed,
    available_memory,
    readable_size,
)
from ..evaluate import text_windows
from ..pipeline import configure, held_out_windows, open_scratch
from ..plan import served_shape
from ..recipe import Recipe, load_recipe
from ..scoring import Target, reference_memory
from ..source import Source
from ..text import calibration_windows
from ..writer import COMPANIONS, largest_bytes
from .one import Evaluation
from .store import FLOAT

_ANY_SPEED = Speed(1.0, 1.0, 1.0)  # memory does not depend on it


@dataclass(frozen=True)
class Settings:
    """What a user asks for.

    Attributes:
        model: directory or hub name.
        recipes: names and files.
        schemes: of every recipe; its own where empty.
        seeds: of every recipe; its own where empty.
        samples, seq_len, vocab_bits: of every recipe; its own where None.
        text: that is calibrated on.
        evaluation: what is measured.
        scratch: as in :func:`.pipeline.calibrate`.
    """

    model: str
    recipes: Sequence[str]
    schemes: Sequence[str]
    seeds: Sequence[int]
    samples: int | None
    seq_len: int | None
    vocab_bits: int | None
    text: Path
    evaluation: Evaluation
    scratch: Path | None


@dataclass(frozen=True)
class Run:
    """A calibration, or the float model, and what it follows from.

    Attributes:
        name: ``RECIPE-SCHEME-seedN``, or ``float``.
        recipe: None for the float model.
        made_from: as in :class:`.store.Record`.
        measuring: bytes of memory that measuring it takes, at most.
        output: bytes of the checkpoint's tensors, at most.
    """

    name: str
    recipe: Recipe | None
    made_from: dict[str, str]
    measuring: int
    output: int = 0


@dataclass(frozen=True)
class Plan:
    """A sweep that can start.

    Attributes:
        source: the model; of the hub the revision that was found at the start.
        text, scratch: as in :class:`Settings`, absolute.
        evaluation: with absolute paths.
        measured_on: as in :class:`.store.Record`.
        runs: in the order to start them, the float model first; then seed by seed, so
            that half a sweep is a whole table.
    """

    source: Source
    text: Path
    scratch: Path | None
    evaluation: Evaluation
    measured_on: dict[str, Any]
    runs: tuple[Run, ...]

    def check_memory(self, waiting: Iterable[Run], workers: int) -> None:
        """Refuse more runs at a time than this machine has memory for.

        Raises:
            ConfigError: naming what is needed, what is there, and how many would fit.
        """
        runs = sorted(waiting, key=self.memory_of, reverse=True)[:workers]
        needs, there = list(map(self.memory_of, runs)), available_memory()
        if sum(needs) <= there:
            return
        fitting = max(n for n in range(len(needs)) if sum(needs[:n]) <= there)
        help_ = f"--workers {fitting} fits"
        if not fitting and runs[0].measuring > there:
            help_ = (
                f"measuring {runs[0].name} by the reference model takes "
                f"{readable_size(runs[0].measuring)}, which no option but a smaller "
                "--seq-len changes"
            )
        elif not fitting:
            help_ = "use --scratch DIR, or fewer or shorter samples"
        raise ConfigError(
            f"{len(needs)} runs at a time take about "
            f"{readable_size(sum(needs))} of memory, {readable_size(there)} are "
            f"available; {help_}"
        )

    def memory_of(self, run: Run) -> int:
        """Bytes that a run takes: to calibrate, then to measure."""
        return max(self.calibrating(run), run.measuring)

    def calibrating(self, run: Run) -> int:
        """Bytes that a calibration takes, none for the float model."""
        if run.recipe is None:
            return 0
        shape, samples = self.source.shape, run.recipe.data.samples
        windows = samples + held_out_windows(samples)
        estimator = Estimator(shape, run.recipe.sized(shape), windows, run.output)
        return estimator.estimate(_ANY_SPEED, self.scratch is not None).memory


def make_plan(settings: Settings) -> Plan:
    """Read all that a sweep needs, and check that every run can start.

    Raises:
        LowbitError: for whatever cannot be used.
    """
    recipes = _recipes(settings)
    evaluation = settings.evaluation
    if evaluation.data is None and not evaluation.tasks:
        raise ConfigError("pass --data, --tasks or both")
    source = Source.open(settings.model)
    configs = [
        configure(source, r.sized(source.shape), settings.model) for r in recipes
    ]
    if settings.scratch is not None:
        open_scratch(settings.scratch, "cpu")
    target = Target.open(str(source.directory))
    measured_on, longest = _measured_on(target, evaluation)
    _check_text(source, recipes, settings.text)
    of_model, of_text = _of_model(source), _sha256([settings.text])
    measuring = _measuring(source, None, 0, longest)
    runs = [Run(FLOAT, None, {"model": of_model}, measuring)]
    for recipe, config in zip(recipes, configs, strict=True):
        name = f"{recipe.name}-{recipe.scheme}-seed{recipe.seed}"
        sized = recipe.sized(source.shape).sha256()
        made_from = {"model": of_model, "recipe": sized, "text": of_text}
        specs = expected_tensors(served_shape(source.shape, config), config)
        output = sum(map(largest_bytes, specs.values()))
        measuring = _measuring(source, config, output, longest)
        runs.append(Run(name, recipe, made_from, measuring, output))
    tasks = tuple(str(Path(path).absolute()) for path in evaluation.tasks)
    data = evaluation.data and str(Path(evaluation.data).absolute())
    return Plan(
        source=source,
        text=settings.text.absolute(),
        scratch=settings.scratch and settings.scratch.absolute(),
        evaluation=evaluation.model_copy(update={"tasks": tasks, "data": data}),
        measured_on=measured_on,
        runs=tuple(runs),
    )


def _recipes(settings: Settings) -> list[Recipe]:
    """Every recipe with every seed and scheme, in that order of nesting."""
    loaded: dict[str, Recipe] = {}
    given: dict[str, str] = {}
    for word in settings.recipes:
        recipe = load_recipe(word)
        other = given.get(recipe.name)
        if other == word:
            raise ConfigError(f"--recipe {word} is given twice")
        if other is not None:
            raise ConfigError(
                f"recipes {other} and {word} are both called {recipe.name}; their key "
                "`name` tells them apart"
            )
        loaded[recipe.name], given[recipe.name] = recipe, word
    for option, values in (("scheme", settings.schemes), ("seed", settings.seeds)):
        for value in values:
            if list(values).count(value) > 1:
                raise ConfigError(f"--{option} {value} is given twice")
    # None: the recipe's own.
    seeds: Sequence[int | None] = settings.seeds or [None]
    schemes: Sequence[str | None] = settings.schemes or [None]
    return [
        recipe.override(
            scheme, settings.samples, settings.seq_len, seed, settings.vocab_bits
        )
        for seed in seeds
        for recipe in loaded.values()
        for scheme in schemes
    ]


def _check_text(source: Source, recipes: Sequence[Recipe], text: Path) -> None:
    """Refuse a text that is too short for one of the recipes."""
    sizes: dict[int, int] = {}
    for recipe in recipes:
        samples = recipe.training_samples() + held_out_windows(recipe.data.samples)
        length = recipe.data.seq_len
        sizes[length] = max(samples, sizes.get(length, 0))
    for length, samples in sizes.items():
        calibration_windows(str(source.directory), text, samples, length, 0)


def _measuring(
    source: Source, config: LowbitConfig | None, output: int, longest: int
) -> int:
    shape = source.shape if config is None else served_shape(source.shape, config)
    return reference_memory(shape, config, output, longest) + LIBRARIES


def _measured_on(target: Target, evaluation: Evaluation) -> tuple[dict[str, Any], int]:
    """As in :class:`.store.Record`, and tokens of the longest sequence."""
    found: dict[str, Any] = {}
    longest = 0
    if evaluation.data is not None:
        data, seq_len = Path(evaluation.data), evaluation.seq_len
        text_windows(target, data, seq_len, evaluation.max_tokens)
        found |= {"text": _sha256([data]), "seq_len": seq_len}
        longest = seq_len
        if evaluation.max_tokens is not None:
            found["max_tokens"] = evaluation.max_tokens
    if evaluation.tasks:
        paths = [Path(path) for path in evaluation.tasks]
        tasks = read_tasks(paths, evaluation.limit)
        names = [task.name for task in tasks]
        for name in names:
            if names.count(name) > 1:
                raise ConfigError(f"--tasks: two files are called {name}")
        choices = tokenize_tasks(target, tasks)
        lengths = (len(scored.token_ids) for task in choices for scored in task)
        longest = max(longest, *lengths)
        found["tasks"] = {task.name: _sha256([Path(task.source)]) for task in tasks}
        if evaluation.limit is not None:
            found["limit"] = evaluation.limit
    return found, longest


def _of_model(source: Source) -> str:
    """Of weights, config and tokenizer."""
    files = {path.name: path for path, _ in source.files.values()}
    for pattern in ("config.json", *COMPANIONS):
        files |= {path.name: path for path in source.directory.glob(pattern)}
    return _sha256(path for _, path in sorted(files.items()) if path.is_file())


def _sha256(paths: Iterable[Path]) -> str:
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()
