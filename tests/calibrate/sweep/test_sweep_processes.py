# SPDX-License-Identifier: Apache-2.0
"""`vllm-lowbit sweep` in real processes: interrupted, and on a Ray cluster."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from vllm_lowbit.calibrate.evaluate import evaluate
from vllm_lowbit.calibrate.learn.snapshot import snapshot_path
from vllm_lowbit.calibrate.pipeline import calibrate
from vllm_lowbit.calibrate.recipe import load_recipe
from vllm_lowbit.calibrate.text import default_text

from .commands import MEASURED, SMALL, TEXT, records, sweep

LEARNED: dict[str, Any] = {
    "name": "learned",
    "transforms": {"residual": "learned", "scales": "learned", "equalize": True},
    "learn": {"steps": 200, "tokens_per_step": 64},
    "data": {"samples": 4, "seq_len": 32},
}


def command(*arguments: object) -> subprocess.Popen[str]:
    """The installed command, in a process group of its own, as a shell starts it."""
    return subprocess.Popen(
        [str(Path(sys.executable).with_name("vllm-lowbit")), *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd="/",
        process_group=0,
        # But for interrupts, which it has background jobs ignore.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )


def until(holds: Callable[[], object]) -> None:
    for _ in range(1800):
        if holds():
            return
        time.sleep(0.1)
    raise AssertionError("not within three minutes")


@pytest.mark.parametrize("where", [("--workers", 2), ("--ray", "local")])
def test_interrupted_learning_goes_on(
    model: Path, tmp_path: Path, where: tuple[object, ...]
) -> None:
    """By the same command, from its snapshot, to the bytes of one without."""
    if "--ray" in where:
        pytest.importorskip("ray", reason="extra `ray`")
    recipe, out = tmp_path / "learned.yaml", tmp_path / "out"
    recipe.write_text(yaml.safe_dump(LEARNED))
    words = ("sweep", model, "-o", out, "--recipe", recipe, *MEASURED)
    words += ("--calibration-data", default_text())
    name = "learned-w4a4kv4-seed0"
    log, checkpoint = out / "logs" / f"{name}.log", out / name
    running = command(*words, *where)
    until(lambda: log.exists() and "/200 learning" in log.read_text())
    os.killpg(running.pid, signal.SIGINT)
    _, stderr = running.communicate(timeout=120)
    assert running.returncode == 130, stderr
    assert f"interrupted; {out} holds what was done: the same command" in stderr
    assert "Traceback" not in stderr
    snapshot = snapshot_path(checkpoint)
    assert snapshot.exists() and not checkpoint.exists()
    assert not list(out.glob(f".{name}-*"))
    assert "not measured yet: " in (out / "sweep.md").read_text()
    assert "perplexity" not in records(out)[name]

    done = command(*words, "--workers", 2)
    _, stderr = done.communicate(timeout=300)
    assert done.returncode == 0, stderr
    assert not snapshot.exists()
    # Of a part of the calibration nothing is said.
    assert "calibration_seconds" not in records(out)[name]
    alone, threads = tmp_path / "alone", torch.get_num_threads()
    torch.set_num_threads(records(out)[name]["threads"])
    try:
        text = default_text()
        calibrate(str(model), alone, load_recipe(str(recipe)), text, "cpu")
    finally:
        torch.set_num_threads(threads)
    weights = "model.safetensors"
    assert (alone / weights).read_bytes() == (checkpoint / weights).read_bytes()


@pytest.fixture
def ray() -> Iterator[Any]:
    yield pytest.importorskip("ray", reason="extra `ray`")


def test_on_a_cluster(ray: Any, model: Path, tmp_path: Path) -> None:
    """Processes on its nodes give what they give here."""
    out = tmp_path / "out"
    stdout, stderr = sweep(
        *(model, "-o", out, "--recipe", "rtn", *SMALL, *MEASURED, "--ray", "local"),
        "--remove-checkpoints",
    )
    found = records(out)
    assert (
        found["float"]["perplexity"] == evaluate(str(model), TEXT, 64, 200).perplexity
    )
    recipe = load_recipe("rtn").override(samples=4, seq_len=32)
    alone = tmp_path / "alone"
    calibrate(str(model), alone, recipe, default_text(), "cpu")
    expected = evaluate(str(alone), TEXT, 64, 200).perplexity
    assert found["rtn-w4a4kv4-seed0"]["perplexity"] == pytest.approx(expected, rel=1e-3)
    assert "measuring " in (out / "logs" / "rtn-w4a4kv4-seed0.log").read_text()
    assert not (out / "rtn-w4a4kv4-seed0").exists()
    assert not ray.is_initialized()
