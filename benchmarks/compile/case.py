# SPDX-License-Identifier: Apache-2.0
"""One kernel with one configuration for one chip, and what is asked of its code."""

from dataclasses import dataclass, field
from typing import Any

from vllm_lowbit.kernels.gpu.limits import SHARED_LIMITS, Need

TARGETS = tuple(SHARED_LIMITS)
# One of each kind of matrix unit, for the cases that the tests always compile.
QUICK_TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")
# Matrix instructions by chip, as regular expressions over the assembly.
INTEGER_MATRIX = {
    "sm_80": r"IMMA\.16832\.S8\.S8",
    "sm_86": r"IMMA\.16832\.S8\.S8",
    "sm_89": r"IMMA\.16832\.S8\.S8",
    "sm_90": r"IGMMA\.64x\d+x32\.S8\.S8",
    "sm_100": r"UTCIMMA",
    # Its tensor cores of the fifth generation have no int8.
    "sm_103": r"IMMA\.16832\.S8\.S8",
    "sm_120": r"IMMA\.16832\.S8\.S8",
    "gfx942": r"v_mfma_i32_\d+x\d+x\d+_i8",
    "gfx950": r"v_mfma_i32_\d+x\d+x\d+_i8",
}
E4M3_MATRIX = {
    "sm_90": r"QGMMA\.64x\d+x32\.F32\.E4M3\.E4M3",
    "sm_103": r"UTCQMMA",
}
FLOAT_MATRIX = {
    "sm_80": r"HMMA\.16816\.F32",
    "sm_86": r"HMMA\.16816\.F32",
    "sm_89": r"HMMA\.16816\.F32",
    "sm_90": r"HGMMA\.64x\d+x16\.F32",
    "sm_100": r"UTCHMMA",
    "sm_103": r"UTCHMMA",
    "sm_120": r"HMMA\.16816\.F32",
    "gfx942": r"v_mfma_f32_\d+x\d+x\d+_(bf16|f16)",
    "gfx950": r"v_mfma_f32_\d+x\d+x\d+_(bf16|f16)",
}


@dataclass(frozen=True)
class Case:
    """A kernel to compile without a device.

    Attributes:
        operator: folder of ``kernels/`` it belongs to.
        name: what tells it from the operator's other cases.
        kernel: a ``triton.jit`` function.
        target: one of TARGETS.
        types: Triton type of each run-time argument (``*bf16``, ``i32``), by name.
        constants: value of each ``constexpr`` argument, by name.
        aligned: integer arguments that are multiples of 16, as a launch would find;
            pointers always are.
        options: of the launch (``num_warps``, ``num_stages``).
        matrix: regular expression of the matrix instruction that must occur in the
            innermost loop that has any (in the whole kernel without one), or None.
        ceiling: most instructions of that loop (of the whole kernel without a loop);
            None for no limit.
        need: what a launch takes the kernel to need of the chip's memories, None where
            it does not ask; the compiler must not take more.
        quick: also compiled by the tests that always run.
    """

    operator: str
    name: str
    kernel: Any
    target: str
    types: dict[str, str]
    constants: dict[str, Any]
    aligned: tuple[str, ...] = ()
    options: dict[str, Any] = field(default_factory=dict)
    matrix: str | None = None
    ceiling: int | None = None
    need: Need | None = None
    quick: bool = False
