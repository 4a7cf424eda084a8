# SPDX-License-Identifier: Apache-2.0
"""Tuning as far as it goes without a GPU: the search, and the file it writes."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed"
)
# In a process of its own: Triton decides at its import whether kernels are interpreted.
SEARCH = """
import json, math, time
from benchmarks import tune
from vllm_lowbit.kernels.gpu import configs
from vllm_lowbit.kernels.gpu.configs import LinearConfig

tried = []
def cost(config):
    tried.append(config)
    if config.stages == 6:
        return math.inf
    return abs(math.log2(config.block_n / 128)) + 0.1 * config.split_k + 1

start = LinearConfig(16, 64, 4, 2, True, split_k=4)
best, found = tune.tuned(start, cost, math.inf)
assert (best.block_n, best.split_k) == (128, 1), best
assert found == cost(best) and len(set(tried)) == len(tried) - 1
unchanged, _ = tune.tuned(start, cost, time.monotonic() - 1)
assert unchanged == start
assert not best.e4m3 and "e4m3" not in tune.settings_of("linear_wna16", "sm_90")
assert "e4m3" not in tune.settings_of("linear_w4a4", "sm_100")
settings = tune.settings_of("linear_w4a4", "sm_90")
best, _ = tune.tuned(start, lambda c: 1 - 0.5 * c.e4m3, math.inf, settings)
assert best.e4m3
worth_nothing, _ = tune.tuned(start, lambda c: 1 - 0.005 * (c.warps == 8), math.inf)
assert worth_nothing == start

import pathlib, sys
path = pathlib.Path(sys.argv[1]) / "chip.json"
for arch in (*configs.architectures(), configs.FALLBACK):
    assert tune.table_to_start_from(path, arch) == tune.copied(configs.table(arch))
    tune._write(path, tune.copied(configs.table(arch)))
    assert configs.read(path) == configs.table(arch)
    # What is there already is gone on from.
    assert tune.table_to_start_from(path, "sm_90") == tune.copied(configs.table(arch))
    path.unlink()

now = time.monotonic()
assert abs(tune.share_of(now + 80, 8) - now - 10) < 5
assert tune.share_of(now - 80, 8) - now < 5
"""
# Results are held against the reference's: a wrong one is out, be it the first.
COST = """
import math, torch
from benchmarks import tune
from benchmarks.gpu import linears
from vllm_lowbit.kernels.gpu.configs import LinearConfig

tune.SHAPES = ((24, 256),)
tune.seconds = lambda prepare, device: 2.0
for operator in tune.OPERATORS:
    for scheme in tune.GROUPS:
        cost = tune.cost_on_device(operator, scheme, (5,), torch.device("cpu"))
        assert cost(LinearConfig(16, 16, 4, 2, True)) == 2.0, (operator, scheme)
        assert cost(LinearConfig(32, 16, 4, 2, False)) == 2.0
        assert cost(LinearConfig(17, 16, 4, 2, True)) == math.inf  # no power of two
        other = cost(LinearConfig(16, 16, 4, 2, True, e4m3=True))
        assert other == (2.0 if operator == "linear_w4a4" else math.inf)
for operator in tune.OPERATORS:
    real = getattr(linears, operator)
    def wrong(*arguments):
        right = real(*arguments)
        return right * 1.02 if arguments[-1].block_m == 16 else right
    setattr(linears, operator, wrong)
    for scheme in tune.GROUPS:
        cost = tune.cost_on_device(operator, scheme, (70,), torch.device("cpu"))
        assert cost(LinearConfig(16, 16, 4, 2, True)) == math.inf, (operator, scheme)
        assert cost(LinearConfig(32, 16, 4, 2, True)) == 2.0
    setattr(linears, operator, real)
"""


def _run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    clean = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        timeout=600,
        cwd=ROOT,
        env={**clean, **environment},
    )


@pytest.mark.parametrize("program", [SEARCH, COST], ids=["search", "cost"])
def test_without_a_gpu(program: str, tmp_path: Path) -> None:
    result = _run("-c", program, str(tmp_path), TRITON_INTERPRET="1")
    assert result.returncode == 0, result.stderr[-4000:]


def test_no_gpu(tmp_path: Path) -> None:
    out = tmp_path / "out"
    hidden = {"CUDA_VISIBLE_DEVICES": ""}
    result = _run("-m", "benchmarks.tune", "--out", str(out), **hidden)
    assert result.returncode == 1
    assert "torch sees no GPU" in result.stderr and not out.exists()
