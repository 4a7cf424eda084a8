# SPDX-License-Identifier: Apache-2.0
"""methods.md: the tables, what must hold, and the conditions."""

import textwrap
from collections.abc import Iterator
from pathlib import Path

from ..environment import as_line
from .cells import (
    ABLATIONS,
    FLOAT,
    MAIN_SCHEME,
    MODELS,
    SCHEMES,
    SEEDS,
    all_cells,
)
from .plots import write_plots
from .protocol import MAIN_TEXT, NGRAM, PAIRS, SENTENCE_NGRAM, SEQ_LEN, TEXTS
from .store import Store
from .summary import Row, Spread, row, rows
from .verdicts import Verdict, verdicts

HEAD = [
    "",
    "gap, mean of texts",
    *(f"{text}, perplexity | gap" for text in TEXTS),
    "BLiMP, %",
    "calibration, s",
    f"vLLM, {MAIN_TEXT} | apart, %",
]


def write_report(store: Store, directory: Path) -> str:
    """Write methods.md and the plots.

    Returns:
        the text of methods.md.
    """
    plots = write_plots(store, directory)
    sections = [_head(), _must_hold(store), _tables(store), _ablations(store)]
    lines = [line for section in sections for line in section]
    lines += [f"![{name.removesuffix('.png')}]({name})\n" for name in plots]
    lines += _conditions(store)
    text = "\n".join(lines).rstrip() + "\n"
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "methods.md").write_text(text)
    return text


def _head() -> Iterator[str]:
    yield "# Accuracy of the methods"
    yield ""
    texts = " and of ".join(
        f"a {name}" if n is None else f"{name} test, first {n:,} tokens,"
        for name, (_, n) in TEXTS.items()
    )
    yield textwrap.fill(
        f"Perplexity of {texts} in contexts of {SEQ_LEN}, by the reference model in "
        "float32; the novel is part of Conrad's Nostromo, which ref-7m was not trained "
        "on. Gap: log perplexity over that of the float model; what must hold is about "
        "its mean over both texts, as rounding also moves a model from one towards the "
        "other. BLiMP: "
        f"{PAIRS} pairs of each of 67 paradigms, mean of their accuracies. Calibrated "
        "on the WikiText-2 training text in the package, with the same windows for all "
        "methods at a seed. A mean of seeds has the least and the most in brackets. "
        "vLLM: its own perplexity of the same windows, eager, in bfloat16, at seed "
        f"{SEEDS[0]}; apart: the log of it over the reference's, and in brackets the "
        "same in float32 where that was needed.",
        88,
    )
    yield ""
    yield "    python -m benchmarks.methods"
    yield ""


def _table(head: list[str], body: list[list[str]]) -> Iterator[str]:
    if body:
        yield "| " + " | ".join(head) + " |"
        yield "|---" * " | ".join(head).count("|") + "|---|"
        for cells in body:
            yield "| " + " | ".join(cells) + " |"
        yield ""


def _must_hold(store: Store) -> Iterator[str]:
    yield "## What must hold"
    yield ""
    body = []
    for verdict in verdicts(store):
        shown = (f"{p}: {_value(verdict, v)}" for p, v in verdict.values.items())
        limit = _value(verdict, verdict.needed)
        needed = f"{'below' if verdict.strict else 'at most'} {limit}"
        if verdict.aim:
            needed = f"aim: {needed}"
        body.append([verdict.line, needed, "; ".join(shown), _word(verdict)])
    yield from _table(["", "needed", "measured", ""], body)
    yield f"Overlap is counted in {NGRAM} words in a row, of a sentence of BLiMP in"
    yield f"{SENTENCE_NGRAM}, all of which have to be found."
    yield ""


def _value(verdict: Verdict, value: float | None) -> str:
    if value is None:
        return "-"
    digits = 0 if verdict.unit == "" else 2 if verdict.unit == "x" else 1
    if verdict.unit == "%":
        digits = 2
    return f"{value:.{digits}f}{verdict.unit}"


def _word(verdict: Verdict) -> str:
    if verdict.holds is None:
        return "not measured"
    if verdict.aim:
        return "reached" if verdict.holds else "not reached"
    return "holds" if verdict.holds else "**fails**"


