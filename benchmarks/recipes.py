# SPDX-License-Identifier: Apache-2.0
"""Perplexity of every built-in recipe, by the reference and by vLLM itself.

    python -m benchmarks.recipes

calibrates on the text that ships with the package, measures on WikiText-2 test, and
writes results/recipes.json and results/recipes.md. One process per cell, as many at a
time as there are cores; ``--workers 1`` gives each cell all of them.
"""

import argparse
import json
import math
import os
import tempfile
from pathlib import Path
from typing import Any

from rich.progress import Progress

from vllm_lowbit.calibrate.processes import Ended, Processes, run_here

from .environment import as_line, describe

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results"
TEXT = Path(__file__).parent / "data" / "wikitext-2" / "test.txt"
MODELS = ("ref-7m", "ref-7m-outliers")
SCHEMES = ("w4a4kv4", "w4a16", "w4a8kv4")
LOAD_TIME = "load time (the flag alone)"
SEEDS = (0, 1, 2)
# Row of the table: recipe and the seeds to choose from by calibration loss.
RECIPES: dict[str, tuple[str, tuple[int, ...]]] = {
    "rtn": ("rtn", SEEDS[:1]),
    "gptq": ("gptq", SEEDS[:1]),
    "quarot, best of 3 seeds": ("quarot", SEEDS),
    "quarot-gptq": ("quarot-gptq", SEEDS[:1]),
    "lowbit": ("lowbit", SEEDS[:1]),
}
ROWS = ("float", LOAD_TIME, *RECIPES)
BACKENDS = ("reference", "vllm")
# Without GPTQ the text only chooses the seed.
RTN_SAMPLES = 32
Cell = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--max-tokens", type=int, default=40_000)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--cell", help=argparse.SUPPRESS)
    parser.add_argument("--output", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.workers < 1:
        parser.error(f"argument --workers: at least 1, got {arguments.workers}")
    if arguments.cell:
        cell = _measure(json.loads(arguments.cell))
        arguments.output.write_text(json.dumps(cell))
        return
    sizes = {"max_tokens": arguments.max_tokens, "seq_len": arguments.seq_len}
    cells: list[Cell] = [
        {"model": model, "row": row, "scheme": scheme, **sizes}
        for row in ROWS
        for scheme in (SCHEMES if row != "float" else ("float",))
        for model in MODELS
    ]
    with tempfile.TemporaryDirectory() as logs:
        measured = _run_all(cells, arguments.workers, Path(logs))
    _write(measured, sizes)


def _run_all(cells: list[Cell], workers: int, logs: Path) -> list[Cell]:
    """Measure cells side by side, each in a process of its own."""
    measured: dict[int, Cell] = {}

    def run(cell: Cell, cores: list[int], running: Processes) -> Ended:
        words = ["-m", "benchmarks.recipes", "--cell", json.dumps(cell)]
        log = logs / f"{cells.index(cell)}.log"
        return running.run(words, cores, log, directory=ROOT)

    with Progress() as bar:
        task = bar.add_task("cells", total=len(cells))

        def keep(cell: Cell, ended: Ended) -> None:
            if ended.result is None:
                raise RuntimeError(f"{cell} failed:\n{ended.tail}")
            measured[cells.index(cell)] = ended.result
            bar.advance(task)

        run_here(cells, run, workers, keep)
    return [measured[index] for index in range(len(cells))]


def _measure(cell: Cell) -> Cell:
    from vllm_lowbit.calibrate.evaluate import evaluate

    model, scheme = str(ROOT / "models" / cell["model"]), None
    with tempfile.TemporaryDirectory() as directory:
        if cell["row"] == LOAD_TIME:
            scheme = cell["scheme"]
        elif cell["row"] != "float":
            model, cell["seed"] = _calibrate(model, cell, Path(directory))
        for backend in BACKENDS:
            result = evaluate(
                model,
                TEXT,
                cell["seq_len"],
                cell["max_tokens"],
                backend,
                scheme,
                "auto",
            )
            cell[backend] = round(result.perplexity, 4)
            cell["tokens"] = result.tokens
    return cell


def _calibrate(model: str, cell: Cell, directory: Path) -> tuple[str, int]:
    """The checkpoint with the least calibration loss among the row's seeds."""
    from vllm_lowbit.calibrate.pipeline import calibrate
    from vllm_lowbit.calibrate.recipe import load_recipe
    from vllm_lowbit.calibrate.text import default_text

    name, seeds = RECIPES[cell["row"]]
    recipe = load_recipe(name)
    samples = RTN_SAMPLES if recipe.weights.method == "rtn" else None
    losses = {}
    for seed in seeds:
        chosen = recipe.override(cell["scheme"], samples=samples, seed=seed)
        report = calibrate(model, directory / str(seed), chosen, default_text())
        losses[seed] = report.calibration.quantized
    best = min(losses, key=lambda seed: losses[seed])
    return str(directory / str(best)), best


def _write(cells: list[Cell], sizes: dict[str, int]) -> None:
    environment = describe()
    RESULTS.mkdir(exist_ok=True)
    result = {"environment": environment, **sizes, "cells": cells}
    (RESULTS / "recipes.json").write_text(json.dumps(result, indent=1) + "\n")
    apart = max(abs(math.log(cell["vllm"] / cell["reference"])) for cell in cells)
    lines = [
        "# Perplexity of the recipes",
        "",
        f"WikiText-2 test, first {sizes['max_tokens']} tokens, contexts of",
        f"{sizes['seq_len']}; lower is better.",
        "Each pair is the reference model in float32 / vLLM itself in bfloat16, eager.",
        f"The largest difference of a pair is {100 * apart:.2f}%.",
        "Calibrated on 65,536 tokens of the WikiText-2 training text in the package;",
        f"without GPTQ the text only chooses the seed, by the loss on {RTN_SAMPLES}",
        "windows.",
        "",
        f"`python -m benchmarks.recipes`: {as_line(environment)}",
    ]
    found = {(c["row"], c["scheme"], c["model"]): c for c in cells}
    for model in MODELS:
        lines += ["", f"| {model} | " + " | ".join(SCHEMES) + " |"]
        lines += ["|---|" + "---|" * len(SCHEMES)]
        for row in ROWS:
            schemes = SCHEMES if row != "float" else ("float",) * len(SCHEMES)
            shown = (found[row, scheme, model] for scheme in schemes)
            pairs = (f"{c['reference']:.2f} / {c['vllm']:.2f}" for c in shown)
            lines.append(f"| {row} | " + " | ".join(pairs) + " |")
    (RESULTS / "recipes.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
