# SPDX-License-Identifier: Apache-2.0
"""The pictures of a report, as PNG files. Needs matplotlib, the extra ``report``."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from .observe import PLACES, BlockError, Observation, Place
from .qsur import log_qsur_limit

BEFORE, AFTER = "#b5651d", "#1f4e79"
STAGE_COLOURS = ("#b5651d", "#6a9f58", "#5b7fb5", "#1f4e79")
DPI = 120
Curves = Mapping[str, Sequence[tuple[float, float]]]


def write_figures(
    directory: Path, observation: Observation, curves: Curves
) -> dict[str, str]:
    """Write every picture there is something for.

    Args:
        directory: of the files.
        observation: what was measured.
        curves: steps and losses of the calibration, by name; may be empty.

    Returns:
        what each shows, by the name of its file, in the order to show them.

    Raises:
        ModuleNotFoundError: without matplotlib.
    """
    import matplotlib

    matplotlib.use("Agg")
    places = _by_kind(observation)
    figures: dict[str, tuple[Callable[[Any], tuple[Any, str] | None], Any]] = {
        "surfaces.png": (_surfaces, places),
        "channels.png": (_channels, places),
        "errors.png": (_errors, observation.errors),
        "activations.png": (_activations, places),
        "qsur.png": (_qsur, places),
        "curves.png": (_curves, curves),
    }
    captions = {}
    for name, (draw, data) in figures.items():
        drawn = draw(data)
        if drawn is not None:
            figure, captions[name] = drawn
            figure.savefig(directory / name, dpi=DPI)
            _pyplot().close(figure)
    return captions


def _pyplot() -> Any:
    from matplotlib import pyplot

    return pyplot


def _by_kind(observation: Observation) -> dict[str, list[Place]]:
    by_kind: dict[str, list[Place]] = {kind: [] for kind in PLACES}
    for place in observation.places:
        by_kind[place.kind].append(place)
    return {kind: places for kind, places in by_kind.items() if places}


def _surfaces(places: dict[str, list[Place]]) -> tuple[Any, str]:
    figure = _pyplot().figure(figsize=(14, 7.2))
    for column, (kind, all_layers) in enumerate(places.items()):
        place = max(all_layers, key=lambda p: _peakedness(p.before.peaks))
        for row, (title, inputs) in enumerate(
            (("base model", place.before), ("checkpoint", place.after))
        ):
            axis = figure.add_subplot(
                2, len(places), 1 + column + row * len(places), projection="3d"
            )
            _surface(axis, inputs.sample)
            axis.set_title(
                f"{PLACES[kind]}, layer {place.layer}\n{title}: largest "
                f"{float(inputs.peaks.max()):.1f}",
                fontsize=9,
            )
    figure.subplots_adjust(0.01, 0.04, 0.97, 0.93, wspace=0.12, hspace=0.16)
    return figure, (
        "Magnitudes of what each linear reads, by token and channel, in the layer where"
        " the base model's largest channel stands out most. A cell shows the largest of"
        " the tokens and channels in it; every picture has its own scale."
    )


def _surface(axis: Any, sample: torch.Tensor) -> None:
    tokens, channels = (torch.arange(size) for size in sample.shape)
    grid = torch.meshgrid(channels, tokens, indexing="xy")
    axis.plot_surface(
        *(each.numpy() for each in grid),
        sample.numpy(),
        cmap="viridis",
        rcount=sample.shape[0],
        ccount=sample.shape[1],
        linewidth=0,
        antialiased=False,
    )
    axis.set_xlabel("channel", fontsize=8, labelpad=-8)
    axis.set_ylabel("token", fontsize=8, labelpad=-8)
    axis.set_xticks([])
    axis.set_yticks([])
    axis.tick_params(axis="z", labelsize=7, pad=0)
    axis.set_zlim(bottom=0)
    axis.locator_params(axis="z", nbins=4)
    axis.view_init(elev=28, azim=-58)


def _peakedness(peaks: torch.Tensor) -> float:
    """The largest channel's peak over that of the median one."""
    return float(peaks.max() / peaks.median().clamp_min(1e-12))


