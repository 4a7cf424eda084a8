# SPDX-License-Identifier: Apache-2.0
"""``vllm-lowbit report``."""

import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import Annotated

import typer

from .progress import progress_bar


def report(
    checkpoint: Annotated[
        Path,
        typer.Argument(metavar="CHECKPOINT", help="Directory of a quantized model."),
    ],
    base: Annotated[
        Path,
        typer.Option(metavar="MODEL", help="Plain model that it was made from."),
    ],
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            metavar="DIR",
            help="Directory to make; CHECKPOINT/report, linked from the model card.",
        ),
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="UTF-8 text to measure the perplexity of; without, windows of the "
            "calibration text in the package are looked at.",
        ),
    ] = None,
    tasks: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="FILE|DIR", help="Multiple choice, as in evaluate; again for more."
        ),
    ] = None,
    samples: Annotated[int, typer.Option(help="Windows to look at.")] = 4,
    seq_len: Annotated[int, typer.Option(help="Tokens of a window.")] = 512,
    max_tokens: Annotated[
        int, typer.Option(help="Tokens of --data for the perplexity.")
    ] = 20_000,
    limit: Annotated[
        int | None, typer.Option(help="Questions of each task; all by default.")
    ] = None,
) -> None:
    """Write an HTML page with pictures: a checkpoint beside its base model.

    Magnitudes of activations before and after the transforms, errors of every block,
    how well grids are used, losses of the calibration, perplexity and accuracy.
    """
    from ..calibrate.report import write_report

    with redirect_stdout(sys.stderr), progress_bar("reporting") as progress:
        page = write_report(
            checkpoint,
            base,
            output,
            data,
            tasks,
            samples,
            seq_len,
            max_tokens,
            limit,
            progress,
        )
    print(page)
