# SPDX-License-Identifier: Apache-2.0
"""``vllm-lowbit evaluate``."""

import json
import sys
from contextlib import redirect_stdout
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Column, Table

from ..errors import ConfigError
from .progress import progress_bar

if TYPE_CHECKING:
    from ..calibrate.choices import ChoiceEvaluation, Score


def evaluate(
    model: Annotated[
        str,
        typer.Argument(metavar="MODEL", help="Directory of a plain or lowbit model."),
    ],
    data: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="UTF-8 text to measure the perplexity of."),
    ] = None,
    tasks: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="FILE|DIR",
            help="Multiple choice: .jsonl of ctx, choices and gold, or of BLiMP; may "
            "be given again.",
        ),
    ] = None,
    seq_len: Annotated[int, typer.Option(help="Tokens of a window of --data.")] = 512,
    max_tokens: Annotated[
        int | None,
        typer.Option(help="Use the first N tokens of --data; all by default."),
    ] = None,
    limit: Annotated[
        int | None,
        typer.Option(help="Use the first N questions of each task; all by default."),
    ] = None,
    backend: Annotated[
        str,
        typer.Option(
            metavar="reference|vllm",
            help="The reference model, or vLLM's own engine in eager mode.",
        ),
    ] = "reference",
    scheme: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Quantize a plain model while loading, for instance w4a4kv4.",
        ),
    ] = None,
    dtype: Annotated[
        str,
        typer.Option(
            metavar="auto|float32|bfloat16|float16",
            help="auto: float32 by the reference, the model's own by vLLM.",
        ),
    ] = "auto",
    as_json: Annotated[
        bool, typer.Option("--json", help="Print JSON instead of text.")
    ] = False,
    verbose: Annotated[
        bool, typer.Option("--verbose", help="Show vLLM's log, on stderr.")
    ] = False,
) -> None:
    """Measure the perplexity of a text, or accuracy on multiple choice.

    A text is cut into windows that do not overlap. A question is answered by the choice
    that is most likely after its context.
    """
    from ..calibrate.choices import evaluate_choices
    from ..calibrate.evaluate import evaluate

    if (data is None) == (not tasks):
        raise ConfigError("pass either --data or --tasks")
    check_used(data, tasks, max_tokens, limit)
    # stdout has the result only; vLLM's log would go there.
    with redirect_stdout(sys.stderr), progress_bar("evaluating") as progress:
        run = (backend, scheme, dtype, progress, verbose)
        if data is not None:
            result = evaluate(model, data, seq_len, max_tokens, *run)
        else:
            answers = evaluate_choices(model, tasks or [], limit, *run)
    if as_json:
        print(json.dumps(asdict(answers if data is None else result), indent=2))
    elif data is None:
        _show(answers)
    else:
        print(
            f"perplexity {result.perplexity:.4f} over {result.tokens} predicted tokens"
        )
        print(
            f"{result.model}: scheme {result.scheme}, backend {result.backend}, "
            f"{result.dtype}, windows of {result.seq_len} tokens of {result.data}"
        )


def check_used(
    data: Path | None,
    tasks: list[Path] | None,
    max_tokens: int | None,
    limit: int | None,
) -> None:
    """Raise ConfigError for a part of what is not measured at all."""
    if max_tokens is not None and data is None:
        raise ConfigError("--max-tokens has no effect without --data, remove it")
    if limit is not None and not tasks:
        raise ConfigError("--limit has no effect without --tasks, remove it")


def _show(answers: "ChoiceEvaluation") -> None:
    task = Column("task", overflow="fold")
    table = Table(task, "questions", "accuracy", "per byte")
    shown = answers.tasks if len(answers.tasks) == 1 else (*answers.tasks, answers.mean)
    for score in shown:
        table.add_row(score.task, str(score.items), *_shares(score))
    # Names come from files: no markup in them.
    Console(markup=False, highlight=False).print(table)
    print(
        f"{answers.model}: scheme {answers.scheme}, backend {answers.backend}, "
        f"{answers.dtype}; +- is the standard error, the mean counts every task the "
        "same"
    )


def _shares(score: "Score") -> tuple[str, str]:
    return (
        f"{score.accuracy:.4f} +- {score.stderr:.4f}",
        f"{score.accuracy_norm:.4f} +- {score.stderr_norm:.4f}",
    )
