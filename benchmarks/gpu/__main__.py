# SPDX-License-Identifier: Apache-2.0
"""Correctness of every Triton operator on the GPU at hand, then its speed.

    python -m benchmarks.gpu --out DIR [--correctness] [--budget SECONDS]

Writes DIR/gpu.json, and DIR/gpu.png where matplotlib is installed. Exits with 1 when
an operator is wrong; its speed is refused then, and that of what needs it. With
TRITON_INTERPRET=1 the checks alone run, on the CPU and on tiny shapes.
"""

import argparse
import datetime
import json
import platform
import sys
import time
from pathlib import Path
from typing import Any

import torch
import triton

from . import SOURCES
from .case import Check, Row
from .plot import draw

# On the device's side of the budget: checks and start take the rest of 8 minutes.
BUDGET = 360.0


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--correctness", action="store_true", help="no timing")
    parser.add_argument("--budget", type=float, default=BUDGET, help="s of timing")
    options = parser.parse_args()
    from vllm_lowbit.kernels.gpu.target import INTERPRETED

    if not INTERPRETED and not torch.cuda.is_available():
        sys.exit("error: torch sees no GPU; TRITON_INTERPRET=1 runs the checks without")
    options.out.mkdir(parents=True, exist_ok=True)
    device = torch.device("cpu" if INTERPRETED else "cuda")
    result: dict[str, Any] = {"environment": _environment(device)}
    checked = [_checked(c) for source in SOURCES for c in source.checks(device)]
    wrong = {entry["operator"] for entry in checked if entry["fault"]}
    result["checks"] = checked
    print(f"{sum(not c['fault'] for c in checked)} of {len(checked)} checks pass")
    if not options.correctness and not INTERPRETED:
        _time(device, wrong, options.budget, result)
    (options.out / "gpu.json").write_text(json.dumps(result, indent=1) + "\n")
    if result.get("speed"):
        draw(result, options.out / "gpu.png")
    sys.exit(1 if wrong else 0)


def _environment(device: torch.device) -> dict[str, str]:
    from vllm_lowbit.kernels.gpu.target import architecture

    cuda = device.type == "cuda"
    return {
        "date": datetime.date.today().isoformat(),
        "device": torch.cuda.get_device_name(device) if cuda else "interpreter",
        "architecture": architecture(device),
        "runtime": f"CUDA {torch.version.cuda}"
        if torch.version.hip is None
        else f"ROCm {torch.version.hip}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": triton.__version__,
    }


def _checked(check: Check) -> dict[str, Any]:
    try:
        fault = check.run()
    except Exception as error:  # A kernel that does not run is as wrong as any.
        fault = f"{type(error).__name__}: {error}"
    if fault:
        print(f"WRONG {check.operator} {check.name}: {fault}", flush=True)
    return {"operator": check.operator, "name": check.name, "fault": fault}


def _time(
    device: torch.device, wrong: set[str], budget: float, result: dict[str, Any]
) -> None:
    """Fill in the speed of every row that the checks and the budget allow."""
    from .timing import copy_bandwidth, integer_peak

    started = time.monotonic()
    result["bandwidth"] = copy_bandwidth(device)
    try:
        result["int8_peak"] = integer_peak(device)
    except RuntimeError as error:
        result["int8_peak"] = None
        print(f"no int8 product of torch to compare with: {error}")
    result["speed"], result["skipped"] = [], []
    refused: set[str] = set()
    for source in SOURCES:
        for row in source.rows(device):
            needs = {row.operator, *row.needs} & wrong
            if needs:
                refused.add(f"{row.operator} (wrong: {', '.join(sorted(needs))})")
            elif time.monotonic() - started > budget:
                result["skipped"].append(f"{row.operator} {row.name} {row.sizes}")
            else:
                result["speed"].append(_timed(row, device, result))
    result["refused"] = sorted(refused)
    for operator in result["refused"]:
        print(f"speed refused: {operator}")
    if result["skipped"]:
        print(f"out of time for {len(result['skipped'])} rows")


def _timed(row: Row, device: torch.device, result: dict[str, Any]) -> dict[str, Any]:
    from .timing import seconds

    arms: dict[str, float | None] = {}
    reasons = {}
    for name, prepare in row.arms.items():
        try:
            arms[name] = seconds(prepare, device)
        except (RuntimeError, ValueError) as error:
            # An arm of a library may not exist for this chip or shape.
            arms[name], reasons[name] = None, str(error).partition("\n")[0]
    own, base = next(iter(arms.values())), arms[row.baseline]
    entry = {
        "operator": row.operator,
        "name": row.name,
        **row.sizes,
        "seconds": arms,
        "unavailable": reasons,
        "speedup": base / own if own and base else None,
        "of_copy": row.moved / own / result["bandwidth"] if own else None,
        "of_int8": None,
    }
    if own and row.operations and result["int8_peak"]:
        entry["of_int8"] = row.operations / own / result["int8_peak"]
    cells = ", ".join(
        f"{name} -" if taken is None else f"{name} {taken * 1e6:.1f} us"
        for name, taken in arms.items()
    )
    print(f"{row.operator} {row.name} {row.sizes}: {cells}", flush=True)
    return entry


if __name__ == "__main__":
    main()
