# SPDX-License-Identifier: Apache-2.0
"""Gaps of methods.json as dots with their spread over seeds."""

from pathlib import Path
from typing import Any

from .cells import MAIN_SCHEME, MODELS, SCHEMES
from .protocol import TEXTS
from .store import Store
from .summary import Row, rows

COLOURS = {"WikiText-2": "#1f4e79", "novel": "#c0562b"}
MARKERS = {"WikiText-2": "o", "novel": "D"}
# A gap of nothing or less has no logarithm: it is drawn at the edge.
LEAST_GAP = 1e-3


def write_plots(store: Store, directory: Path) -> list[str]:
    """Write methods.png, and methods-other.png of the other schemes.

    Returns:
        names of the files; none without matplotlib, which is said.
    """
    try:
        import matplotlib
    except ImportError:
        print("no plots: the package matplotlib is not installed")
        return []
    matplotlib.use("Agg")
    directory.mkdir(parents=True, exist_ok=True)
    files = {
        "methods.png": [MAIN_SCHEME],
        "methods-other.png": [scheme for scheme in SCHEMES if scheme != MAIN_SCHEME],
    }
    written = []
    for name, schemes in files.items():
        panels = {
            (scheme, model): rows(store, model, scheme, SCHEMES[scheme][0])
            for scheme in schemes
            for model in MODELS
        }
        measured = [s for s in schemes if any(panels[s, model] for model in MODELS)]
        if measured:
            _figure(directory / name, measured, panels)
            written.append(name)
    return written


def _figure(
    path: Path, schemes: list[str], panels: dict[tuple[str, str], list[Row]]
) -> None:
    from matplotlib import pyplot

    methods = {s: _methods(s, panels) for s in schemes}
    heights = [0.9 + 0.3 * len(methods[scheme]) for scheme in schemes]
    figure, axes = pyplot.subplots(
        len(schemes),
        len(MODELS),
        squeeze=False,
        figsize=(10, sum(heights) + 0.6),
        gridspec_kw={"height_ratios": heights},
        layout="constrained",
    )
    for line, scheme in zip(axes, schemes, strict=True):
        for axis, model in zip(line, MODELS, strict=True):
            _panel(axis, methods[scheme], panels[scheme, model])
            axis.set_title(f"{model}, {scheme}", fontsize=10, loc="left")
        line[1].tick_params(labelleft=False)
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper right", ncols=2, fontsize=9)
    figure.supxlabel(
        "gap: log perplexity over the float model's; line: least to most of the seeds",
        fontsize=9,
    )
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _methods(scheme: str, panels: dict[tuple[str, str], list[Row]]) -> list[str]:
    """Those of a scheme that were measured, the worst on the first model first."""
    order = {
        row.method: row.mean_gap.mean
        for model in reversed(MODELS)
        for row in panels[scheme, model]
    }
    return sorted(order, key=lambda method: order[method], reverse=True)


def _panel(axis: Any, methods: list[str], found: list[Row]) -> None:
    by_method = {row.method: row for row in found}
    for index, text in enumerate(TEXTS):
        shift = 0.16 * (1 - 2 * index)
        for place, method in enumerate(methods):
            if method not in by_method:
                continue
            gap = by_method[method].gap[text]
            ends = [max(value, LEAST_GAP) for value in (gap.least, gap.most)]
            height = place + shift
            axis.plot(ends, [height, height], color=COLOURS[text], linewidth=1.6)
            axis.plot(
                max(gap.mean, LEAST_GAP),
                height,
                MARKERS[text],
                markersize=5,
                color=COLOURS[text],
                label=text if place == len(methods) - 1 else None,
            )
    axis.set_xscale("log")
    axis.set_yticks(range(len(methods)), methods, fontsize=9)
    axis.set_ylim(-0.6, len(methods) - 0.4)
    axis.grid(axis="x", which="both", linewidth=0.3)
    axis.grid(axis="y", linewidth=0.3, linestyle=":")
    axis.set_axisbelow(True)
    _plain_numbers(axis)


def _plain_numbers(axis: Any) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator

    axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.xaxis.set_minor_formatter("")
    axis.tick_params(axis="x", labelsize=8)
