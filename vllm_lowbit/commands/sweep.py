# SPDX-License-Identifier: Apache-2.0
"""``vllm-lowbit sweep``."""

import signal
import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from ..errors import ConfigError
from .evaluate import check_used

if TYPE_CHECKING:
    from ..calibrate.sweep.run import Sweep
    from ..calibrate.sweep.table import SweepTable


def sweep(
    model: Annotated[
        str,
        typer.Argument(metavar="MODEL", help="Plain model: a directory or hub name."),
    ],
    output: Annotated[
        Path,
        typer.Option(
            "--output",
            "-o",
            metavar="DIR",
            help="Directory for sweep.json, sweep.md, logs and checkpoints; goes on "
            "with the sweep that is in it.",
        ),
    ],
    recipe: Annotated[
        list[str],
        typer.Option(metavar="NAME|FILE", help="As in calibrate. Again for more."),
    ],
    scheme: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="Of every recipe; its own. Again for more."),
    ] = None,
    seed: Annotated[
        list[int] | None,
        typer.Option(metavar="N", help="Of every recipe; its own. Again for more."),
    ] = None,
    calibration_data: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="UTF-8 text to calibrate on; a part of WikiText-2."
        ),
    ] = None,
    samples: Annotated[
        int | None, typer.Option(help="Windows to calibrate on; the recipe's.")
    ] = None,
    calibration_seq_len: Annotated[
        int | None, typer.Option(help="Tokens of those; the recipe's.")
    ] = None,
    vocab_bits: Annotated[
        int | None,
        typer.Option(metavar="8|16", help="Of embedding and head; the recipe's."),
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="UTF-8 text to measure the perplexity of."),
    ] = None,
    tasks: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="FILE|DIR", help="Multiple choice, as in evaluate; again for more."
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
    workers: Annotated[
        int | None,
        typer.Option(
            help="Runs at a time, which share the cores; a core for each by default."
        ),
    ] = None,
    ray: Annotated[
        str | None,
        typer.Option(
            metavar="ADDRESS",
            help="Spread over a Ray cluster instead, a core for each run (extra "
            "`ray`). auto is the one of this machine, local starts one. Every node "
            "needs this package, and MODEL, DIR and the texts at the same paths.",
        ),
    ] = None,
    scratch: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Keep hidden states and float weights in files there, not in memory.",
        ),
    ] = None,
    remove_checkpoints: Annotated[
        bool,
        typer.Option("--remove-checkpoints", help="Each, once it is measured."),
    ] = False,
) -> None:
    """Calibrate by every recipe, scheme and seed, and measure what comes out.

    Each calibration is a process of its own, on the CPU; it and the float model are
    measured by the reference. The same command goes on where it was interrupted; what
    was measured from the same recipe, model and texts is not run again.
    """
    from ..calibrate.sweep.one import Evaluation
    from ..calibrate.sweep.plan import Settings, make_plan
    from ..calibrate.sweep.run import Sweep, Where
    from ..calibrate.text import default_text

    if ray is not None:
        if workers is not None:
            raise ConfigError(
                "--workers is of this machine, --ray of a cluster: pass one of them"
            )
        import ray as _  # noqa: F401  where it is missing, nothing starts
    elif workers is not None and workers < 1:
        raise ConfigError(f"--workers must be at least 1, got {workers}")
    check_used(data, tasks, max_tokens, limit)
    with redirect_stdout(sys.stderr):
        plan = make_plan(
            Settings(
                model=model,
                recipes=recipe,
                schemes=scheme or [],
                seeds=seed or [],
                samples=samples,
                seq_len=calibration_seq_len,
                vocab_bits=vocab_bits,
                text=calibration_data or default_text(),
                evaluation=Evaluation(
                    data=None if data is None else str(data),
                    seq_len=seq_len,
                    max_tokens=max_tokens,
                    tasks=tuple(map(str, tasks or [])),
                    limit=limit,
                ),
                scratch=scratch,
            )
        )
        where = Where(workers, ray)
        say = lambda line: print(line, flush=True)
        table = _run(Sweep(plan, output, where, not remove_checkpoints, say))
    _show(table, output)
    if table.problems():
        raise typer.Exit(1)


def _run(sweep: "Sweep") -> "SweepTable":
    # Its processes end as well, then.
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        return sweep.run()
    except KeyboardInterrupt:
        print(
            f"interrupted; {sweep.directory} holds what was done: the same command "
            "goes on from there",
            file=sys.stderr,
        )
        raise typer.Exit(130) from None
    finally:
        signal.signal(signal.SIGTERM, before)


def _show(table: "SweepTable", output: Path) -> None:
    # Names come from files: no markup in them.
    console = Console(markup=False, highlight=False)
    console.print(table.rich())
    for line in (*table.notes(), f"{output}: sweep.json, sweep.md"):
        console.print(line, soft_wrap=True)
    for line in table.problems():
        print(line, file=sys.stderr)
