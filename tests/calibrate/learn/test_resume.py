# SPDX-License-Identifier: Apache-2.0
"""Learning in the whole calibration: same bytes, interrupted or not, or an error."""

import json
import math
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from typer.testing import CliRunner

from vllm_lowbit.calibrate.calibration import Progress
from vllm_lowbit.calibrate.learn import run
from vllm_lowbit.calibrate.perplexity import perplexity
from vllm_lowbit.calibrate.pipeline import calibrate, held_out_windows
from vllm_lowbit.calibrate.publish import Report
from vllm_lowbit.calibrate.recipe import Recipe, load_recipe
from vllm_lowbit.calibrate.reference_model import ReferenceModel
from vllm_lowbit.calibrate.text import calibration_windows, default_text
from vllm_lowbit.cli import app
from vllm_lowbit.errors import (
    CalibrationError,
    ConfigError,
    LowbitError,
    UnsupportedError,
)
from vllm_lowbit.manifest import verify

REF_7M = Path(__file__).parents[3] / "models" / "ref-7m"
STEPS = 5
RECIPE: dict[str, Any] = {
    "name": "small",
    "transforms": {
        "residual": "learned",
        "value": "learned",
        "scales": "learned",
        "equalize": True,
    },
    "learn": {"steps": STEPS, "tokens_per_step": 64, "quantize_weights": True},
    "activations": {"clip": "learned", "clip_ratio": 0.9},
    "data": {"samples": 8, "seq_len": 32},
}


def _recipe(**learn: Any) -> Recipe:
    return Recipe.model_validate(RECIPE | {"learn": RECIPE["learn"] | learn})


def _quiet(done: int, total: int, what: str) -> None:
    pass


def _run(
    model: Path,
    out: Path,
    recipe: Recipe,
    progress: Progress = _quiet,
    resume: bool = False,
) -> Report:
    out.parent.mkdir(exist_ok=True)
    return calibrate(str(model), out, recipe, default_text(), "cpu", progress, resume)


