# SPDX-License-Identifier: Apache-2.0
"""``vllm-lowbit export``."""

import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import Annotated

import typer

from .progress import progress_bar


def export(
    checkpoint: Annotated[
        Path,
        typer.Argument(
            metavar="CHECKPOINT", help="Directory of a lowbit checkpoint: w4a16, w8a8."
        ),
    ],
    output: Annotated[
        Path,
        typer.Option(
            "--output", "-o", metavar="OUT", help="Directory to make; must not exist."
        ),
    ],
    format: Annotated[
        str,
        typer.Option(metavar="compressed-tensors", help="What OUT will be."),
    ],
) -> None:
    """Write a checkpoint that vLLM serves without this plugin."""
    from ..calibrate.export import export

    with redirect_stdout(sys.stderr), progress_bar("exporting") as progress:
        scheme = export(checkpoint, output, format, progress)
    print(f"{output}: {scheme} as {format}, serve it with: vllm serve {output}")
