# SPDX-License-Identifier: Apache-2.0
"""Correctness of every Triton operator on the GPU at hand, then its speed.

    python -m benchmarks.gpu --out DIR [--correctness] [--seconds 450] [--workers N]

Checks run in as many processes as there are cores, which also compile what will be
timed; then rows are timed one by one, those first that decide an aim. Everything ends
at the deadline. DIR/gpu.json is written after every row, DIR/gpu.png at the end where
matplotlib is installed. Exits with 1 when an operator is wrong; its speed is refused
then, and that of what needs it. With TRITON_INTERPRET=1 the checks alone run, on the
CPU and on tiny shapes. With --workers 0 the checks run in this process, as for

    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck \\
        python -m benchmarks.gpu --out DIR --correctness --workers 0

and the same with ``--tool racecheck``.
"""

import argparse
import datetime
import json
import os
import platform
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
import triton

from . import jobs
from .plot import draw
from .workers import Done, run

SECONDS = 450.0
# Of the time, for checks and compilation at most.
BEFORE_TIMING = 0.45


def main() -> None:
    started = time.monotonic()
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--correctness", action="store_true", help="no timing")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="for all of it")
    cores = len(os.sched_getaffinity(0))
    parser.add_argument("--workers", type=int, default=cores)
    options = parser.parse_args()
    if options.workers < 0:
        parser.error(f"argument --workers: at least 0, got {options.workers}")
    interpreted = jobs.DEVICE.type == "cpu"
    if not interpreted and not torch.cuda.is_available():
        sys.exit("error: torch sees no GPU; TRITON_INTERPRET=1 runs the checks without")
    options.out.mkdir(parents=True, exist_ok=True)
    result: dict[str, Any] = {"environment": _environment()}
    number = 0 if interpreted else options.workers
    timed = not (options.correctness or interpreted)
    share = BEFORE_TIMING if timed else 1.0
    before = started + share * options.seconds
    wrong = _check(result, number, before if number else float("inf"))
    _write(result, options.out)
    if timed:
        _compile(wrong, max(1, number), before)
        result["environment"]["seconds_before_timing"] = _since(started)
        _time(wrong, started + options.seconds, result, options.out)
        result["environment"]["seconds"] = _since(started)
        _write(result, options.out)
        if result["speed"]:
            draw(result, options.out / "gpu.png")
    sys.exit(1 if wrong else 0)


def _since(started: float) -> str:
    return f"{time.monotonic() - started:.0f}"


def _environment() -> dict[str, str]:
    from vllm_lowbit.kernels.gpu.target import architecture

    device, hip = jobs.DEVICE, torch.version.hip
    cuda = device.type == "cuda"
    return {
        "date": datetime.date.today().isoformat(),
        "device": torch.cuda.get_device_name(device) if cuda else "interpreter",
        "architecture": architecture(device),
        "runtime": f"CUDA {torch.version.cuda}" if hip is None else f"ROCm {hip}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": triton.__version__,
    }


def _write(result: dict[str, Any], out: Path) -> None:
    staging = out / "gpu.json.new"
    staging.write_text(json.dumps(result, indent=1) + "\n")
    os.replace(staging, out / "gpu.json")


def _check(result: dict[str, Any], number: int, ends: float) -> set[str]:
    """Run every check; the operators that are wrong, or not known to be right."""
    checks = jobs.checks()
    work = [partial(jobs.check, index) for index in range(len(checks))]
    ran = sorted(run(work, number, ends) if number else _here(work))
    result["checks"] = []
    for index, fault, raised in ran:
        check, why = checks[index], fault or raised
        if why:
            print(f"WRONG {check.operator} {check.name}: {why}", flush=True)
        entry = {"operator": check.operator, "name": check.name, "fault": why}
        result["checks"].append(entry)
    right = sum(not entry["fault"] for entry in result["checks"])
    print(f"{right} of {len(checks)} checks pass", flush=True)
    return {entry["operator"] for entry in result["checks"] if entry["fault"]}


def _here(work: list[Any]) -> Iterator[Done]:
    for index, job in enumerate(work):
        try:
            yield Done(index, job(), None)
        except Exception as error:  # A kernel that does not run is as wrong as any.
            yield Done(index, None, f"{type(error).__name__}: {error}")


def _allowed(wrong: set[str]) -> list[int]:
    """Numbers of the rows that call nothing wrong."""
    return [
        index
        for index, row in enumerate(jobs.rows())
        if not {row.operator, *row.needs} & wrong
    ]


def _compile(wrong: set[str], number: int, ends: float) -> None:
    work = [partial(jobs.compile_row, index) for index in _allowed(wrong)]
    failed = [done.fault for done in run(work, number, ends) if done.fault]
    if failed:
        print(f"{len(failed)} rows not compiled beforehand, first: {failed[0]}")


def _time(wrong: set[str], ends: float, result: dict[str, Any], out: Path) -> None:
    """Fill in the speed of every row that the checks and the time allow."""
    allowed = _allowed(wrong)
    needed = {row.operator: {row.operator, *row.needs} & wrong for row in jobs.rows()}
    refused = {f"{o} (wrong: {', '.join(sorted(w))})" for o, w in needed.items() if w}
    result["refused"], result["speed"], result["skipped"] = sorted(refused), [], []
    for operator in result["refused"]:
        print(f"speed refused: {operator}")
    work = [partial(jobs.time_row, index) for index in allowed]
    for index, entry, fault in run(work, 1, ends):
        if fault:
            row = jobs.rows()[allowed[index]]
            name = f"{row.operator} {row.name} {row.sizes}"
            result["skipped"].append({"row": name, "why": fault})
        else:
            result["machine"] = entry.pop("machine")
            result["speed"].append(entry)
            print(_line(entry), flush=True)
        _write(result, out)
    if result["skipped"]:
        first = result["skipped"][0]
        print(f"{len(result['skipped'])} rows skipped, first {first}")
    aims = [aim for entry in result["speed"] for aim in entry["aims"].values()]
    print(f"{sum(aim['met'] for aim in aims)} of {len(aims)} aims met")


def _line(entry: dict[str, Any]) -> str:
    sizes = {k: entry[k] for k in ("m", "n", "k", "batch", "context") if k in entry}
    cells = []
    for name, taken in entry["seconds"].items():
        cell = f"{name} -" if taken is None else f"{name} {taken * 1e6:.1f} us"
        if name in entry["speedups"]:
            cell += f" ({entry['speedups'][name]:.2f}x)"
        if name in entry["aims"] and not entry["aims"][name]["met"]:
            cell += f" below {entry['aims'][name]['wanted']:.2f}x"
        cells.append(cell)
    return f"{entry['operator']} {entry['name']} {sizes}: {', '.join(cells)}"


if __name__ == "__main__":
    main()
