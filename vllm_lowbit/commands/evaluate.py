# SPDX-License-Identifier: Apache-2.0
"""``vllm-lowbit evaluate``."""

import json
import sys
from contextlib import redirect_stdout
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from .progress import progress_bar


def evaluate(
    model: Annotated[
        str,
        typer.Argument(metavar="MODEL", help="Directory of a plain or lowbit model."),
    ],
    data: Annotated[Path, typer.Option(metavar="FILE", help="UTF-8 text.")],
    seq_len: Annotated[int, typer.Option(help="Tokens of a window.")] = 512,
    max_tokens: Annotated[
        int | None,
        typer.Option(help="Use the first N tokens of the text; all by default."),
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
    """Measure the perplexity of a text, in windows that do not overlap."""
    from ..calibrate.evaluate import evaluate

    # stdout has the result only; vLLM's log would go there.
    with redirect_stdout(sys.stderr), progress_bar("evaluating") as progress:
        result = evaluate(
            model, data, seq_len, max_tokens, backend, scheme, dtype, progress, verbose
        )
    if as_json:
        print(json.dumps(asdict(result), indent=2))
        return
    print(f"perplexity {result.perplexity:.4f} over {result.tokens} predicted tokens")
    print(
        f"{result.model}: scheme {result.scheme}, backend {result.backend}, "
        f"{result.dtype}, windows of {result.seq_len} tokens of {result.data}"
    )
