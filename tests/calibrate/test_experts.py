# SPDX-License-Identifier: Apache-2.0
"""Mixtures of experts: what is calibrated of them, and what is refused."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from vllm_lowbit.calibrate.export import export
from vllm_lowbit.calibrate.observe import observe
from vllm_lowbit.calibrate.perplexity import perplexity
from vllm_lowbit.calibrate.pipeline import calibrate
from vllm_lowbit.calibrate.publish import Report
from vllm_lowbit.calibrate.recipe import Recipe, load_recipe
from vllm_lowbit.calibrate.reference_model import ReferenceModel
from vllm_lowbit.calibrate.text import calibration_windows, default_text
from vllm_lowbit.errors import CheckpointError, UnsupportedError

QWEN3: dict[str, Any] = {
    "architecture": "Qwen3MoeForCausalLM",
    "num_experts": 12,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
}
MIXTRAL: dict[str, Any] = {
    "architecture": "MixtralForCausalLM",
    "num_local_experts": 3,
    "intermediate_size": 64,
}


@pytest.fixture(scope="module")
def qwen3(tmp_path_factory: Any, tiny_model: Callable[..., Path]) -> Path:
    return tiny_model(tmp_path_factory.mktemp("qwen3"), tokenizer=True, **QWEN3)


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory: Any, tiny_model: Callable[..., Path]) -> Path:
    return tiny_model(tmp_path_factory.mktemp("mixtral"), tokenizer=True, **MIXTRAL)


def _run(model: Path, out: Path, recipe: str | Recipe, **sizes: Any) -> Report:
    if isinstance(recipe, str):
        recipe = load_recipe(recipe).override(**{"samples": 4, "seq_len": 32, **sizes})
    return calibrate(str(model), out, recipe, default_text(), "cpu")


@pytest.mark.parametrize("recipe", ["rtn", "gptaq", "lowbit"])
def test_reference_finds_the_loss_that_was_reported(
    mixtral: Path, tmp_path: Path, recipe: str
) -> None:
    report = _run(mixtral, tmp_path / "out", recipe)
    ids = calibration_windows(str(mixtral), default_text(), 5, 32, 0)[4:].flatten()
    model = ReferenceModel(str(tmp_path / "out"))
    served = perplexity(model, ids[: report.held_out_tokens // 31 * 32], 32)
    assert math.log(served.perplexity) == pytest.approx(
        report.held_out.quantized, abs=0.03
    )
    assert report.untouched_experts == 0


def test_experts_without_tokens_are_counted(qwen3: Path, tmp_path: Path) -> None:
    """And rounded to nearest, as no input says what matters in them."""
    out, nearest = tmp_path / "gptq", tmp_path / "rtn"
    report = _run(qwen3, out, "gptq", samples=1, seq_len=3)
    _run(qwen3, nearest, "rtn", samples=1, seq_len=3)
    assert 0 < report.untouched_experts < 24
    ours, rounded = (load_file(d / "model.safetensors") for d in (out, nearest))
    experts = [
        f"model.layers.{layer}.mlp.experts.{expert}.down_proj.weight_packed"
        for layer in range(2)
        for expert in range(12)
    ]
    same = sum(torch.equal(ours[name], rounded[name]) for name in experts)
    assert same == report.untouched_experts


def test_routers_keep_16_bits(qwen3: Path, tmp_path: Path) -> None:
    _run(qwen3, tmp_path / "out", "rtn")
    ours = load_file(tmp_path / "out" / "model.safetensors")
    plain = load_file(qwen3 / "model.safetensors")
    for layer in range(2):
        name = f"model.layers.{layer}.mlp.gate.weight"
        assert torch.equal(ours[name], plain[name])


def test_files_keep_the_names_of_the_model(mixtral: Path, tmp_path: Path) -> None:
    _run(mixtral, tmp_path / "out", "rtn")
    prefix = "model.layers.1.block_sparse_moe."
    names = {
        name.removeprefix(prefix)
        for name in load_file(tmp_path / "out" / "model.safetensors")
        if name.startswith(prefix)
    }
    packed = ("weight_packed", "weight_scale")
    assert names == {"gate.weight"} | {
        f"experts.{expert}.{part}.{kind}"
        for expert in range(3)
        for part in ("w1", "w2", "w3")
        for kind in packed
    }


def test_gptq_brings_the_output_of_experts_closer(qwen3: Path, tmp_path: Path) -> None:
    errors = {}
    for name in ("rtn", "gptq"):
        _run(qwen3, tmp_path / name, name, scheme="w3a16", samples=24)
        record = json.loads((tmp_path / name / "calibration.json").read_text())
        errors[name] = [
            record["layers"][f"model.layers.0.mlp.experts.{expert}.up_proj"]
            for expert in range(12)
        ]
    closer = [
        ours["output_error"] < nearest["output_error"]
        for ours, nearest in zip(errors["gptq"], errors["rtn"], strict=True)
    ]
    assert all(closer)


@pytest.mark.parametrize(
    ("recipe", "what"),
    [
        ("smoothquant", "transforms.smooth"),
        ("omniquant", "weights.method omniquant"),
        ("spinquant", "a learned transform"),
        ("ostquant", "a learned transform"),
        ({"refine": {"scope": "layer"}}, "refine.scope layer"),
    ],
)
def test_refused_recipes(qwen3: Path, tmp_path: Path, recipe: Any, what: str) -> None:
    if isinstance(recipe, dict):
        recipe = Recipe.model_validate(recipe)
    with pytest.raises(UnsupportedError) as error:
        _run(qwen3, tmp_path / "out", recipe)
    assert str(error.value) == (
        f"{qwen3}/config.json: Qwen3MoeForCausalLM: {what} is not supported with a "
        "mixture of experts; the recipes rtn, gptq, gptaq, quarot, quarot-gptq and "
        "lowbit are"
    )
    assert list(tmp_path.iterdir()) == []


def test_no_report_and_no_export(qwen3: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    _run(qwen3, out, "rtn", scheme="w4a16")
    with pytest.raises(UnsupportedError, match="a report has no place for a mixture"):
        observe(str(qwen3), str(out), [torch.arange(8)])
    with pytest.raises(UnsupportedError, match="Qwen3MoeForCausalLM cannot be export"):
        export(out, tmp_path / "exported")


def test_a_router_that_is_not_finite(
    qwen3: Path, tmp_path: Path, tiny_model: Any, rewrite: Any
) -> None:
    model = tiny_model(tmp_path / "base", tokenizer=True, **QWEN3)
    name = "model.layers.1.mlp.gate.weight"
    rewrite(model, lambda tensors: tensors[name].view(-1)[7].fill_(math.nan))
    with pytest.raises(CheckpointError, match=f"{name} of .* holds a non-finite"):
        ReferenceModel(str(model))
