# SPDX-License-Identifier: Apache-2.0
"""The GPU benchmark as far as it runs without one: its checks, and their effect."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed"
)

# An operator that is wrong: a bias that nobody asked for.
WRONG = """
from benchmarks.gpu import __main__ as program, jobs, linears
jobs.SOURCES = (linears,)
right = linears.linear_w4a4
linears.linear_w4a4 = lambda *arguments: right(*arguments) + 1
program.main()
"""

# Made-up times in place of a device's, of the first rows: the rest of the program is
# as it runs on one.
TIMED = """
import json, pathlib, sys
from benchmarks.gpu import __main__ as program, jobs
jobs.machine = lambda: {"bandwidth": 1e12, "int8_peak": 1e15}
names = {}
for row in jobs.rows():
    names.update({id(arm.prepare): name for name, arm in row.arms.items()})
def samples(prepare, device):
    name = names[id(prepare)]
    if name == "torch int8":
        raise RuntimeError("not for this shape")
    if name in sys.argv[2:]:
        return [1e-9] * 5
    one = {"bf16 SDPA flash": 1e-3, "triton": 1e-3}.get(name, 2e-3)
    return [one / 2, one, one, one, one * 1.5]
jobs.samples = samples
out = pathlib.Path(sys.argv[1])
writes = []
write = program._write
program._write = lambda result, out: (writes.append(1), write(result, out))
program.run = lambda work, number, ends: program._here(work)
result = {"environment": program._environment()}
program._time({"linear_wna16"}, 0.0, result, out)
assert len(writes) == len(result["speed"])
assert json.loads((out / "gpu.json").read_text()) == result
program.draw(result, out / "gpu.png")
"""

# Every arm that the CPU has, on small shapes.
ARMS = """
import torch
from benchmarks.gpu import activations, experts, kv4, linears
from benchmarks.gpu.shapes import Layer
down, head = Layer(32, 512, 256), Layer(32, 256, 4, 64, False)
for module in (activations, linears):
    module.MODELS = {"Llama-3-8B": {"down": down, "o": head}}
for module in (activations, experts, linears):
    module.TOKENS = (3,)
activations.OTHER_ROWS = {"whole": Layer(0, 256, 256)}
experts.EXPERTS = {"few": (4, 2, {"down": down})}
kv4.BATCHES, kv4.CONTEXTS, kv4.STORED, kv4.ROTATED = (2,), (128,), (5,), (5,)
kv4.LIBRARIES = {"bf16 SDPA math": kv4.SDPBackend.MATH}
device, ran = torch.device("cpu"), set()
# Products of the CPU, or that the interpreter gets wrong.
absent = {"torch fp8", "torch int8", "bf16 Triton"}
for source in (activations, linears, kv4, experts):
    for row in source.rows(device):
        assert set(row.aims) <= set(row.arms) and next(iter(row.arms.values())).own
        for name, arm in row.arms.items():
            if name in absent or (row.operator, name) == ("linear_experts", "bf16"):
                continue
            calls = arm.prepare(lambda size: 1)
            assert len(calls) == 1, name
            for call in calls:
                call()
            ran.add((row.operator, name))
print(len(ran))
"""

SHAPES = """
import json
from benchmarks.gpu.shapes import EXPERTS, MODELS
models = [*MODELS.values(), *(layers for *_, layers in EXPERTS.values())]
layers = [pair for layers in models for pair in layers.items()]
print(json.dumps([(name, s.k, s.order, s.stride) for name, s in layers]))
"""

WORKERS = """
import functools, json, os, sys, time

if __name__ == "__mp_main__" and "STILLBORN" in os.environ:
    os._exit(8)

from benchmarks.gpu.workers import run

def job(kind):
    if kind == "raise":
        raise ValueError("no")
    if kind == "die":
        os._exit(7)
    if kind == "hang":
        time.sleep(1000)
    return os.getpid()

if __name__ == "__main__":
    work = [functools.partial(job, kind) for kind in sys.argv[2:]]
    started = time.monotonic()
    done = sorted(run(work, 2, started + float(sys.argv[1])))
    print(json.dumps([[d.value is not None, d.fault] for d in done]))
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


def timed(tmp_path: Path, *fast: str) -> dict[str, Any]:
    result = python("-c", TIMED, str(tmp_path), *fast, TRITON_INTERPRET="1")
    assert result.returncode == 0, result.stderr[-4000:]
    found: dict[str, Any] = json.loads((tmp_path / "gpu.json").read_text())
    return found


