# SPDX-License-Identifier: Apache-2.0
"""``vllm-lowbit calibrate``."""

import math
import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import Annotated

import typer

from .progress import progress_bar


def calibrate(
    model: Annotated[
        str,
        typer.Argument(metavar="MODEL", help="Plain model: a directory or hub name."),
    ],
    output: Annotated[
        Path,
        typer.Option(
            "--output", "-o", metavar="OUT", help="Directory to make; must not exist."
        ),
    ],
    recipe: Annotated[
        str,
        typer.Option(
            metavar="NAME|FILE",
            help="rtn, smoothquant, gptq, gptaq, quarot, quarot-gptq, omniquant, "
            "spinquant, ostquant, lowbit, lowbit-best, or a YAML file.",
        ),
    ],
    scheme: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="For instance w4a16-g128; the recipe's."),
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="UTF-8 text; a part of WikiText-2."),
    ] = None,
    samples: Annotated[
        int | None, typer.Option(help="Windows to calibrate on; the recipe's.")
    ] = None,
    seq_len: Annotated[
        int | None, typer.Option(help="Tokens of a window; the recipe's.")
    ] = None,
    vocab_bits: Annotated[
        int | None,
        typer.Option(metavar="8|16", help="Of embedding and head; the recipe's."),
    ] = None,
    seed: Annotated[
        int | None, typer.Option(help="Of signs and windows; the recipe's.")
    ] = None,
    device: Annotated[
        str, typer.Option(help="auto, cpu, cuda or any of torch's.")
    ] = "auto",
    resume: Annotated[
        bool,
        typer.Option(
            "--resume", help="Go on with learning from OUT.snapshot, to the same bytes."
        ),
    ] = False,
    scratch: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Keep hidden states and float weights in files there, not in memory.",
        ),
    ] = None,
) -> None:
    """Make a lowbit checkpoint that `vllm serve OUT` recognises by itself."""
    from ..calibrate.learn.snapshot import snapshot_path
    from ..calibrate.pipeline import calibrate
    from ..calibrate.recipe import load_recipe
    from ..calibrate.text import default_text

    chosen = load_recipe(recipe).override(scheme, samples, seq_len, seed, vocab_bits)
    text = data or default_text()
    try:
        with redirect_stdout(sys.stderr), progress_bar("calibrating") as progress:
            report = calibrate(
                model,
                output,
                chosen,
                text,
                device,
                progress,
                resume,
                scratch,
                lambda estimate: print(estimate, flush=True),
            )
    except KeyboardInterrupt:
        kept = snapshot_path(output)
        if not kept.exists():
            raise
        print(
            f"interrupted; {kept} holds what was learned: the same command with "
            "--resume goes on from there",
            file=sys.stderr,
        )
        raise typer.Exit(130) from None
    if report.untouched_experts:
        print(
            f"{report.untouched_experts} experts saw no token of {text.name}: their "
            "weights are rounded to nearest; more --samples may reach them"
        )
    if report.residual_is_replaced:
        print(
            "the norms after attention and MLP of this model let no rotation of the "
            "residual stream pass: online Hadamards before q, k, v and gate, up take "
            "its place"
        )
    plain, quantized = (
        math.exp(loss) for loss in (report.held_out.plain, report.held_out.quantized)
    )
    print(f"{output}: {report.config.scheme.name}, serve it with: vllm serve {output}")
    print(
        f"perplexity {quantized:.2f}, of the float model {plain:.2f}, on "
        f"{report.held_out_tokens} tokens of {text.name} that were not calibrated on"
    )
