# SPDX-License-Identifier: Apache-2.0
"""Where a calibration keeps what is large, and what it says it will take."""

import errno
import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from vllm_lowbit.architecture import ModelShape
from vllm_lowbit.calibrate import estimate
from vllm_lowbit.calibrate.estimate import Estimate, Estimator, Speed
from vllm_lowbit.calibrate.pipeline import calibrate
from vllm_lowbit.calibrate.recipe import Recipe, load_recipe
from vllm_lowbit.calibrate.scratch import Scratch
from vllm_lowbit.calibrate.text import default_text
from vllm_lowbit.errors import ConfigError, OutputError

from .capped import OVER

MIB = 1 << 20
PROGRAM = Path(__file__).with_name("capped.py")


def _recipe(name: str, **overrides: Any) -> Recipe:
    return load_recipe(name).override(samples=8, seq_len=64, **overrides)


def _calibrated(model: Path, output: Path, recipe: Recipe, **options: Any) -> Path:
    calibrate(str(model), output, recipe, default_text(), "cpu", **options)
    return output


@pytest.mark.parametrize("directory", [False, True])
def test_tensors_on_disk_are_as_in_memory(tmp_path: Path, directory: bool) -> None:
    scratch = Scratch(tmp_path if directory else None)
    parts = [torch.randn(n, 3, 2) for n in (4, 1, 2)]
    whole = scratch.collect(iter(parts), 7)
    assert torch.equal(whole, torch.cat(parts)) and whole.is_contiguous()
    kept = scratch.keep(whole.bfloat16())
    assert torch.equal(kept, whole.bfloat16())
    # Nothing is left behind, however this process ends.
    assert not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match="7 rows came, 8 were announced"):
        scratch.collect(iter(parts), 8)


@pytest.mark.parametrize(
    ("name", "overrides", "tied"),
    [
        ("lowbit", {}, False),
        ("lowbit", {}, True),
        ("smoothquant", {"vocab_bits": 8}, True),
        ("omniquant", {}, False),
    ],
)
def test_a_checkpoint_is_the_same_from_disk(
    tmp_path: Path,
    tiny_model: Callable[..., Path],
    name: str,
    overrides: dict[str, Any],
    tied: bool,
) -> None:
    model = tiny_model(tmp_path / "base", tokenizer=True, tie_word_embeddings=tied)
    recipe, scratch = _recipe(name, **overrides), tmp_path / "scratch"
    scratch.mkdir()
    said: list[Estimate] = []
    in_memory = _calibrated(model, tmp_path / "a", recipe, announce=said.append)
    on_disk = _calibrated(
        model, tmp_path / "b", recipe, scratch=scratch, announce=said.append
    )
    for path in in_memory.glob("*.safetensors"):
        assert path.read_bytes() == (on_disk / path.name).read_bytes()
    assert not list(scratch.iterdir())
    assert said[0].scratch == 0 < said[1].scratch
    assert said[1].memory < said[0].memory and said[0].output == said[1].output


def test_a_full_disk_is_named_and_nothing_is_left(
    tmp_path: Path, tiny_model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model(tmp_path / "base", tokenizer=True)
    taken, reserve = 0, os.posix_fallocate

    def fallocate(descriptor: int, offset: int, size: int) -> None:
        nonlocal taken
        taken += size
        if taken > 8 * MIB:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        reserve(descriptor, offset, size)

    monkeypatch.setattr(os, "posix_fallocate", fallocate)
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    with pytest.raises(OutputError, match=rf"{scratch}.*No space left"):
        _calibrated(model, tmp_path / "out", _recipe("lowbit"), scratch=scratch)
    assert taken > 8 * MIB
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "scratch"]
    assert not list(scratch.iterdir())


def test_a_directory_that_is_none(
    tmp_path: Path, tiny_model: Callable[..., Path]
) -> None:
    model = tiny_model(tmp_path / "base", tokenizer=True)
    with pytest.raises(ConfigError, match=r"scratch .*missing: not a directory"):
        _calibrated(
            model, tmp_path / "out", _recipe("rtn"), scratch=tmp_path / "missing"
        )


