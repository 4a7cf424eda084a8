# SPDX-License-Identifier: Apache-2.0
"""Multiple choice by likelihood: the choice a model finds most likely is its answer."""

import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Self

import torch
from pydantic import ConfigDict, Field, model_validator

from ..errors import ConfigError, LowbitError
from ..schema import StrictModel, shorten, validate
from .files import read_text
from .perplexity import Scored
from .scoring import Scorer, Target, check_backend, open_scorer
from .text import encode, load_tokenizer

MAX_CHARACTERS = 1 << 28
MEAN = "mean"


class Item(StrictModel):
    """One line of a task; other keys than these are left alone."""

    model_config = ConfigDict(extra="ignore")

    ctx: str
    """What every choice follows; may be empty."""
    choices: list[str] = Field(min_length=2)
    gold: int
    """Index of the right choice."""

    @model_validator(mode="after")
    def _is_a_question(self) -> Self:
        if not 0 <= self.gold < len(self.choices):
            raise ValueError(f"gold {self.gold} is none of {len(self.choices)} choices")
        if not all(choice.strip() for choice in self.choices):
            raise ValueError("a choice is empty")
        if len(set(self.choices)) < len(self.choices):
            raise ValueError("two choices are the same")
        return self


class _Pair(StrictModel):
    """A line of BLiMP (Warstadt et al., 2020)."""

    model_config = ConfigDict(extra="ignore")

    sentence_good: str
    sentence_bad: str


@dataclass(frozen=True)
class Task:
    """A file of items; ``source`` names it in errors, line i + 1 is ``items[i]``."""

    name: str
    source: str
    items: tuple[Item, ...]


@dataclass(frozen=True)
class Score:
    """Accuracy on a task.

    Attributes:
        task: its name, or ``mean``: of all tasks, each counting the same.
        items: questions.
        accuracy: share of them where the gold choice is more likely than all others.
        stderr: its standard error.
        accuracy_norm: the same by log-likelihood per UTF-8 byte of the choice.
        stderr_norm: its standard error.
    """

    task: str
    items: int
    accuracy: float
    stderr: float
    accuracy_norm: float
    stderr_norm: float


@dataclass(frozen=True)
class ChoiceEvaluation:
    """Scores, the mean first, and what was run as in :class:`.evaluate.Evaluation`."""

    mean: Score
    tasks: tuple[Score, ...]
    scheme: str
    backend: str
    dtype: str
    model: str


def evaluate_choices(
    model: str,
    paths: Sequence[Path],
    limit: int | None = None,
    backend: str = "reference",
    scheme: str | None = None,
    dtype: str = "auto",
    progress: Callable[[int, int], object] = lambda done, total: None,
    verbose: bool = False,
) -> ChoiceEvaluation:
    """Accuracy on tasks, from the likelihood of every choice after its context.

    Context and choice are joined by a space unless there is white space already, and
    tokenized as one; tokens that the context alone would begin with are not scored.
    An empty context is the tokenizer's token for the begin of a text, or for its end.

    Args:
        model: directory of a plain or quantized checkpoint, with its tokenizer.
        paths: files of :func:`read_tasks`, or directories of them.
        limit: questions of each file, from its start; None is all of them.
        scheme: a plain model is quantized to while loading, None for the float model.
        progress: called with the choices done and their number.
        backend, dtype, verbose: as in :func:`.scoring.open_scorer`.

    Raises:
        ConfigError: for an argument or a file that cannot be used; of what is wrong
            inside a file with its line.
        CheckpointError, UnsupportedError: for a model that cannot.
        LowbitError: when a likelihood is not finite.
        ModuleNotFoundError: where transformers or, if asked for, vLLM is missing.
    """
    check_backend(backend, dtype)
    target = Target.open(model, scheme)
    tasks = read_tasks(paths, limit)
    scored = tokenize_tasks(target, tasks)
    longest = max(len(s.token_ids) for task in scored for s in task)
    with open_scorer(target, longest, backend, dtype, verbose) as scorer:
        return score_tasks(scorer, tasks, scored, progress)


def read_tasks(paths: Sequence[Path], limit: int | None = None) -> list[Task]:
    """Tasks from ``.jsonl`` files: a question a line.

    A line is ``{"ctx": ..., "choices": [...], "gold": 0}``, or BLiMP's own
    ``{"sentence_good": ..., "sentence_bad": ...}``.

    Args:
        paths: files, and directories whose ``.jsonl`` files are taken.
        limit: questions of each file.

    Raises:
        ConfigError: as ``FILE:LINE: problem``, or for a path or limit that cannot be
            used.
    """
    if limit is not None and limit < 1:
        raise ConfigError(f"limit must be at least 1, got {limit}")
    files = [file for path in paths for file in _files(path)]
    return [Task(file.stem, str(file), tuple(_items(file, limit))) for file in files]


def _files(path: Path) -> list[Path]:
    if not path.is_dir():
        return [path]
    files = sorted(path.glob("*.jsonl"))
    if not files:
        raise ConfigError(f"{path}: has no .jsonl file")
    return files


def _items(file: Path, limit: int | None) -> Iterator[Item]:
    lines = read_text(file, MAX_CHARACTERS).removesuffix("\n").split("\n")
    if lines == [""]:
        raise ConfigError(f"{file}: is empty")
    for number, line in enumerate(lines[:limit], 1):
        yield _item(line, f"{file}:{number}")


