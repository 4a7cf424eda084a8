# SPDX-License-Identifier: Apache-2.0
"""Checks and rows by number, as processes are asked for them."""

import functools
from collections.abc import Iterator
from itertools import chain, zip_longest
from typing import Any

import torch

from vllm_lowbit.kernels.gpu.target import INTERPRETED

from . import SOURCES
from .case import SPARE_BELOW, Arm, Check, Row
from .timing import SAMPLES, copy_bandwidth, integer_peak, samples

DEVICE = torch.device("cpu" if INTERPRETED else "cuda")


@functools.cache
def checks() -> tuple[Check, ...]:
    return tuple(check for source in SOURCES for check in source.checks(DEVICE))


@functools.cache
def rows() -> tuple[Row, ...]:
    """Rows with aims first; each in turn from the operators."""
    found = [list(source.rows(DEVICE)) for source in SOURCES]
    aimed = [[row for row in rows if row.aims] for rows in found]
    others = [[row for row in rows if not row.aims] for rows in found]
    return tuple(chain(_in_turn(aimed), _in_turn(others)))


def _in_turn(lists: list[list[Row]]) -> Iterator[Row]:
    for several in zip_longest(*lists):
        yield from (row for row in several if row is not None)


def check(index: int) -> str | None:
    """What is wrong with an operator, or None."""
    torch.set_num_threads(1)  # As many processes as cores.
    fault = checks()[index].run()
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    return fault


def compile_row(index: int) -> None:
    """Call a row's own arms once, so that what they compile is on disk."""
    for arm in rows()[index].arms.values():
        if not arm.own:
            continue
        try:
            arm.prepare(lambda size: 1)[0]()
        except (RuntimeError, ValueError):
            continue  # Told where it is timed.
    torch.cuda.synchronize()
    torch.cuda.empty_cache()


@functools.cache
def machine() -> dict[str, float | None]:
    """Bytes a second of a large copy, and int8 operations a second of torch."""
    try:
        peak: float | None = integer_peak(DEVICE)
    except RuntimeError:
        peak = None
    return {"bandwidth": copy_bandwidth(DEVICE), "int8_peak": peak}


def time_row(index: int) -> dict[str, Any]:
    """Median times of a row's arms, how far samples lie apart, speed-ups and shares."""
    row, of_machine = rows()[index], machine()
    taken: dict[str, float | None] = {}
    spread: dict[str, float] = {}
    reasons: dict[str, str] = {}
    shares: dict[str, dict[str, float]] = {"of_copy": {}, "of_int8": {}}
    # Spares at last, when it is known whether they are needed.
    for name, arm in sorted(row.arms.items(), key=lambda item: item[1].spare):
        if arm.spare and _reached(row, shares["of_copy"]):
            reasons[name] = f"others reach {SPARE_BELOW} of copy bandwidth"
            continue
        found = _samples(arm, name, reasons)
        taken[name] = found[SAMPLES // 2] if found else None
        if took := taken[name]:
            spread[name] = (found[-1] - found[0]) / took
            _share(row, name, took, of_machine, shares)
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    return {
        "operator": row.operator,
        "name": row.name,
        **row.sizes,
        "seconds": taken,
        "spread": spread,
        "unavailable": reasons,
        **_speedups(row, taken),
        **shares,
        "machine": of_machine,
    }


def _samples(arm: Arm, name: str, reasons: dict[str, str]) -> list[float]:
    try:
        return samples(arm.prepare, DEVICE)
    except (RuntimeError, ValueError) as error:
        # An arm of a library may not exist for this chip or shape.
        reasons[name] = str(error).partition("\n")[0]
        return []


def _reached(row: Row, of_copy: dict[str, float]) -> bool:
    return any(
        arm.baseline and of_copy.get(name, 0.0) >= SPARE_BELOW
        for name, arm in row.arms.items()
    )


def _share(
    row: Row,
    name: str,
    took: float,
    of_machine: dict[str, float | None],
    shares: dict[str, dict[str, float]],
) -> None:
    arm, bandwidth = row.arms[name], of_machine["bandwidth"]
    if arm.moved and bandwidth:
        shares["of_copy"][name] = arm.moved / took / bandwidth
    if arm.integer and (peak := of_machine["int8_peak"]):
        shares["of_int8"][name] = row.operations / took / peak


def _speedups(row: Row, taken: dict[str, float | None]) -> dict[str, Any]:
    """Against the fastest baseline, and which aims are met."""
    known = {name: took for name, took in taken.items() if took}
    bases = [name for name in known if row.arms[name].baseline]
    if not bases:
        return {"baseline": None, "speedups": {}, "aims": {}}
    base = min(bases, key=lambda name: known[name])
    speedups = {
        name: known[base] / took for name, took in known.items() if row.arms[name].own
    }
    aims = {
        name: {"wanted": wanted, "met": speedups.get(name, 0.0) >= wanted}
        for name, wanted in row.aims.items()
    }
    return {"baseline": base, "speedups": speedups, "aims": aims}
