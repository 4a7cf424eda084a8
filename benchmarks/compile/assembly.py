# SPDX-License-Identifier: Apache-2.0
"""Offline compilation of a case, and what its machine code says."""

import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from vllm_lowbit.kernels.gpu.limits import SHARED_LIMITS, TENSOR_LIMITS

from .case import Case
from .loops import GCN, SASS, Syntax, main_loop

MATRIX = re.compile(r"MMA|v_mfma|v_wmma")
_SASS = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", re.M)
_RESOURCES = re.compile(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)")
_GCN = re.compile(r"^\s+([a-z]+_[a-z0-9_]+)", re.M)


@dataclass(frozen=True)
class Report:
    """What a case compiled to.

    Attributes:
        registers: of a thread (vector registers on AMD).
        spills: instructions that move registers to or from memory.
        shared: bytes of shared memory.
        tensor: columns of tensor memory.
        matrix: matrix instructions by name: of the main loop, else of the kernel.
        instructions: of the main loop, else of the kernel.
        loop: whether there is a loop with a matrix instruction.
    """

    registers: int
    spills: int
    shared: int
    tensor: int
    matrix: dict[str, int]
    instructions: int
    loop: bool


def compile_case(case: Case) -> Report:
    """Compile for the target of the case; no driver is needed.

    Raises:
        ValueError: for an argument of the kernel that the case does not give.
    """
    signature, attributes = {}, {}
    for index, name in enumerate(case.kernel.arg_names):
        if name in case.constants:
            signature[name] = "constexpr"
            continue
        if name not in case.types:
            raise ValueError(f"{case.operator} {case.name}: no type for {name}")
        signature[name] = case.types[name]
        if name in case.aligned or signature[name].startswith("*"):
            attributes[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(
        fn=case.kernel,
        signature=signature,
        constexprs=dict(case.constants),
        attrs=attributes,
    )
    compiled = triton.compile(
        source, target=_gpu_target(case.target), options=dict(case.options)
    )
    read = _nvidia if "cubin" in compiled.asm else _amd
    return read(compiled)


def faults(case: Case, report: Report) -> list[str]:
    """What of the case's demands the code does not meet."""
    found = []
    if report.spills:
        found.append(f"{report.spills} spills")
    if report.shared > (limit := SHARED_LIMITS[case.target]):
        found.append(f"shared memory {report.shared} > {limit}")
    if report.tensor > (limit := TENSOR_LIMITS.get(case.target, 0)):
        found.append(f"tensor memory {report.tensor} > {limit}")
    if case.need is not None:
        for name in ("shared", "tensor"):
            taken, known = getattr(report, name), getattr(case.need, name)
            if taken > known:
                found.append(f"{name} memory {taken} > {known} of gpu/limits.py")
    if case.matrix is not None:
        if not report.matrix:
            found.append(f"no matrix instruction, expected {case.matrix}")
        for name in report.matrix:
            if not re.search(case.matrix, name):
                found.append(f"matrix instruction {name}, expected {case.matrix}")
    if case.ceiling is not None and report.instructions > case.ceiling:
        found.append(f"{report.instructions} instructions > {case.ceiling}")
    return found


def _gpu_target(name: str) -> GPUTarget:
    if name.startswith("sm_"):
        return GPUTarget("cuda", int(name[3:]), 32)
    return GPUTarget("hip", name, 64)


def _nvidia(compiled: Any) -> Report:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        resources = _tool("cuobjdump", "-res-usage", file.name)
        sass = _tool("nvdisasm", "-c", file.name)
    match = _RESOURCES.search(resources)
    if match is None:
        raise ValueError(f"cuobjdump names no resources: {resources}")
    names = _SASS.findall(sass)
    spills = sum(name.startswith(("STL", "LDL")) for name in names)
    return _report(int(match[1]), spills, compiled, (sass, SASS, _SASS))


def _amd(compiled: Any) -> Report:
    text = compiled.asm["amdgcn"]
    registers = int(re.findall(r"\.vgpr_count:\s*(\d+)", text)[0])
    # The compiler's own count has scalar registers that go to lanes of vector ones.
    spills = len(re.findall(r"^\s+scratch_(?:load|store)", text, re.M))
    code = text.partition(".Lfunc_end")[0]
    return _report(registers, spills, compiled, (code, GCN, _GCN))


def _report(
    registers: int,
    spills: int,
    compiled: Any,
    code: tuple[str, Syntax, re.Pattern[str]],
) -> Report:
    """Code is its text, its language, and the names of instructions there."""
    text, syntax, names = code
    loop = main_loop(text, syntax, MATRIX)
    body = names.findall(text if loop is None else loop)
    matrix = Counter(name for name in body if MATRIX.search(name))
    return Report(
        registers,
        spills,
        compiled.metadata.shared,
        getattr(compiled.metadata, "tmem_size", 0),
        dict(matrix),
        len(body),
        loop is not None,
    )


def _tool(name: str, *arguments: str) -> str:
    """Output of a tool of the CUDA toolkit that comes with Triton."""
    import triton.backends.nvidia as backend

    path = Path(next(iter(backend.__path__))) / "bin" / name
    return subprocess.run(
        [path, *arguments], check=True, capture_output=True, text=True
    ).stdout
