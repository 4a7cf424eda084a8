# SPDX-License-Identifier: Apache-2.0
"""Speed-up over the baseline by number of tokens, one panel an operator."""

from collections import defaultdict
from pathlib import Path
from typing import Any


def draw(result: dict[str, Any], path: Path) -> None:
    """Write the plot; without matplotlib, say that there is none."""
    try:
        import matplotlib
    except ImportError:
        print("matplotlib is not installed: no plot")
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot

    lines: dict[str, dict[str, list[tuple[int, float]]]] = defaultdict(
        lambda: defaultdict(list)
    )
    for entry in result["speed"]:
        at = next(entry[key] for key in ("m", "context") if key in entry)
        # What has an aim, else the operator alone.
        arms = list(entry["aims"]) or list(entry["speedups"])[:1]
        for arm in arms:
            if arm in entry["speedups"]:
                name = f"{entry['name']}, {arm}"
                lines[entry["operator"]][name].append((at, entry["speedups"][arm]))
    if not lines:
        print("no speed-up to plot")
        return
    figure, axes = pyplot.subplots(
        1, len(lines), figsize=(6 * len(lines), 5), squeeze=False
    )
    for axis, (operator, names) in zip(axes[0], lines.items(), strict=True):
        for name, points in names.items():
            axis.plot(*zip(*sorted(points), strict=True), marker="o", label=name)
        axis.axhline(1.0, color="grey", linewidth=1)
        axis.set_xscale("log", base=2)
        axis.set_title(operator)
        axis.set_xlabel("tokens")
        axis.set_ylabel("times as fast as the baseline")
        axis.legend(fontsize=7)
    environment = result["environment"]
    figure.suptitle(
        f"{environment['device']}, torch {environment['torch']}, "
        f"Triton {environment['triton']}, {environment['date']}"
    )
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
