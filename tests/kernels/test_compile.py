# SPDX-License-Identifier: Apache-2.0
"""Code of the Triton kernels for every chip, compiled without a device.

In processes of their own: ``benchmarks`` is not a package that tests can import.
"""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed"
)

# A kernel that spills, takes too much shared memory, or is not what was asked for.
WRONG = """
import dataclasses, json, sys
from benchmarks.compile import linears
from benchmarks.compile.assembly import compile_case, faults
case = next(c for c in linears.cases() if c.target == "sm_80" and c.ceiling)
wrong = json.loads(sys.argv[1])
constants = {**case.constants, **wrong.pop("constants", {})}
options = {**case.options, **wrong.pop("options", {})}
case = dataclasses.replace(case, constants=constants, options=options, **wrong)
print(json.dumps(faults(case, compile_case(case))))
"""

# Partial sums of Hopper's e4m3 units are added outside of them: one addition for each
# of the accumulators of a thread.
PROMOTED = """
import dataclasses
from benchmarks.compile import assembly, linears
bodies, report = [], assembly._report
assembly._report = lambda *parts: bodies.append(parts[3]) or report(*parts)
case = next(c for c in linears.cases() if c.constants.get("IMPRECISE") == 128)
for imprecise in (128, None):
    constants = {**case.constants, "IMPRECISE": imprecise}
    assembly.compile_case(dataclasses.replace(case, constants=constants))
tile = constants["BLOCK_M"] * constants["BLOCK_N"]
accumulators = tile // (32 * case.options["num_warps"])
assert [body.count("FADD") for body in bodies] == [accumulators, 0]
"""


def python(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    clean = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        timeout=3600,
        cwd=ROOT,
        env={**clean, **environment},
    )


def test_quick_cases() -> None:
    result = python("-m", "benchmarks.compile", "--quick")
    assert result.returncode == 0, result.stdout + result.stderr[-4000:]


@pytest.mark.slow
def test_all_cases() -> None:
    result = python("-m", "benchmarks.compile", "--check")
    assert result.returncode == 0, result.stdout + result.stderr[-4000:]


@pytest.mark.parametrize(
    ("wrong", "fault"),
    [
        ({"ceiling": 10}, "instructions > 10"),
        ({"matrix": "IGMMA"}, "expected IGMMA"),
        ({"constants": {"BLOCK_M": 256, "BLOCK_N": 128}}, "spills"),
        ({"options": {"num_stages": 40}}, "shared memory"),
    ],
)
def test_faults_are_found(wrong: dict[str, object], fault: str) -> None:
    result = python("-c", WRONG, json.dumps(wrong))
    assert result.returncode == 0, result.stderr[-4000:]
    found = json.loads(result.stdout)
    assert any(fault in one for one in found), found


def test_partial_sums_are_promoted() -> None:
    result = python("-c", PROMOTED)
    assert result.returncode == 0, result.stderr[-4000:]


def test_nothing_is_compiled_by_the_interpreter() -> None:
    result = python("-m", "benchmarks.compile", TRITON_INTERPRET="1")
    assert result.returncode == 1
    assert "TRITON_INTERPRET=1 is set" in result.stderr


def test_unknown_operator() -> None:
    result = python("-m", "benchmarks.compile", "--operator", "conv2d")
    assert result.returncode == 1
    assert "no case of operator 'conv2d'" in result.stderr
