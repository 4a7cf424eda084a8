# SPDX-License-Identifier: Apache-2.0
"""The figures of cpu.json as bars."""

from pathlib import Path
from typing import Any

from . import attention, linear
from .arms import ARMS, BF16
from .linear_arms import LINEAR_ARMS
from .store import Store
from .verdicts import attention_rows, linear_rows, speedups

# label of a bar's group -> label of the bar -> height
Groups = dict[str, dict[str, float]]
# title, bars, and where a dashed line goes
Panel = tuple[str, Groups, float | None]
OURS_COLOURS = ("#c0392b", "#e67e22", "#8e44ad")
STOCK_COLOURS = (
    *("#34495e", "#5d7fa3", "#8fb0cc", "#b9cbd9", "#7f8c8d", "#a6acaf"),
    *("#1e8449", "#82b88f"),
)
LEGEND_COLUMNS = 5


def write_plots(store: Store, directory: Path) -> list[str]:
    """Write a PNG for every part that was measured.

    Returns:
        their names; none without matplotlib, which is said.
    """
    try:
        import matplotlib
    except ImportError:
        print("no plots: the package matplotlib is not installed")
        return []
    matplotlib.use("Agg")
    directory.mkdir(parents=True, exist_ok=True)
    figures = {
        "cpu-serve.png": _serve(store),
        "cpu-linear.png": _linear(store),
        "cpu-attention.png": _attention(store),
    }
    written = []
    for name, panels in figures.items():
        panels = [panel for panel in panels if panel[1]]
        if panels:
            _figure(directory / name, panels)
            written.append(name)
    return written


def _figure(path: Path, panels: list[Panel]) -> None:
    from matplotlib import pyplot

    height = 3.8 * len(panels)
    figure, axes = pyplot.subplots(len(panels), squeeze=False, figsize=(11, height))
    for axis, (title, groups, mark) in zip(axes[:, 0], panels, strict=True):
        _bars(axis, groups)
        axis.set_title(title, fontsize=10, loc="left")
        if mark is not None:
            axis.axhline(mark, color="black", linewidth=0.9, linestyle="--")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _bars(axis: Any, groups: Groups) -> None:
    labels = list(dict.fromkeys(label for bars in groups.values() for label in bars))
    width = 0.85 / len(labels)
    colours = _colours(labels)
    for index, label in enumerate(labels):
        shift = (index - (len(labels) - 1) / 2) * width
        heights = [bars.get(label, 0.0) for bars in groups.values()]
        places = [place + shift for place in range(len(groups))]
        axis.bar(places, heights, width, label=label, color=colours[label])
    axis.set_xticks(range(len(groups)), list(groups), fontsize=8)
    axis.grid(axis="y", linewidth=0.3)
    axis.set_axisbelow(True)
    place = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.08)}
    columns = min(LEGEND_COLUMNS, len(labels))
    axis.legend(fontsize=7, ncols=columns, frameon=False, **place)


def _colours(labels: list[str]) -> dict[str, str]:
    ours = [label for label in labels if label.startswith(("lowbit", "w4a"))]
    stock = [label for label in labels if label not in ours]
    return {
        **{x: OURS_COLOURS[i % len(OURS_COLOURS)] for i, x in enumerate(ours)},
        **{x: STOCK_COLOURS[i % len(STOCK_COLOURS)] for i, x in enumerate(stock)},
    }


def _serve(store: Store) -> list[Panel]:
    decode: Groups = {}
    prefill: Groups = {}
    for arm in ARMS:
        for name, gain in speedups(store, arm, BF16).items():
            kind, _, workload = name.partition(" ")
            panel = decode if kind == "decode" else prefill
            panel.setdefault(workload, {})[arm] = gain
    return [
        ("Decode, times stock bf16 (batch x input/output)", decode, 1.0),
        ("Prefill, times stock bf16", prefill, 1.0),
    ]


def _linear(store: Store) -> list[Panel]:
    bandwidth = store.result(linear.NAME, linear.BANDWIDTH)
    read = None if bandwidth is None else bandwidth["read"] / 1e9
    single: Groups = {}
    many: Groups = {}
    for name, by_arm in linear_rows(store).items():
        for arm in (arm for arm in LINEAR_ARMS if arm in by_arm):
            row = by_arm[arm]
            seconds = {m: row["seconds"][str(m)]["median"] for m in (1, 256)}
            rate = row["weight_bytes"] / seconds[1] / 1e9
            single.setdefault(name, {})[arm] = rate
            flops = 2 * 256 * row["n"] * row["k"] / seconds[256] / 1e9
            many.setdefault(name, {})[arm] = flops
    title = "One row, GB/s of packed weights (dashed: reading alone)"
    return [(title, single, read), ("256 rows, GFLOP/s", many, None)]


def _attention(store: Store) -> list[Panel]:
    groups: Groups = {}
    kinds = (attention.STOCK_BF16, attention.STOCK_FP8, attention.OURS)
    for name, by_kind in attention_rows(store).items():
        base = by_kind.get(attention.STOCK_BF16)
        if base is not None:
            label = name.removeprefix("head size ").replace(", ", ": ")
            present = [kind for kind in kinds if kind in by_kind]
            groups[label] = {k: base["median"] / by_kind[k]["median"] for k in present}
    title = "Decode attention, times vLLM's bf16 (head size: context x batch)"
    return [(title, groups, 1.0)]