def _files(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def _stop_at(step: int, raised: Callable[[], object]) -> Progress:
    def progress(done: int, total: int, what: str) -> None:
        if done == step and what.startswith("learning"):
            raised()

    return progress


def _press_ctrl_c() -> None:
    signal.raise_signal(signal.SIGINT)


@pytest.fixture(scope="module")
def model(tiny_model: Callable[..., Path], tmp_path_factory: Any) -> Path:
    return tiny_model(tmp_path_factory.mktemp("base"), tokenizer=True)


@pytest.fixture(scope="module")
def whole(model: Path, tmp_path_factory: Any) -> Path:
    """What an uninterrupted run gives."""
    out = tmp_path_factory.mktemp("whole") / "out"
    _run(model, out, _recipe())
    return out


def test_checkpoint(whole: Path) -> None:
    config = json.loads((whole / "config.json").read_text())
    rotations = config["quantization_config"]["rotations"]
    for name, size in (("residual", 128), ("v", 64)):
        expected = {"kind": "orthogonal", "apply": "folded", "order": size}
        assert rotations[name].items() >= expected.items()
    reference = ReferenceModel(str(whole))
    assert list(verify(whole, reference.shape, reference.config)) == []
    assert torch.isfinite(reference(torch.arange(9))).all()
    curves = json.loads((whole / "calibration.json").read_text())["curves"]
    assert [step for step, _ in curves["learn"]] == list(range(1, STEPS + 1))
    recipe = load_recipe(str(whole / "recipe.yaml"))
    assert recipe == _recipe()
    card = (whole / "README.md").read_text()
    assert "learned" in card
    assert "How much of its range each input keeps was learned" in card
    assert not list(whole.parent.glob("*.snapshot"))


def test_clip_ratios_are_those_of_every_input(whole: Path) -> None:
    """Learned from 0.9, a value for each, with which the reference computes."""
    reference = ReferenceModel(str(whole))
    assert reference.config is not None
    activations = reference.config.scheme.activations
    assert activations.clip_ratio == 1 and activations.clip_ratios is not None
    found = dict(activations.clip_ratios)
    ratios = [ratio for of_layers in found.values() for ratio in of_layers]
    assert len(set(ratios)) > 4
    assert all(0.85 < ratio < 0.95 and ratio == round(ratio, 4) for ratio in ratios)
    for place, linear in (
        ("attn_input", "self_attn.qkv_proj"),
        ("o_input", "self_attn.o_proj"),
        ("mlp_input", "mlp.gate_up_proj"),
        ("down_input", "mlp.down_proj"),
    ):
        for layer, ratio in enumerate(found[place]):
            grid = reference.linears[f"model.layers.{layer}.{linear}"].activations
            assert grid.clip_ratio == ratio


@pytest.mark.parametrize("online", ["hadamard", "none"])
def test_served_as_calibrated(tmp_path: Path, online: str) -> None:
    """The bit-exact reference finds the loss that calibration reported."""
    transforms = RECIPE["transforms"] | {"attn_input": online, "mlp_input": online}
    data = {"samples": 16, "seq_len": 64}
    recipe = Recipe.model_validate(RECIPE | {"transforms": transforms, "data": data})
    report = _run(REF_7M, tmp_path / "out", recipe)
    count = 16 + held_out_windows(16)
    windows = calibration_windows(str(REF_7M), default_text(), count, 64, 0)
    model = ReferenceModel(str(tmp_path / "out"))
    served = perplexity(model, windows[16:].flatten(), 64)
    assert served.tokens == report.held_out_tokens
    # Last bits of the float GEMMs flip codes; the loss stays.
    loss = math.log(served.perplexity)
    assert loss == pytest.approx(report.held_out.quantized, abs=0.03)
    assert loss == pytest.approx(report.held_out.plain, abs=0.25)


def test_same_run_same_bytes_other_seed_other_bytes(
    model: Path, whole: Path, tmp_path: Path
) -> None:
    _run(model, tmp_path / "again" / "out", _recipe())
    assert _files(tmp_path / "again" / "out") == _files(whole)
    _run(model, tmp_path / "other" / "out", _recipe().override(seed=1))
    other = _files(tmp_path / "other" / "out")
    assert other["model.safetensors"] != _files(whole)["model.safetensors"]


@pytest.mark.parametrize("step", [0, 1, 3, STEPS])
def test_ctrl_c_and_resume_give_the_same_bytes(
    model: Path, whole: Path, tmp_path: Path, step: int
) -> None:
    """Before the first step, it is done."""
    out = tmp_path / "out"
    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        _run(model, out, _recipe(), _stop_at(step, _press_ctrl_c))
    assert signal.getsignal(signal.SIGINT) is handler
    assert [path.name for path in tmp_path.iterdir()] == ["out.snapshot"]
    seen: list[int] = []
    _run(
        model,
        out,
        _recipe(),
        lambda done, total, what: seen.append(done) if "learning" in what else None,
        resume=True,
    )
    assert seen == list(range(max(step, 1), STEPS + 1))
    assert _files(out) == _files(whole)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_crash_goes_on_from_the_last_snapshot(
    model: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also one after learning, in the middle of quantization."""
    monkeypatch.setattr(run, "SNAPSHOT_SECONDS", -1.0)

    def crash(*_: object) -> None:
        raise MemoryError

    with pytest.raises(MemoryError):
        _run(model, tmp_path / "out", _recipe(), _stop_at(4, crash))

    def later(done: int, total: int, what: str) -> None:
        if "layers.1.mlp.up_proj" in what:
            crash()

    with pytest.raises(MemoryError):
        _run(model, tmp_path / "out", _recipe(), later, resume=True)
    _run(model, tmp_path / "out", _recipe(), resume=True)
    assert _files(tmp_path / "out") == _files(whole)


class TestRefused:
    @pytest.fixture
    def stopped(self, model: Path, tmp_path: Path) -> Path:
        with pytest.raises(KeyboardInterrupt):
            _run(model, tmp_path / "out", _recipe(), _stop_at(2, _press_ctrl_c))
        return tmp_path

    def _refuse(
        self, error: type[LowbitError], message: str, *arguments: Any, **options: Any
    ) -> None:
        with pytest.raises(error, match=message):
            _run(*arguments, **options)

    def test_a_snapshot_nobody_asked_for(self, model: Path, stopped: Path) -> None:
        message = r"out\.snapshot is what an unfinished run left: go on with --resume"
        self._refuse(ConfigError, message, model, stopped / "out", _recipe())
        assert (stopped / "out.snapshot").exists()

    def test_another_recipe(self, model: Path, stopped: Path) -> None:
        message = r"out\.snapshot is of another run: the recipe differ"
        recipe = _recipe(scale_lr=0.1)
        out = stopped / "out"
        self._refuse(ConfigError, message, model, out, recipe, resume=True)
        assert [path.name for path in stopped.iterdir()] == ["out.snapshot"]

    def test_other_weights(
        self,
        stopped: Path,
        tmp_path: Path,
        tiny_model: Callable[..., Path],
        rewrite: Callable[..., Path],
    ) -> None:
        other = tiny_model(tmp_path / "other", tokenizer=True)
        rewrite(other, lambda tensors: tensors["lm_head.weight"].mul_(2))
        rewrite(other, lambda t: t["model.layers.0.mlp.up_proj.weight"].mul_(2))
        message = "of another run: .*the float model's hidden states"
        out = stopped / "out"
        self._refuse(ConfigError, message, other, out, _recipe(), resume=True)

    @pytest.mark.parametrize("content", [b"", b"x" * 100])
    def test_a_damaged_one(self, model: Path, tmp_path: Path, content: bytes) -> None:
        (tmp_path / "out.snapshot").write_bytes(content)
        message = r"out\.snapshot cannot be read: .*remove it"
        out = tmp_path / "out"
        self._refuse(ConfigError, message, model, out, _recipe(), resume=True)

    def test_nothing_to_resume(self, model: Path, tmp_path: Path) -> None:
        out = tmp_path / "out"
        message = r"--resume: .*out\.snapshot is not there"
        self._refuse(ConfigError, message, model, out, _recipe(), resume=True)
        message = "--resume: the recipe rtn learns nothing"
        recipe = load_recipe("rtn").override(samples=8, seq_len=32)
        self._refuse(ConfigError, message, model, out, recipe, resume=True)

    def test_tied_embeddings(
        self, tiny_model: Callable[..., Path], tmp_path: Path
    ) -> None:
        tied = tiny_model(tmp_path / "tied", tokenizer=True, tie_word_embeddings=True)
        message = "transforms.residual learned: tie_word_embeddings is true"
        self._refuse(UnsupportedError, message, tied, tmp_path / "out", _recipe())

    @pytest.mark.parametrize(
        ("transforms", "rates"),
        [
            (
                {"residual": "learned", "scales": "learned"},
                "learn.rotation_lr or learn.scale_lr or learn.clip_lr",
            ),
            ({}, "learn.clip_lr"),
        ],
    )
    def test_numbers_that_are_not_finite(
        self,
        tiny_model: Callable[..., Path],
        rewrite: Callable[..., Path],
        tmp_path: Path,
        transforms: dict[str, str],
        rates: str,
    ) -> None:
        huge = tiny_model(tmp_path / "huge", tokenizer=True, dtype="float32")

        def enlarge(tensors: dict[str, torch.Tensor]) -> None:
            tensors["model.layers.1.mlp.up_proj.weight"] *= 1e38
            tensors["model.layers.1.mlp.down_proj.weight"] *= 1e38

        rewrite(huge, enlarge)
        recipe = Recipe.model_validate(RECIPE | {"transforms": transforms})
        message = (
            r"step 1: the loss is nan, first in the output of model\.layers\.1; "
            f"lower {rates}$"
        )
        self._refuse(CalibrationError, message, huge, tmp_path / "out", recipe)
        assert [path.name for path in tmp_path.iterdir()] == ["huge"]


def test_command(model: Path, whole: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "small.yaml"
    recipe.write_text(yaml.safe_dump(RECIPE))
    out = tmp_path / "out"
    words = ["calibrate", str(model), "-o", str(out), "--recipe", str(recipe)]
    words += ["--device", "cpu"]
    with pytest.raises(KeyboardInterrupt):
        _run(model, out, _recipe(), _stop_at(1, _press_ctrl_c))
    refused = CliRunner().invoke(app, words)
    assert refused.exit_code == 1
    assert "go on with --resume" in refused.stderr
    done = CliRunner().invoke(app, [*words, "--resume"])
    assert done.exit_code == 0, done.stderr
    assert _files(out) == _files(whole)