def _item(line: str, source: str) -> Item:
    try:
        data: Any = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{source}: is not JSON: {error}") from None
    if not isinstance(data, dict):
        raise ConfigError(f"{source}: must be an object, got {shorten(data)}")
    if "sentence_good" in data:
        pair = validate(_Pair, data, source)
        data = {
            "ctx": "",
            "choices": [pair.sentence_good, pair.sentence_bad],
            "gold": 0,
        }
    return validate(Item, data, source)


def tokenize_tasks(target: Target, tasks: Sequence[Task]) -> list[list[Scored]]:
    """Every choice of a task as a sequence, in order.

    Raises:
        ConfigError: naming file and line of a question that is too long, or has no
            context and the tokenizer no token to stand for it.
    """
    tokenizer = load_tokenizer(target.model)
    scored = []
    for task in tasks:
        sequences = []
        for number, item in enumerate(task.items, 1):
            source = f"{task.source}:{number}"
            for choice in item.choices:
                sequence = _sequence(tokenizer, item.ctx, choice, source)
                if len(sequence.token_ids) > target.max_positions:
                    raise ConfigError(
                        f"{source}: context and choice have {len(sequence.token_ids)} "
                        f"tokens, max_position_embeddings of {target.model} is "
                        f"{target.max_positions}"
                    )
                target.check_tokens(sequence.token_ids.tolist())
                sequences.append(sequence)
        scored.append(sequences)
    return scored


def _sequence(tokenizer: Any, context: str, choice: str, source: str) -> Scored:
    blank = context == "" or context[-1].isspace() or choice[0].isspace()
    whole = encode(tokenizer, context + ("" if blank else " ") + choice)
    # A space at its end would be a token of its own.
    before = encode(tokenizer, context.rstrip())
    start = 0
    while start < min(len(before), len(whole) - 1) and before[start] == whole[start]:
        start += 1
    if start == 0:
        first = tokenizer.bos_token_id
        first = tokenizer.eos_token_id if first is None else first
        if first is None:
            raise ConfigError(
                f"{source}: has no context, and the tokenizer has no token for the "
                "begin or end of a text to stand for it"
            )
        whole, start = [first, *whole], 1
    return Scored(torch.tensor(whole, dtype=torch.int64), start)


def score_tasks(
    scorer: Scorer,
    tasks: Sequence[Task],
    scored: Sequence[Sequence[Scored]],
    progress: Callable[[int, int], object] = lambda done, total: None,
) -> ChoiceEvaluation:
    """Scores by a model that runs.

    Args:
        scorer: of :func:`.scoring.open_scorer`.
        tasks: of :func:`read_tasks`.
        scored: of :func:`tokenize_tasks`.
        progress: called with the choices done and their number.

    Raises:
        LowbitError: when a likelihood is not finite.
    """
    total = sum(map(len, scored))
    losses: list[float] = []
    progress(0, total)
    for loss in scorer.losses(s for sequences in scored for s in sequences):
        if not math.isfinite(loss):
            raise LowbitError(
                f"{scorer.target.model}: the loss of a choice is {loss}: the model's "
                "logits are not finite"
            )
        losses.append(loss)
        progress(len(losses), total)
    ends = [0]
    for sequences in scored:
        ends.append(ends[-1] + len(sequences))
    scores = tuple(
        _score(task, losses[start:end])
        for task, (start, end) in zip(tasks, pairwise(ends), strict=True)
    )
    return ChoiceEvaluation(
        mean=_mean(scores),
        tasks=scores,
        scheme=scorer.target.scheme,
        backend=scorer.backend,
        dtype=scorer.dtype,
        model=scorer.target.model,
    )


def _score(task: Task, losses: Sequence[float]) -> Score:
    plain, normalised, done = 0, 0, 0
    for item in task.items:
        own = losses[done : done + len(item.choices)]
        done += len(own)
        sizes = [len(choice.encode()) for choice in item.choices]
        per_byte = [loss / size for loss, size in zip(own, sizes, strict=True)]
        plain += _is_least(own, item.gold)
        normalised += _is_least(per_byte, item.gold)
    count = len(task.items)
    accuracy, accuracy_norm = plain / count, normalised / count
    return Score(
        task=task.name,
        items=count,
        accuracy=accuracy,
        stderr=_stderr(accuracy, count),
        accuracy_norm=accuracy_norm,
        stderr_norm=_stderr(accuracy_norm, count),
    )


def _is_least(losses: Sequence[float], gold: int) -> bool:
    """Whether the gold choice has the least loss; a tie is no answer."""
    others = (loss for index, loss in enumerate(losses) if index != gold)
    return losses[gold] < min(others)


def _stderr(accuracy: float, count: int) -> float:
    """Of the mean of ``count`` zeros and ones, from their sample variance."""
    return math.sqrt(accuracy * (1 - accuracy) / max(1, count - 1))


def _mean(scores: Sequence[Score]) -> Score:
    count = len(scores)

    def together(errors: list[float]) -> float:
        return math.hypot(*errors) / count

    return Score(
        task=MEAN,
        items=sum(score.items for score in scores),
        accuracy=math.fsum(score.accuracy for score in scores) / count,
        stderr=together([score.stderr for score in scores]),
        accuracy_norm=math.fsum(score.accuracy_norm for score in scores) / count,
        stderr_norm=together([score.stderr_norm for score in scores]),
    )
