# SPDX-License-Identifier: Apache-2.0
"""The ``vllm-lowbit`` command: options of its own, and how errors are shown."""

import sys
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from . import __version__
from .commands.calibrate import calibrate
from .commands.env import env
from .commands.evaluate import evaluate
from .commands.export import export
from .commands.inspect import inspect
from .commands.report import report
from .commands.sweep import sweep
from .errors import LowbitError

# Packages that some commands need, and the extra of ours that installs each.
EXTRAS = {
    "compressed_tensors": "calibrate",
    "huggingface_hub": "calibrate",
    "jinja2": "calibrate",
    "matplotlib": "report",
    "ray": "ray",
    "transformers": "calibrate",
    "yaml": "calibrate",
    "vllm": "serve",
}


class _Group(TyperGroup):
    """Shows what a user can act on as one message, without a traceback."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except LowbitError as error:
            message = str(error)
        except ModuleNotFoundError as error:
            if error.name not in EXTRAS:
                raise
            message = (
                f"the package {error.name} is not installed; this command needs it: "
                f"pip install 'vllm-lowbit[{EXTRAS[error.name]}]'"
            )
        print(f"error: {message}", file=sys.stderr)
        raise typer.Exit(1)


app = typer.Typer(
    cls=_Group,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def _print_version(asked: bool) -> None:
    if asked:
        print(f"vllm-lowbit {__version__}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool,
        typer.Option(
            "--version",
            help="Print the version and exit.",
            callback=_print_version,
            is_eager=True,
        ),
    ] = False,
) -> None:
    """4-bit weights, activations and KV cache for stock vLLM."""


for command in (calibrate, evaluate, sweep, report, inspect, export, env):
    app.command()(command)
