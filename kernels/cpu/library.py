# SPDX-License-Identifier: Apache-2.0
"""The compiled CPU kernels: loading, the instruction set, and checked pointers.

A plain C interface (``abi.h``), so one build serves every version of torch. OpenMP is
not linked: its symbols come from the runtime that torch has loaded, so that a worker
has one pool of threads with one binding.
"""

import ctypes
import functools
import logging
import os
from ctypes import CFUNCTYPE, POINTER, c_double, c_float, c_int, c_int64, c_void_p
from pathlib import Path

import torch

logger = logging.getLogger(__name__)

# Another build of the library, one with a sanitizer say; set before the import.
PATH_VARIABLE = "LOWBIT_CPU_LIBRARY"
PATH = Path(os.environ.get(PATH_VARIABLE) or Path(__file__).with_name("native.so"))
# avx512, avx2 or portable instead of the best that the CPU has.
ISA_VARIABLE = "LOWBIT_CPU_ISA"
# The enum of number.h.
TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


class TransformArguments(ctypes.Structure):
    """LowbitTransform of abi.h."""

    _fields_ = [
        ("order", c_int64),
        ("stride", c_int64),
        ("core", c_int64),
        ("table", c_void_p),
        ("transpose", c_int64),
        ("norm", c_double),
    ]


class WeightArguments(ctypes.Structure):
    """LowbitWeight of abi.h."""

    _fields_ = [
        ("n", c_int64),
        ("k", c_int64),
        ("groups", c_int64),
        ("bits", c_int64),
        ("fields", c_void_p),
        ("scale", c_void_p),
        ("zero", c_void_p),
        ("sum", c_void_p),
    ]


class StoreArguments(ctypes.Structure):
    """LowbitStore of abi.h."""

    _fields_ = [
        ("key", c_void_p),
        ("value", c_void_p),
        ("key_strides", c_int64 * 2),
        ("value_strides", c_int64 * 2),
        ("type", c_int64),
        ("tokens", c_int64),
        ("cache", c_void_p),
        ("num_blocks", c_int64),
        ("num_kv_heads", c_int64),
        ("block_size", c_int64),
        ("head_dim", c_int64),
        ("block_stride", c_int64),
        ("head_stride", c_int64),
        ("slot_mapping", c_void_p),
    ]


class AttentionArguments(ctypes.Structure):
    """LowbitAttention of abi.h."""

    _fields_ = [
        ("query", c_void_p),
        ("query_strides", c_int64 * 2),
        ("type", c_int64),
        ("cache", c_void_p),
        ("num_blocks", c_int64),
        ("num_kv_heads", c_int64),
        ("block_size", c_int64),
        ("head_dim", c_int64),
        ("block_stride", c_int64),
        ("head_stride", c_int64),
        ("block_table", c_void_p),
        ("table_stride", c_int64),
        ("table_width", c_int64),
        ("starts", c_void_p),
        ("seq_lens", c_void_p),
        ("num_seqs", c_int64),
        ("num_heads", c_int64),
        ("window", c_int64),
        ("score_factor", c_float),
        ("cap_factor", c_float),
        ("capped", c_int64),
        ("sinks", c_void_p),
        ("out", c_void_p),
    ]


_TRANSFORM = POINTER(TransformArguments)
_WEIGHT = POINTER(WeightArguments)
_P = c_void_p


class Functions(ctypes.Structure):
    """LowbitFunctions of abi.h, in its order."""

    _fields_ = [
        (
            "hadamard",
            CFUNCTYPE(None, _TRANSFORM, _P, c_int, _P, c_int64, c_int64, _P),
        ),
        (
            "hadamard_quantize",
            CFUNCTYPE(
                None,
                *(_TRANSFORM, _P, c_int, _P, c_int64, c_int64, c_int, c_int),
                *(c_float, c_int64, _P, _P, _P),
            ),
        ),
        ("pack_weight", CFUNCTYPE(None, _WEIGHT, _P, _P)),
        (
            "linear_w4a4",
            CFUNCTYPE(None, _WEIGHT, _P, _P, _P, _P, c_int64, c_int64, c_int, _P),
        ),
        (
            "linear_wna16",
            CFUNCTYPE(None, _WEIGHT, _P, _P, c_int, c_int64, c_int, _P),
        ),
        (
            "linear_tiled",
            CFUNCTYPE(None, _P, _P, _P, c_int64, c_int64, c_int64, c_int, _P),
        ),
        (
            "quantize_weight",
            CFUNCTYPE(
                None, _P, c_int64, c_int64, c_int, c_int, _P, c_int64, _P, _P, _P
            ),
        ),
        ("kv4_store", CFUNCTYPE(c_int, POINTER(StoreArguments), _TRANSFORM)),
        ("kv4_attention", CFUNCTYPE(c_int, POINTER(AttentionArguments), _TRANSFORM)),
        (
            "linear_packed",
            CFUNCTYPE(
                None,
                *(_TRANSFORM, _P, _WEIGHT, _P, _P, c_int, c_int64),
                *(c_int, c_int, c_float, c_int64, c_int, _P),
            ),
        ),
    ]


