# SPDX-License-Identifier: Apache-2.0
"""Code of the Triton kernels for every chip, compiled without a device.

In processes of their own: ``benchmarks`` is not a package that tests can import.
"""

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

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
from vllm_lowbit.kernels.gpu.limits import Need
case = next(c for c in linears.cases() if c.target == "sm_80" and c.ceiling)
wrong = json.loads(sys.argv[1])
constants = {**case.constants, **wrong.pop("constants", {})}
options = {**case.options, **wrong.pop("options", {})}
if "need" in wrong:
    wrong["need"] = Need(*wrong["need"])
case = dataclasses.replace(case, constants=constants, options=options, **wrong)
print(json.dumps(faults(case, compile_case(case))))
"""

# Sums of each group of a turn are apart in tensor memory. Where that is not enough,
# Triton 3.9 compiles to a trap, and would refuse to load it.
TRAP = """
import dataclasses
from benchmarks.compile import linears
from benchmarks.compile.assembly import compile_case, faults
name = "2 bits, group 32, every option, M <= any: 64 x 128, 8 warps, 3 stages"
case = next(c for c in linears.cases() if (c.target, c.name) == ("sm_100", name))
constants = {**case.constants, "BLOCK_M": 128}
case = dataclasses.replace(case, constants=constants)
report = compile_case(case)
assert report.tensor == 576 and not report.matrix, report
found = faults(case, report)
assert "tensor memory 576 > 512" in found, found
assert any("no matrix instruction" in one for one in found), found
"""

# Partial sums of Hopper's e4m3 units are added outside of them: one addition for each
# of the accumulators of a thread.
PROMOTED = """
import dataclasses
from benchmarks.compile import assembly, linears
bodies, loop = [], assembly.main_loop
assembly.main_loop = lambda *code: bodies.append(loop(*code)) or bodies[-1]
case = next(c for c in linears.cases() if c.constants.get("IMPRECISE") == 128)
for imprecise in (128, None):
    constants = {**case.constants, "IMPRECISE": imprecise}
    assembly.compile_case(dataclasses.replace(case, constants=constants))
tile = constants["BLOCK_M"] * constants["BLOCK_N"]
accumulators = tile // (32 * case.options["num_warps"])
assert [body.count(" FADD ") for body in bodies] == [accumulators, 0]
"""


# What the results lack is added to them: rows of cases that fail are made anew.
ADDED = """
import json, pathlib, sys
from benchmarks.compile import __main__ as report
from benchmarks.compile.assembly import Report
from benchmarks.compile.case import Case
report.RESULTS = folder = pathlib.Path(sys.argv[1])
code = vars(Report(64, 0, 1024, 0, {}, 100, True))

def case(name, **more):
    return Case(**{
        "operator": "linear_w4a4", "target": "sm_80", "name": name, "kernel": None,
        "types": {}, "constants": {}, "options": {"num_warps": 4}, "ceiling": 100,
        **more
    })

def row(name, **more):
    own = {k: getattr(case(name), k) for k in ("operator", "target", "options")}
    return {**own, "name": name, "ceiling": 100, "faults": [], **code, **more}

def names(sections):
    return {key: [r["name"] for r in s["cases"]] for key, s in sections.items()}

report._replace([row("a"), row("b", spills=1), row("x", operator="kv4"), row("old")])
every = [case("a", ceiling=99), case("b"), case("x", operator="kv4"), case("c")]
judged = report._judged(every)
assert names(judged) == {"linear_w4a4": ["a", "b"], "kv4": ["x"]}
assert [(r["name"], r["ceiling"], r["faults"]) for r in report._rows_of(judged)] == [
    ("a", 99, ["100 instructions > 99"]), ("b", 100, ["1 spills"]), ("x", 100, [])
]
other = report._judged([case("a", options={"num_warps": 8}), case("b")])
assert names(other) == {"linear_w4a4": ["b"], "kv4": []}

