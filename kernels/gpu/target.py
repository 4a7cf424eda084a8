# SPDX-License-Identifier: Apache-2.0
"""What kernels are compiled for: the chip of a device, or Triton's interpreter."""

import functools
import os

import torch

# As Triton reads it, once, when it decorates a kernel.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE_TYPES = ("cuda", "cpu") if INTERPRETED else ("cuda",)
# Chips whose e4m3 units may be worth more than their int8 ones for codes of 4 bits, and
# how many products of those they add up exactly, None for any number: see
# ``linear_w4a4/triton_kernel.py``. The fifth-generation tensor cores of sm_103 have no
# int8; those of sm_100 have it, at the same rate.
E4M3_SUMS: dict[str, int | None] = {"sm_90": 128, "sm_103": None, "interpreter": None}


@functools.lru_cache(maxsize=64)
def architecture(device: torch.device) -> str:
    """``sm_90``, ``gfx942``; ``interpreter`` where no chip is used.

    Raises:
        ValueError: for a device that is neither.
    """
    if device.type not in DEVICE_TYPES:
        raise ValueError(f"Triton kernels run on cuda, not on {device}")
    if INTERPRETED:
        return "interpreter"
    if torch.version.hip is not None:
        name: str = torch.cuda.get_device_properties(device).gcnArchName
        return name.partition(":")[0]
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


def inline_ptx(arch: str) -> bool:
    """Whether kernels may use PTX. AMD's compiler drops inline assembly silently."""
    return arch.startswith("sm_")


def lanes(arch: str) -> int:
    """Threads of a warp."""
    return 64 if arch.startswith("gfx9") else 32


@functools.lru_cache(maxsize=64)
def processors(device: torch.device) -> int:
    """Streaming multiprocessors or compute units; 1 in the interpreter."""
    if INTERPRETED:
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count