@functools.cache
def _library() -> ctypes.CDLL:
    library = ctypes.CDLL(str(PATH))
    library.lowbit_isa_name.restype = ctypes.c_char_p
    library.lowbit_isa_functions.restype = POINTER(Functions)
    return library


@functools.cache
def missing() -> str | None:
    """Why the compiled kernels cannot be used here, or None."""
    if not PATH.exists():
        return f"{PATH.name} was not built; reinstall vllm-lowbit with g++ installed"
    try:
        _library()
    except OSError as error:
        return f"{PATH.name} does not load: {error}"
    return None


@functools.cache
def isas() -> tuple[str, ...]:
    """Instruction sets that were compiled and that this CPU has, best first."""
    library, names = _library(), []
    for i in range(8):
        name = library.lowbit_isa_name(i)
        if name is None:
            break
        if library.lowbit_isa_runs(i):
            names.append(name.decode())
    return tuple(names)


@functools.cache
def default_isa() -> str:
    """The instruction set in use.

    Raises:
        ValueError: when LOWBIT_CPU_ISA names one that does not run here.
    """
    wanted = os.environ.get(ISA_VARIABLE)
    if wanted is not None and wanted not in isas():
        raise ValueError(
            f"{ISA_VARIABLE}={wanted!r} does not run on this CPU; supported here: "
            + ", ".join(isas())
        )
    chosen = wanted or isas()[0]
    if chosen != "avx512":
        logger.warning(
            "lowbit CPU kernels use %s: slower than on a CPU with AVX512-VNNI", chosen
        )
    return chosen


@functools.cache
def _functions_of(isa: str) -> Functions:
    library = _library()
    for i in range(8):
        if library.lowbit_isa_name(i) == isa.encode():
            return library.lowbit_isa_functions(i).contents
    raise ValueError(f"no CPU kernels for {isa!r}; compiled: {', '.join(isas())}")


_forced: list[str] = []


def functions() -> Functions:
    """The kernels of the instruction set in use."""
    return _functions_of(_forced[-1] if _forced else default_isa())


class force_isa:
    """Context in which another instruction set is used, for tests and benchmarks."""

    def __init__(self, isa: str) -> None:
        if isa not in isas():
            raise ValueError(f"{isa!r} does not run here; supported: {isas()}")
        self.isa = isa

    def __enter__(self) -> None:
        _forced.append(self.isa)

    def __exit__(self, *exception: object) -> None:
        _forced.pop()


def matrix_shape(tensor: torch.Tensor, name: str) -> tuple[int, int]:
    """Rows and columns of a matrix.

    Raises:
        ValueError: naming the argument that is none.
    """
    if tensor.dim() != 2:
        raise ValueError(f"{name} must have 2 dimensions, got {list(tensor.shape)}")
    rows, columns = tensor.shape
    return rows, columns


def pointer(
    tensor: torch.Tensor, name: str, dtype: torch.dtype, shape: tuple[int, ...]
) -> int:
    """Address of a contiguous CPU tensor that is exactly this.

    Raises:
        ValueError: naming the argument that is not.
    """
    if tensor.dtype != dtype or tensor.shape != shape:
        raise ValueError(
            f"{name} must be {dtype} {list(shape)}, got {tensor.dtype} "
            f"{list(tensor.shape)}"
        )
    if not tensor.is_contiguous() or tensor.device.type != "cpu":
        raise ValueError(
            f"{name} must be contiguous on the CPU, got strides {tensor.stride()} on "
            f"{tensor.device}"
        )
    return tensor.data_ptr()


def optional_pointer(
    tensor: torch.Tensor | None, name: str, dtype: torch.dtype, shape: tuple[int, ...]
) -> int | None:
    """As :func:`pointer`; None for None."""
    return None if tensor is None else pointer(tensor, name, dtype, shape)


def type_code(dtype: torch.dtype, name: str) -> int:
    """Number of a float dtype in the C interface.

    Raises:
        ValueError: for another dtype.
    """
    code = TYPES.get(dtype)
    if code is None:
        raise ValueError(f"{name} must be float32, bfloat16 or float16, got {dtype}")
    return code