def test_no_speed_of_a_wrong_operator(tmp_path: Path) -> None:
    """Rows, refusals and unavailable arms, with made-up times."""
    result = timed(tmp_path)
    operators = {row["operator"] for row in result["speed"]}
    assert operators >= {"hadamard_quantize", "linear_w4a4", "kv4_attention"}
    assert "linear_wna16" not in operators
    assert result["refused"] == ["linear_wna16 (wrong: linear_wna16)"]
    row = next(row for row in result["speed"] if row["operator"] == "linear_w4a4")
    assert row["speedups"]["triton"] == 2.0 and row["baseline"] == "bf16"
    assert "bf16" not in row["speedups"] and "torch fp8" not in row["speedups"]
    assert row["seconds"]["torch int8"] is None
    assert "not for this shape" in row["unavailable"]["torch int8"]
    assert row["spread"]["bf16"] == 1.0
    aim = row["aims"]["triton with hadamard_quantize"]
    assert aim == {"wanted": 3.0, "met": False}
    moved = row["n"] * row["k"] // 2 + row["m"] * (row["k"] + 2 * row["n"])
    assert row["of_copy"]["triton"] == pytest.approx(moved / 1e-3 / 1e12)
    aimed = [bool(row["aims"]) for row in result["speed"]]
    assert aimed == sorted(aimed, reverse=True) and any(aimed) and not all(aimed)


def test_the_fastest_attention_is_the_baseline(tmp_path: Path) -> None:
    """Triton's is timed where no library reaches most of the copy bandwidth."""

    def row(result: dict[str, Any]) -> dict[str, Any]:
        return next(
            row
            for row in result["speed"]
            if row["operator"] == "kv4_attention" and row["batch"] == 16
        )

    slow = row(timed(tmp_path))
    # 1 ms for 2.1 GB at 1 TB/s is more than the bandwidth.
    assert slow["context"] == 32768 and slow["baseline"] == "bf16 SDPA flash"
    assert "others reach" in slow["unavailable"]["bf16 Triton"]
    assert slow["of_copy"]["bf16 SDPA cuDNN"] < slow["of_copy"]["bf16 SDPA flash"]
    assert row(timed(tmp_path, "bf16 SDPA cuDNN"))["baseline"] == "bf16 SDPA cuDNN"


def test_a_process_that_dies_or_hangs(tmp_path: Path) -> None:
    """Takes its job with it, and nothing else."""
    script = tmp_path / "jobs.py"
    script.write_text(WORKERS)

    def run(*arguments: str, **environment: str) -> Any:
        environment["PYTHONPATH"] = str(ROOT)
        result = python(str(script), *arguments, **environment)
        assert result.returncode == 0, result.stderr[-4000:]
        return json.loads(result.stdout)

    fine = [True, None]
    assert run("300", "fine", "raise", "die", "fine", "fine") == [
        fine,
        [False, "ValueError: no"],
        [False, "the process ended with 7"],
        fine,
        fine,
    ]
    # Also one that ends before it has read its job.
    ended = [False, "the process ended with 8"]
    assert run("300", "fine", "fine", "fine", STILLBORN="1") == [ended] * 3
    late = [[False, f"not {what} when time was up"] for what in ("finished", "started")]
    assert run("1", "hang", "hang", "hang") == [late[0], late[0], late[1]]


def test_shapes_are_as_served() -> None:
    """Orders that the plugin takes for a plain checkpoint."""
    from vllm_lowbit.kernels.hadamard.matrices import largest_order
    from vllm_lowbit.placement import MIN_BLOCK, order_per_shard

    result = python("-c", SHAPES, TRITON_INTERPRET="1")
    assert result.returncode == 0, result.stderr[-4000:]
    for layer, k, order, stride in json.loads(result.stdout):
        if layer == "down":
            assert (order, stride) == (order_per_shard(k, MIN_BLOCK)[0], 1)
        elif layer == "o":
            assert order == order_per_shard(k // stride, 2)[0]
        else:
            assert (order, stride) == (largest_order(k), 1)


@pytest.mark.slow
def test_arms_run() -> None:
    result = python("-c", ARMS, TRITON_INTERPRET="1")
    assert result.returncode == 0, result.stderr[-4000:]
    assert int(result.stdout) == 21


def test_fewer_processes_than_none() -> None:
    result = python("-m", "benchmarks.gpu", "--out", "unused", "--workers", "-1")
    assert result.returncode == 2
    assert "argument --workers: at least 0, got -1" in result.stderr


def test_no_gpu() -> None:
    hidden = {"CUDA_VISIBLE_DEVICES": ""}
    result = python("-m", "benchmarks.gpu", "--out", "unused", **hidden)
    assert result.returncode == 1
    assert "torch sees no GPU" in result.stderr
    assert not (ROOT / "unused").exists()