def _channels(places: dict[str, list[Place]]) -> tuple[Any, str]:
    from matplotlib.colors import LogNorm

    figure, axes = _pyplot().subplots(
        len(places), 2, figsize=(11, 8), layout="constrained"
    )
    for line, (kind, layers) in zip(axes, places.items(), strict=True):
        pictures = [
            torch.stack([_relative(inputs.peaks) for inputs in side])
            for side in zip(*((p.before, p.after) for p in layers), strict=True)
        ]
        largest = max(float(picture.max()) for picture in pictures)
        norm = LogNorm(0.2, max(largest, 2.0))
        for axis, picture, title in zip(
            line, pictures, ("base model", "checkpoint"), strict=True
        ):
            image = axis.imshow(
                picture.numpy(), aspect="auto", norm=norm, interpolation="nearest"
            )
            axis.set_title(f"{PLACES[kind]}: {title}", fontsize=9, loc="left")
            axis.set_ylabel("layer", fontsize=8)
            axis.set_yticks(range(0, len(layers), max(1, len(layers) // 6)))
            axis.tick_params(labelsize=7)
        bar = figure.colorbar(image, ax=line, fraction=0.03, pad=0.01)
        bar.set_label("times the median", fontsize=8)
        bar.ax.tick_params(labelsize=7)
        _plain_numbers(bar.ax.yaxis)
    axes[-1][0].set_xlabel("channel", fontsize=8)
    axes[-1][1].set_xlabel("channel", fontsize=8)
    return figure, (
        "Largest magnitude of every channel in units of the median channel's: what is "
        "far above 1 sets the scale of a token and takes the codes of all others."
    )


def _relative(peaks: torch.Tensor) -> torch.Tensor:
    return peaks / peaks.median().clamp_min(1e-12)


def _errors(errors: dict[str, dict[str, BlockError]]) -> tuple[Any, str]:
    titles = {
        "weights": "output of a block, weights quantized",
        "all": "output of a block, all quantized",
        "stream": "residual stream, all blocks so far",
    }
    figure, axes = _pyplot().subplots(
        1, len(titles), figsize=(13, 4), layout="constrained", sharey=True
    )
    for axis, (which, title) in zip(axes, titles.items(), strict=True):
        for name, label, colour in (
            ("rtn", "rounded to nearest, no transforms", BEFORE),
            ("checkpoint", "checkpoint", AFTER),
        ):
            blocks = errors[name]
            values = [100 * getattr(error, which) for error in blocks.values()]
            axis.plot(values, "o-", color=colour, label=label, markersize=3.5)
        axis.set_title(title, fontsize=10, loc="left")
        axis.set_xlabel("block: attention and MLP of each layer", fontsize=8)
        shown = range(0, len(blocks), max(2, 2 * (len(blocks) // 16)))
        axis.set_xticks(list(shown), [str(place // 2) for place in shown], fontsize=8)
        axis.set_yscale("log")
        axis.grid(which="both", linewidth=0.3)
    _plain_numbers(axes[0].yaxis)
    axes[0].set_ylabel("error, % of the norm", fontsize=9)
    axes[0].legend(fontsize=8)
    return figure, (
        "Error over the norm of the base model's value. Left and middle: every block"
        " gets the base model's input. Right: what has added up."
    )


def _plain_numbers(axis: Any) -> None:
    """1, 2, 5, 10 on a logarithmic axis."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def _activations(places: dict[str, list[Place]]) -> tuple[Any, str] | None:
    if all(p.after.error is None for layers in places.values() for p in layers):
        return None
    figure, axes = _pyplot().subplots(
        1, len(places), figsize=(13, 3.4), layout="constrained", sharey=True
    )
    for axis, (kind, layers) in zip(axes, places.items(), strict=True):
        for label, colour, values in (
            ("base model", BEFORE, [p.before.error for p in layers]),
            ("checkpoint", AFTER, [p.after.error for p in layers]),
        ):
            shares = [100 * (value or 0.0) for value in values]
            axis.plot(shares, "o-", color=colour, label=label, markersize=3.5)
        axis.set_title(PLACES[kind], fontsize=10, loc="left")
        axis.set_xlabel("layer", fontsize=8)
        axis.grid(linewidth=0.3)
        axis.set_ylim(bottom=0)
    axes[0].set_ylabel("quantization error, % of the norm", fontsize=9)
    axes[0].legend(fontsize=8)
    return figure, (
        "Error of quantizing what each linear reads, on the checkpoint's grid: of the"
        " base model's activations and of the checkpoint's."
    )


def _qsur(places: dict[str, list[Place]]) -> tuple[Any, str]:
    figure, axes = _pyplot().subplots(
        1, len(places), figsize=(13, 3.6), layout="constrained"
    )
    for axis, (kind, layers) in zip(axes, places.items(), strict=True):
        stages = list(dict.fromkeys(s for place in layers for s in place.qsur))
        for stage, colour in zip(stages, STAGE_COLOURS, strict=False):
            found = {p.layer: p.qsur[stage] for p in layers if stage in p.qsur}
            values = list(found.values())
            axis.plot(
                list(found), values, "o-", color=colour, label=stage, markersize=3.5
            )
        limit = log_qsur_limit(len(layers[0].before.peaks))
        axis.axhline(limit, color="black", linewidth=0.8, linestyle="--")
        axis.set_title(PLACES[kind], fontsize=10, loc="left")
        axis.set_xlabel("layer", fontsize=8)
        axis.grid(linewidth=0.3)
        axis.legend(fontsize=7)
    axes[0].set_ylabel("log QSUR per dimension", fontsize=9)
    return figure, (
        "Quantization space utilisation rate (OSTQuant, section 3) of what each linear"
        " reads, after one transform after the other: how much of the cube that one"
        " scale covers the data fill. Dashed: the most there can be."
    )


def _curves(curves: Curves) -> tuple[Any, str] | None:
    if not curves:
        return None
    figure, axis = _pyplot().subplots(figsize=(8, 4), layout="constrained")
    for name, points in curves.items():
        steps, losses = zip(*points, strict=True)
        axis.plot(steps, losses, label=name, linewidth=1.2)
    if all(loss > 0 for points in curves.values() for _, loss in points):
        axis.set_yscale("log")
    axis.set_xlabel("step", fontsize=9)
    axis.set_ylabel("loss", fontsize=9)
    axis.grid(which="both", linewidth=0.3)
    if len(curves) <= 12:
        axis.legend(fontsize=8)
    return figure, "Losses while the transforms were learned."
