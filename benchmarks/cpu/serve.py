# SPDX-License-Identifier: Apache-2.0
"""End to end: each arm in an engine of its own, and through vLLM's own commands."""

from typing import Any

from . import commands, engine
from .arms import ARMS, LOWBIT, OURS, STOCK
from .options import Options

NAME = "serve"
ENGINE = "engine"


def cells(options: Options) -> list[str]:
    """The engine of every arm first, then the commands: one for every arm, two for the
    arms that matter most."""
    cells = [f"{ENGINE}: {arm}" for arm in ARMS]
    cells += [f"latency: {arm}" for arm in (*STOCK, *LOWBIT)]
    return cells + [f"throughput: {arm}" for arm in (*STOCK, OURS)]


def measure(cell: str, options: Options) -> dict[str, Any]:
    """One cell, see ``engine`` and ``commands``."""
    kind, _, name = cell.partition(": ")
    if kind == ENGINE:
        return engine.measure(name, options)
    return commands.measure(kind, name, options)
