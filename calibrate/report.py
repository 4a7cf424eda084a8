# SPDX-License-Identifier: Apache-2.0
"""The report of a checkpoint: one HTML page and its pictures."""

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from pydantic import ConfigDict

from ..errors import ConfigError, OutputError
from ..lowbit_checkpoint import RECIPE
from ..schema import LowbitConfig, StrictModel, validate
from .card import link_report
from .choices import ChoiceEvaluation, Score, evaluate_choices
from .evaluate import Evaluation, evaluate
from .figures import write_figures
from .files import read_text
from .observe import BLOCKS, PLACES, Observation, observe
from .perplexity import tokenize, windows
from .scoring import Target
from .text import default_text
from .writer import check_output

PAGE = "index.html"
CALIBRATION = "calibration.json"
MAX_BYTES = 1 << 26
Progress = Callable[[int, int, str], object]


class Calibration(StrictModel):
    """What a calibration wrote down; absent parts are empty."""

    model_config = ConfigDict(extra="ignore", strict=False)

    curves: dict[str, list[tuple[float, float]]] = {}
    """Step and loss, by the name of what was learned."""
    layers: dict[str, dict[str, float]] = {}
    """Numbers of each linear, by their names."""


@dataclass(frozen=True)
class Measured:
    """One row of the table: the base model's value beside the checkpoint's."""

    what: str
    base: str
    quantized: str


def write_report(
    checkpoint: Path,
    base: Path,
    output: Path | None = None,
    data: Path | None = None,
    tasks: list[Path] | None = None,
    samples: int = 4,
    seq_len: int = 512,
    max_tokens: int | None = 20_000,
    limit: int | None = None,
    progress: Progress = lambda done, total, what: None,
) -> Path:
    """Measure a checkpoint beside its base model and write what was found.

    Args:
        checkpoint: quantized.
        base: plain model it was made from.
        output: directory to make; None is ``report`` in the checkpoint, which its
            model card then links.
        data: UTF-8 text whose perplexity is measured, and whose first windows are
            looked at; None looks at the calibration text of the package, and measures
            no perplexity.
        tasks: multiple choice, as in :func:`.choices.read_tasks`.
        samples: windows to look at.
        seq_len: tokens of a window.
        max_tokens: of ``data``, for the perplexity; None is all.
        limit: questions of each task.
        progress: called with what is done, the total, and what is being done.

    Returns:
        path of the page.

    Raises:
        LowbitError: for a model, text or output that cannot be used; nothing is left.
        ModuleNotFoundError: without matplotlib, the extra ``report``.
    """
    import matplotlib  # noqa: F401  (before minutes of work)

    target = Target.open(str(checkpoint))
    output = output or checkpoint / "report"
    check_output(output)
    parts = _windows(target, data or default_text(), samples, seq_len)
    calibration = read_calibration(checkpoint)
    observation = observe(
        str(base), str(checkpoint), parts, _part(progress, "observing")
    )
    measured = list(_measured(checkpoint, base, data, seq_len, max_tokens, progress))
    answers = _answers(checkpoint, base, tasks or [], limit, progress)
    with _staged(output) as staging:
        captions = write_figures(staging, observation, calibration.curves)
        page = (
            _environment()
            .get_template("report.html.j2")
            .render(
                name=checkpoint.resolve().name,
                base=base.resolve().name,
                target=target,
                text=(data or default_text()).name,
                samples=len(parts),
                seq_len=seq_len,
                measured=measured,
                answers=answers,
                captions=captions,
                blocks=_block_rows(observation),
                places=_place_rows(observation),
                layers=calibration.layers,
                recipe=_recipe(checkpoint),
                provenance=_provenance(target),
                versions={name: version(name) for name in ("vllm-lowbit", "torch")},
            )
        )
        (staging / PAGE).write_text(page, encoding="utf-8")
    link_report(checkpoint, output / PAGE)
    return output / PAGE


def read_calibration(checkpoint: Path) -> Calibration:
    """What calibration.json says, nothing where there is none.

    Raises:
        ConfigError: naming the file, and the key that cannot be used.
    """
    path = checkpoint / CALIBRATION
    if not path.exists():
        return Calibration()
    try:
        data: Any = json.loads(read_text(path, MAX_BYTES))
    except ValueError as error:
        raise ConfigError(f"{path}: is not JSON: {error}") from None
    return validate(Calibration, data, str(path))


