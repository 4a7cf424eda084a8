# SPDX-License-Identifier: Apache-2.0
"""The GPU benchmark as far as it runs without one: its checks, and their effect."""

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

# An operator that is wrong: a bias that nobody asked for.
WRONG = """
import sys
from benchmarks.gpu import __main__ as program, activations, linears
program.SOURCES = (linears,)
right = linears.linear_w4a4
linears.linear_w4a4 = lambda *arguments: right(*arguments) + 1
program.main()
"""

# Times instead of a device's: the rest of the program is as it runs on one.
TIMED = """
import json, sys, types, pathlib
import torch
from benchmarks.gpu import __main__ as program, timing
timing.copy_bandwidth = lambda device: 1e12
timing.integer_peak = lambda device: 1e15
def seconds(prepare, device):
    if "int8" in str(prepare):
        raise RuntimeError("not for this shape")
    return 1e-3
timing.seconds = seconds
result = {}
program._time(torch.device("cpu"), {"linear_wna16"}, 100.0, result)
result["environment"] = program._environment(torch.device("cpu"))
program.draw(result, pathlib.Path(sys.argv[1]) / "gpu.png")
print(json.dumps(result))
"""


def python(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    clean = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        timeout=1800,
        cwd=ROOT,
        env={**clean, **environment},
    )


def test_checks_pass_in_the_interpreter(tmp_path: Path) -> None:
    result = python(
        *("-m", "benchmarks.gpu", "--out", str(tmp_path)), TRITON_INTERPRET="1"
    )
    assert result.returncode == 0, result.stdout + result.stderr[-4000:]
    written = json.loads((tmp_path / "gpu.json").read_text())
    operators = {check["operator"] for check in written["checks"]}
    assert operators >= {
        "hadamard_quantize",
        "linear_w4a4",
        "linear_wna16",
        "linear_experts",
    }
    assert not any(check["fault"] for check in written["checks"])
    assert written["environment"]["device"] == "interpreter"
    assert "speed" not in written


def test_a_wrong_operator_fails(tmp_path: Path) -> None:
    result = python("-c", WRONG, "--out", str(tmp_path), TRITON_INTERPRET="1")
    assert result.returncode == 1, result.stderr[-4000:]
    written = json.loads((tmp_path / "gpu.json").read_text())
    wrong = {c["operator"] for c in written["checks"] if c["fault"]}
    assert wrong == {"linear_w4a4"}
    assert "WRONG linear_w4a4" in result.stdout


def test_no_speed_of_a_wrong_operator(tmp_path: Path) -> None:
    """Rows, refusals and unavailable arms, with made-up times."""
    result = python("-c", TIMED, str(tmp_path), TRITON_INTERPRET="1")
    assert result.returncode == 0, result.stderr[-4000:]
    timed = json.loads(result.stdout.splitlines()[-1])
    assert {row["operator"] for row in timed["speed"]} >= {
        "hadamard_quantize",
        "linear_w4a4",
    }
    assert not any(row["operator"] == "linear_wna16" for row in timed["speed"])
    assert timed["refused"] == ["linear_wna16 (wrong: linear_wna16)"]
    row = next(row for row in timed["speed"] if row["operator"] == "linear_w4a4")
    assert row["speedup"] == 1.0 and row["seconds"]["int8"] is None
    assert "not for this shape" in row["unavailable"]["int8"]


def test_no_gpu() -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is one")
    result = python("-m", "benchmarks.gpu", "--out", "unused")
    assert result.returncode == 1
    assert "torch sees no GPU" in result.stderr
    assert not (ROOT / "unused").exists()