def test_what_does_not_fit_is_refused_before_anything_is_written(
    tmp_path: Path, tiny_model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model(tmp_path / "base", tokenizer=True)
    said: list[Estimate] = []
    run = tmp_path / "a"
    _calibrated(model, run, _recipe("gptq"), announce=said.append)
    _calibrated(
        model, tmp_path / "b", _recipe("gptq"), scratch=tmp_path, announce=said.append
    )
    in_memory, on_disk = (each.memory for each in said)
    output = tmp_path / "out"
    for there, message in (
        (in_memory - 1, r"calibrating takes about .* --scratch DIR takes "),
        (on_disk - 1, r"calibrating takes about .* fewer or shorter samples"),
    ):
        monkeypatch.setattr(estimate, "available_memory", lambda there=there: there)
        with pytest.raises(ConfigError, match=message):
            _calibrated(model, output, _recipe("gptq"))
        assert not output.exists()
    with pytest.raises(ConfigError, match="fewer or shorter samples"):
        _calibrated(model, output, _recipe("gptq"), scratch=tmp_path)
    monkeypatch.setattr(estimate, "available_memory", lambda: in_memory)
    _calibrated(model, output, _recipe("gptq"))


def test_70b_in_24_gib() -> None:
    shape = ModelShape(
        hidden_size=8192,
        intermediate_size=28672,
        num_layers=80,
        num_heads=64,
        num_kv_heads=8,
        head_dim=128,
        vocab_size=128256,
        tie_word_embeddings=False,
    )
    estimator = Estimator(shape, load_recipe("lowbit"), 160, output=36 << 30)
    speed = Speed(single=1e11, double=1e10, rounded=1e7)
    on_disk = estimator.estimate(speed, on_disk=True).memory / (1 << 30)
    in_memory = estimator.estimate(speed, on_disk=False).memory / (1 << 30)
    assert on_disk < 24 < in_memory
    # As README says.
    assert (math.ceil(on_disk), round(in_memory)) == (18, 57)


def test_available_memory_heeds_the_control_group(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    free = estimate.available_memory()
    assert free > 0
    monkeypatch.setattr(estimate, "_CGROUP", tmp_path)
    (tmp_path / "memory.current").write_text(f"{3 * MIB}\n")
    (tmp_path / "memory.max").write_text(f"{5 * MIB}\n")
    assert estimate.available_memory() == 2 * MIB
    (tmp_path / "memory.max").write_text("max\n")
    assert estimate.available_memory() > 2 * MIB


def _capped(cap: int, *words: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, PROGRAM, str(cap), *map(str, words)],
        capture_output=True,
        text=True,
        # What was freed goes back at once, so that the peak is what was in use.
        env={**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_TRIM_THRESHOLD_": "0"},
    )


@pytest.mark.parametrize(
    ("name", "section", "on_disk"),
    [
        ("gptaq", {}, True),
        ("ostquant", {"learn": {"steps": 2, "tokens_per_step": 1024}}, False),
        pytest.param("rtn", {}, True, marks=pytest.mark.slow),
        pytest.param(
            *("lowbit", {"refine": {"scope": "model", "steps": 2}}, False),
            marks=pytest.mark.slow,
        ),
    ],
)
def test_a_run_takes_less_than_its_estimate(
    tmp_path: Path,
    tiny_model: Callable[..., Path],
    name: str,
    section: dict[str, dict[str, int]],
    on_disk: bool,
) -> None:
    data = yaml.safe_load(load_recipe(name).text())
    for key, values in section.items():
        data.setdefault(key, {}).update(values)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(data))
    model = tiny_model(
        tmp_path / "base",
        tokenizer=True,
        hidden_size=512,
        intermediate_size=2048,
        num_attention_heads=8,
    )
    scratch = tmp_path if on_disk else "-"
    done = _capped(8 << 30, "calibrate", model, tmp_path / "out", recipe, scratch)
    assert not done.returncode, done.stderr
    peak, expected = map(int, done.stdout.split())
    assert peak < expected < 3 * peak


@pytest.mark.slow
@pytest.mark.parametrize(
    ("scheme", "vocab_bits"), [(None, 16), ("w4a4kv4-g128", 8), ("w4a4kv4", 16)]
)
def test_measuring_takes_less_than_its_estimate(
    tmp_path: Path,
    tiny_model: Callable[..., Path],
    lowbit_checkpoint: Callable[..., Path],
    scheme: str | None,
    vocab_bits: int,
) -> None:
    model = tiny_model(
        tmp_path / "base",
        tokenizer=True,
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=8,
        num_attention_heads=16,
    )
    if scheme is not None:
        model = lowbit_checkpoint(tmp_path / "out", model, scheme, vocab_bits)
    done = _capped(8 << 30, "measure", model, 256)
    assert not done.returncode, done.stderr
    peak, expected = map(int, done.stdout.split()[-2:])
    assert peak < expected < 3 * peak


@pytest.mark.slow
def test_a_model_larger_than_the_cap(
    tmp_path: Path, tiny_model: Callable[..., Path]
) -> None:
    model = tiny_model(
        tmp_path / "base",
        shards=4,
        tokenizer=True,
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=32,
        num_attention_heads=16,
    )
    size = sum(path.stat().st_size for path in model.glob("*.safetensors"))
    cap = size * 9 // 10
    done = _capped(cap, "calibrate", model, tmp_path / "out", "rtn", tmp_path)
    assert not done.returncode, done.stderr
    without = _capped(cap // 2, "calibrate", model, tmp_path / "other", "rtn", "-")
    assert without.returncode == OVER