def _part(progress: Progress, what: str) -> Callable[[int, int], object]:
    return lambda done, total: progress(done, total, what)


def _windows(target: Target, text: Path, samples: int, seq_len: int) -> list[Any]:
    if samples < 1:
        raise ConfigError(f"samples must be at least 1, got {samples}")
    if not 2 <= seq_len <= target.max_positions:
        raise ConfigError(
            f"seq_len must be from 2 to max_position_embeddings "
            f"{target.max_positions} of {target.model}, got {seq_len}"
        )
    ids = tokenize(target.model, text, samples * seq_len)
    target.check_tokens([int(ids.max())])
    return windows(ids, seq_len)


def _measured(
    checkpoint: Path,
    base: Path,
    data: Path | None,
    seq_len: int,
    max_tokens: int | None,
    progress: Progress,
) -> Iterator[Measured]:
    if data is None:
        return

    def perplexity(model: Path, what: str) -> Evaluation:
        return evaluate(
            str(model),
            data,
            seq_len,
            max_tokens,
            progress=_part(progress, what),
        )

    plain = perplexity(base, "perplexity of the base model")
    quantized = perplexity(checkpoint, "perplexity of the checkpoint")
    yield Measured(
        f"perplexity of {data.name}, {plain.tokens} tokens in windows of {seq_len}",
        f"{plain.perplexity:.3f}",
        f"{quantized.perplexity:.3f}",
    )


def _answers(
    checkpoint: Path,
    base: Path,
    tasks: list[Path],
    limit: int | None,
    progress: Progress,
) -> list[tuple[Score, Score]]:
    """Scores of the base model and the checkpoint, task by task, the mean first."""
    if not tasks:
        return []

    def answer(model: Path, what: str) -> ChoiceEvaluation:
        return evaluate_choices(
            str(model), tasks, limit, progress=_part(progress, what)
        )

    plain = answer(base, "tasks by the base model")
    quantized = answer(checkpoint, "tasks by the checkpoint")
    return list(
        zip((plain.mean, *plain.tasks), (quantized.mean, *quantized.tasks), strict=True)
    )


@contextmanager
def _staged(output: Path) -> Iterator[Path]:
    """A hidden directory beside ``output`` that becomes it, or is removed."""
    parent = output.absolute().parent
    staging = None
    try:
        staging = Path(tempfile.mkdtemp(prefix=f".{output.name}-", dir=parent))
        yield staging
        staging.chmod(0o755)
        for path in staging.iterdir():
            path.chmod(0o644)
        os.rename(staging, output)
    except OSError as error:
        raise OutputError(f"output {output}: could not be written: {error}") from error
    finally:
        if staging is not None and staging.exists():
            shutil.rmtree(staging, ignore_errors=True)


def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        undefined=StrictUndefined,
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["percent"] = _percent
    return environment


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.2f}"


def _block_rows(observation: Observation) -> list[tuple[str, Any, Any]]:
    """Name of a block, its errors when rounded to nearest, and in the checkpoint."""
    names = dict(zip(BLOCKS, ("attention", "MLP"), strict=True))
    rows = []
    for block, ours in observation.errors["checkpoint"].items():
        layer, kind = block.split(".")[2:]
        plain = observation.errors["rtn"][block]
        rows.append((f"layer {layer}, {names[kind]}", plain, ours))
    return rows


def _place_rows(observation: Observation) -> list[tuple[str, Any]]:
    return [(f"layer {p.layer}, {PLACES[p.kind]}", p) for p in observation.places]


def _recipe(checkpoint: Path) -> str | None:
    path = checkpoint / RECIPE
    return read_text(path, MAX_BYTES) if path.is_file() else None


def _provenance(target: Target) -> dict[str, str]:
    stored = target.stored
    if not isinstance(stored, LowbitConfig) or stored.provenance is None:
        return {}
    made = stored.provenance.model_dump(mode="json", exclude_none=True)
    return {key.replace("_", " "): str(value) for key, value in made.items()}