report._add(judged, [row("b")])
kept = {"linear_w4a4": ["a"], "kv4": ["x"]}
assert names(report._sections()) == {**kept, "linear_w4a4, part 2": ["b"]}
report._add(report._judged(every), [row("c")])
assert names(report._sections()) == {**kept, "linear_w4a4, part 2": ["b", "c"]}
report.describe = lambda: {"date": "another"}
report._add(report._judged(every), [row("c")])
parts = {"linear_w4a4, part 2": ["b"], "linear_w4a4, part 3": ["c"]}
assert names(report._sections()) == {**kept, **parts}
assert "--missing`: date another" in (folder / "compile.md").read_text()
report._replace([row("e")])
assert names(report._sections()) == {"linear_w4a4": ["e"], "kv4": ["x"]}
report._add(report._judged([case("e")]), [])
assert names(report._sections()) == {"linear_w4a4": ["e"]}
"""


# The loop of kv4_attention on gfx942 is jumped into, and its blocks do not lie in
# order: the shortest way back over a product is a part of it. Beside it a loop without
# products, around it another.
JUMPED_INTO = """
\ts_mov_b32 outside
.LBB0_1:
\ts_add_u32 outer
\ts_branch .LBB0_3
.LBB0_2:
\tv_mfma_a
\ts_cbranch_scc1 .LBB0_4
.LBB0_3:
\tv_mul_f32
\tv_mfma_b
\ts_cbranch_scc0 .LBB0_2
\ts_branch .LBB0_5
.LBB0_4:
\tv_mfma_c
\ts_branch .LBB0_3
.LBB0_5:
\tv_add_f32 a
\tv_add_f32 b
\ts_cbranch_vccnz .LBB0_5
\ts_cbranch_scc1 .LBB0_1
\ts_endpgm
"""
SASS_LOOP = """
        /*0000*/                   S2R R1, SR_TID.X ;
        /*0010*/              @!P0 EXIT ;
.L_x_1:
        /*0020*/                   LDS R2, [R1] ;
        /*0030*/              @!P1 BRA `(.L_x_2) ;
        /*0040*/                   HMMA.16816.F32 R4, R4, R8, R4 ;
        /*0050*/                   BRA `(.L_x_1) ;
.L_x_2:
        /*0060*/                   HMMA.16816.F32 R4, R4, R8, R4 ;
        /*0070*/                   EXIT ;
.L_x_3:
        /*0080*/                   BRA `(.L_x_3);
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
        ({"ceiling": 10, "need": [1, 0]}, "instructions > 10"),
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
    assert ("need" in wrong) == any("> 1 of gpu/limits.py" in one for one in found)


@pytest.mark.slow
def test_too_much_tensor_memory() -> None:
    result = python("-c", TRAP)
    assert result.returncode == 0, result.stderr[-4000:]


def test_partial_sums_are_promoted() -> None:
    result = python("-c", PROMOTED)
    assert result.returncode == 0, result.stderr[-4000:]


def test_what_the_results_lack_is_added(tmp_path: Path) -> None:
    result = python("-c", ADDED, str(tmp_path))
    assert result.returncode == 0, result.stderr[-4000:]


@pytest.fixture(scope="module")
def loops() -> ModuleType:
    """Needs nothing of Triton, so it is loaded here."""
    path = ROOT / "benchmarks/compile/loops.py"
    spec = importlib.util.spec_from_file_location("loops", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["loops"] = module
    spec.loader.exec_module(module)
    return module


def test_a_loop_that_is_jumped_into(loops: ModuleType) -> None:
    matrix = re.compile("mfma")
    loop = loops.main_loop(JUMPED_INTO, loops.GCN, matrix)
    assert sorted(re.findall("mfma_.", loop)) == ["mfma_a", "mfma_b", "mfma_c"]
    assert "v_mul_f32" in loop
    assert "outer" not in loop and "v_add_f32" not in loop
    without = JUMPED_INTO.replace("mfma", "fma")
    assert loops.main_loop(without, loops.GCN, matrix) is None


def test_a_loop_of_sass(loops: ModuleType) -> None:
    loop = loops.main_loop(SASS_LOOP, loops.SASS, re.compile("MMA"))
    assert loop.count("HMMA") == 1 and loop.count("/*00") == 4


def test_nothing_is_compiled_by_the_interpreter() -> None:
    result = python("-m", "benchmarks.compile", TRITON_INTERPRET="1")
    assert result.returncode == 1
    assert "TRITON_INTERPRET=1 is set" in result.stderr


def test_unknown_operator() -> None:
    result = python("-m", "benchmarks.compile", "--operator", "conv2d")
    assert result.returncode == 1
    assert "no case of operator 'conv2d'" in result.stderr