def _tables(store: Store) -> Iterator[str]:
    for scheme, (methods, _) in SCHEMES.items():
        body: dict[str, list[list[str]]] = {}
        for model in MODELS:
            base = row(store, model, FLOAT, FLOAT)
            found = rows(store, model, scheme, methods)
            if base is not None and found:
                body[model] = [_cells(each) for each in (base, *found)]
        if body:
            yield f"## {scheme}"
            yield ""
        for model, part in body.items():
            yield from _table([model, *HEAD[1:]], part)


def _cells(found: Row) -> list[str]:
    is_base = found.method == FLOAT
    cells = [found.method, "" if is_base else _spread(found.mean_gap, 4)]
    for text in TEXTS:
        cells.append(_spread(found.perplexity[text], 2))
        cells.append("" if is_base else _spread(found.gap[text], 4))
    assert found.accuracy is not None and found.stderr is not None
    accuracy = Spread({s: 100 * v for s, v in found.accuracy.by_seed.items()})
    cells.append(f"{_spread(accuracy, 1)} +- {100 * found.stderr:.1f}")
    cells.append("" if found.seconds is None else f"{found.seconds.mean:.0f}")
    if found.served is None or found.apart is None:
        return [*cells, "-", "-"]
    apart = f"{100 * found.apart:+.2f}"
    if found.apart_float32 is not None:
        apart += f" ({100 * found.apart_float32:+.2f})"
    return [*cells, f"{found.served:.2f}", apart]


def _spread(values: Spread, digits: int) -> str:
    mean = f"{values.mean:.{digits}f}"
    if len(values.by_seed) == 1:
        return mean
    return f"{mean} ({values.least:.{digits}f} to {values.most:.{digits}f})"


def _ablations(store: Store) -> Iterator[str]:
    for recipe, parts in ABLATIONS.items():
        body = []
        for name in (recipe, *(f"{recipe}, {part}" for part in parts)):
            cells = [name.removeprefix(f"{recipe}, ")]
            for model in MODELS:
                cells += _first_gaps(row(store, model, MAIN_SCHEME, name))
            body.append(cells)
        if any(set(cells[1:]) != {"-"} for cells in body):
            yield f"## What each part of {recipe} gives"
            yield ""
            yield textwrap.fill(
                f"Gaps on {MAIN_SCHEME}, seed {SEEDS[0]}; every row changes one thing "
                f"of the recipe. Seeds alone move the mean of {recipe}: "
                f"{_moved_by_seeds(store, recipe)}.",
                88,
            )
            yield ""
            heads = [[f"{model}, mean of texts", *TEXTS] for model in MODELS]
            yield from _table(["", *(name for head in heads for name in head)], body)


def _moved_by_seeds(store: Store, recipe: str) -> str:
    """The least and the most of a recipe's mean gaps, by model."""
    found = {model: row(store, model, MAIN_SCHEME, recipe) for model in MODELS}
    spreads = {m: each.mean_gap for m, each in found.items() if each is not None}
    parts = (f"{m} {s.least:.4f} to {s.most:.4f}" for m, s in spreads.items())
    return ", ".join(parts) or "not measured"


def _first_gaps(found: Row | None) -> list[str]:
    """Mean and by text, of the first seed; dashes where it was not measured."""
    if found is None or SEEDS[0] not in found.mean_gap.by_seed:
        return ["-"] * (1 + len(TEXTS))
    spreads = [found.mean_gap, *(found.gap[text] for text in TEXTS)]
    return [f"{spread.by_seed[SEEDS[0]]:.4f}" for spread in spreads]


def _conditions(store: Store) -> Iterator[str]:
    yield "## Conditions"
    yield ""
    for index, environment in enumerate(store.environments):
        records = [r for r in store.cells.values() if r["environment"] == index]
        if not records:
            continue
        days = sorted(record["date"][:10] for record in records)
        minutes = sum(record["seconds"] for record in records) / 60
        load = max(record["load_average_before"] for record in records)
        yield f"- {len(records)} cells, {days[0]} to {days[-1]}: {minutes:.0f} minutes,"
        yield f"  load before a cell at most {load:.0f}; {as_line(environment)}"
    reasons: dict[str, int] = {}
    for cell in all_cells():
        reason = cell.skipped()
        if reason is not None:
            reasons[reason] = reasons.get(reason, 0) + 1
    for reason, count in reasons.items():
        yield f"- skipped, {count} cells: {reason}"
    for key, error in store.errors().items():
        yield f"- failed: {key}: {error}"
    yield ""
