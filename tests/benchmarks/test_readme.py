# SPDX-License-Identifier: Apache-2.0
"""README's tables of gaps say what was measured."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
RECIPE = re.compile(r"\**`?([a-z-]+|the flag alone)`?\**")


@pytest.fixture
def store(methods: Any) -> Any:
    """What was measured."""
    return methods("store").Store(ROOT / "benchmarks" / "results" / "methods.json")


def _tables() -> Iterator[list[list[str]]]:
    """Cells of every table whose columns are of a reference model."""
    for part in (ROOT / "README.md").read_text("utf-8").split("\n\n"):
        lines = part.strip().splitlines()
        if not all(line.startswith("|") for line in lines):
            continue
        rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
        if len(rows) > 2 and len(rows[0]) > 1 and rows[0][1].startswith("ref-7m"):
            yield [rows[0], *rows[2:]]


def _columns(header: list[str], main: str) -> list[tuple[str, str]]:
    """Model and scheme of each; a model stays until another is named."""
    model, found = "", []
    for cell in header[1:]:
        first, _, last = cell.partition(", ")
        if first.startswith("ref-7m"):
            model, scheme = first, last or main
        else:
            scheme = first
        found.append((model, scheme))
    return found


def _figure(value: float) -> str:
    value *= 100
    return f"{value:.0f}" if value >= 100 else f"{value:.2f}"


def test_gaps(methods: Any, store: Any) -> None:
    summary, main = methods("summary"), methods("cells").MAIN_SCHEME
    checked = 0
    for header, *rows in _tables():
        columns = _columns(header, main)
        for name, *cells in rows:
            match = RECIPE.fullmatch(name)
            assert match, name
            method = match[1].replace("the flag alone", "flag")
            for (model, scheme), cell in zip(columns, cells, strict=True):
                found = summary.row(store, model, scheme, method)
                if found is None:
                    assert not cell, (name, model, scheme)
                    continue
                gap = found.mean_gap
                wanted = _figure(gap.mean)
                if len(gap.by_seed) > 1:
                    wanted += f" ({_figure(gap.least)} to {_figure(gap.most)})"
                assert cell.strip("*") == wanted, (name, model, scheme)
                checked += 1
    assert checked > 80


def test_text_around_them(methods: Any, store: Any) -> None:
    main, models = methods("cells").MAIN_SCHEME, methods("cells").MODELS

    def gaps(method: str) -> list[str]:
        found = methods("summary").row(store, "ref-7m", main, method)
        return [_figure(found.gap[text].mean) for text in ("WikiText-2", "novel")]

    def first_seed(method: str) -> list[str]:
        found = (methods("summary").row(store, model, main, method) for model in models)
        return [_figure(row.mean_gap.by_seed[0]) for row in found]

    spin, ost = gaps("spinquant"), gaps("ostquant")
    same_loss = gaps("ostquant, loss cross-entropy")
    _, scaled = first_seed("ostquant")
    _, unscaled = first_seed("ostquant, without scales")
    rotated = [
        methods("summary").row(store, "ref-7m", main, method).mean_gap.mean
        for method in ("quarot-gptq", "spinquant", "ostquant", "lowbit")
    ]
    best, clipped = map(first_seed, ("lowbit-best", "lowbit-best, input clips learned"))
    served = methods("verdicts").served_apart(store).values.values()
    text = " ".join((ROOT / "README.md").read_text("utf-8").split())
    for claim in (
        f"adapts the model to it ({spin[0]} on its test text, `ostquant` {ost[0]})",
        f"(the novel: {spin[1]}, `ostquant` {ost[1]})",
        f"With that loss `ostquant` has {same_loss[0]} and {same_loss[1]}, seed 0.",
        f"without scales it has {unscaled} on ref-7m-outliers instead of {scaled}",
        f"lie between {_figure(min(rotated))} and {_figure(max(rotated))}",
        f"gaps of {clipped[0]} and {clipped[1]} instead of {best[0]} and {best[1]}",
        f"vLLM in bfloat16 is at most {max(served):.2f}% from the reference",
    ):
        assert claim in text
