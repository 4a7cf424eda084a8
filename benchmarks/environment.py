# SPDX-License-Identifier: Apache-2.0
"""Where and with what a result was measured."""

import datetime
import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch


def describe() -> dict[str, str]:
    """Date, machine and versions, to stand beside every result."""
    return {
        "date": datetime.date.today().isoformat(),
        "cpu": _cpu_name(),
        "cores": str(len(os.sched_getaffinity(0))),
        "isa": torch.backends.cpu.get_cpu_capability(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "python": platform.python_version(),
        **{name: _version(name) for name in ("torch", "triton", "vllm", "vllm-lowbit")},
    }


def as_line(environment: dict[str, str]) -> str:
    """One line for the head of a table."""
    return ", ".join(f"{key} {value}" for key, value in environment.items())


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.machine()


def _version(distribution: str) -> str:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return "none"
