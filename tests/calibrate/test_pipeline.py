# SPDX-License-Identifier: Apache-2.0
"""What calibration writes is what the reference model then computes."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from vllm_lowbit.calibrate.denormals import flushed_denormals
from vllm_lowbit.calibrate.perplexity import perplexity
from vllm_lowbit.calibrate.pipeline import calibrate, choose_device, held_out_windows
from vllm_lowbit.calibrate.publish import Report
from vllm_lowbit.calibrate.recipe import Recipe, load_recipe
from vllm_lowbit.calibrate.reference_model import ReferenceModel
from vllm_lowbit.calibrate.text import calibration_windows, default_text
from vllm_lowbit.errors import (
    CalibrationError,
    CheckpointError,
    ConfigError,
    LowbitError,
    OutputError,
    UnsupportedError,
)
from vllm_lowbit.lowbit_checkpoint import read_config
from vllm_lowbit.manifest import verify

MODELS = Path(__file__).parents[2] / "models"
SAMPLES, SEQ_LEN = 8, 128


def _recipe(name: str, **overrides: Any) -> Recipe:
    sizes = {"samples": SAMPLES, "seq_len": SEQ_LEN}
    return load_recipe(name).override(**(sizes | overrides))


def _run(out: Path, recipe: Recipe, model: Path = MODELS / "ref-7m") -> Report:
    return calibrate(str(model), out, recipe, default_text(), "cpu")


def _held_out(model: str, recipe: Recipe) -> torch.Tensor:
    samples = recipe.data.samples
    count = samples + held_out_windows(samples)
    windows = calibration_windows(
        model, default_text(), count, recipe.data.seq_len, recipe.seed
    )
    return windows[samples:].flatten()


def _check_served_as_calibrated(out: Path, recipe: Recipe, report: Report) -> None:
    """The bit-exact reference finds the loss that calibration reported."""
    shape = ReferenceModel(str(out)).shape
    _, config = read_config(str(out))
    assert config == report.config
    assert list(verify(out, shape, report.config)) == []
    ids = _held_out(str(out), recipe)
    served = perplexity(ReferenceModel(str(out)), ids, recipe.data.seq_len)
    assert served.tokens == report.held_out_tokens
    # Last bits of the float GEMMs flip codes; the loss stays.
    assert math.log(served.perplexity) == pytest.approx(
        report.held_out.quantized, abs=0.05
    )


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("rtn", {}),
        ("gptq", {"scheme": "w4a16-g128"}),
        ("quarot", {"scheme": "w4a8kv4", "vocab_bits": 8}),
        ("quarot-gptq", {"scheme": "w2a16-g64"}),
        ("quarot-gptq", {"scheme": "w6a6", "seed": 5}),
        ("lowbit", {"scheme": "w4a4kv4-g128-ag128"}),
        ("smoothquant", {}),
        ("gptaq", {"scheme": "w3a16-g128"}),
    ],
)
def test_trained_model(tmp_path: Path, name: str, options: dict[str, Any]) -> None:
    recipe = _recipe(name, **options)
    out = tmp_path / "out"
    report = _run(out, recipe)
    _check_served_as_calibrated(out, recipe, report)
    # 2 bits fitted to so few tokens is a poor model; all others are close.
    allowed = 2.0 if "w2" in recipe.scheme else 0.25
    assert 0 < report.calibration.plain < 4.5
    assert abs(report.held_out.quantized - report.held_out.plain) < allowed


@pytest.mark.parametrize(
    ("vocab_bits", "sizes"),
    [
        (8, {"tie_word_embeddings": True, "hidden_size": 192, "shards": 2}),
        (16, {"attention_bias": True, "mlp_bias": True, "num_key_value_heads": 1}),
        (8, {"head_dim": 80, "num_key_value_heads": 4, "dtype": "float16"}),
        (16, {"architecture": "MistralForCausalLM", "sliding_window": 50}),
        (
            16,
            {
                "architecture": "Qwen2ForCausalLM",
                "hidden_size": 256,
                "tie_word_embeddings": True,
            },
        ),
        (8, {"architecture": "Qwen3ForCausalLM", "tie_word_embeddings": True}),
        (16, {"architecture": "Phi3ForCausalLM", "shards": 2}),
        (
            16,
            {
                "architecture": "Gemma2ForCausalLM",
                "tie_word_embeddings": True,
                "sliding_window": 50,
            },
        ),
    ],
)
def test_random_models(
    tmp_path: Path,
    tiny_model: Callable[..., Path],
    rewrite: Callable[..., Path],
    sizes: dict[str, Any],
    vocab_bits: int,
) -> None:
    model = tiny_model(tmp_path / "base", tokenizer=True, **sizes)
    generator = torch.Generator().manual_seed(0)

    def spread(tensors: dict[str, torch.Tensor]) -> None:
        for tensor in tensors.values():
            if tensor.dim() == 1:
                tensor += torch.rand(tensor.shape, generator=generator).to(tensor)
            else:
                tensor *= 3

    rewrite(model, spread)
    recipe = _recipe("quarot-gptq", vocab_bits=vocab_bits)
    report = _run(tmp_path / "out", recipe, model)
    _check_served_as_calibrated(tmp_path / "out", recipe, report)
    residual = report.config.rotations.residual
    if report.residual_is_replaced:
        online = report.config.rotations.attn_input
        assert residual is None and online is not None and online.apply == "online"
        assert report.config.rotations.mlp_input == online
        assert "online Hadamards before" in (tmp_path / "out/README.md").read_text()
        return
    assert residual is not None
    tied = sizes.get("tie_word_embeddings", False)
    assert residual.apply == ("online" if tied else "folded")


def test_equalized_scales_help_the_model_with_outliers(tmp_path: Path) -> None:
    losses = []
    for equalize in (False, True):
        recipe = Recipe.model_validate(
            {
                "transforms": {"equalize": equalize},
                "weights": {"method": "rtn"},
                "data": {"samples": 4, "seq_len": SEQ_LEN},
            }
        )
        out = tmp_path / f"{equalize}"
        report = _run(out, recipe, MODELS / "ref-7m-outliers")
        if equalize:
            _check_served_as_calibrated(out, recipe, report)
        losses.append(report.held_out.quantized)
    assert losses[1] < losses[0]


def test_same_seed_same_bytes_and_another_seed_other_bytes(
    tmp_path: Path, tiny_model: Callable[..., Path]
) -> None:
    model, outs = tiny_model(tmp_path / "base", tokenizer=True), {}
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        out = tmp_path / name / "out"
        out.parent.mkdir()
        _run(out, _recipe("quarot-gptq", seed=seed), model)
        outs[name] = {path.name: path.read_bytes() for path in out.iterdir()}
    assert outs["a"] == outs["b"]
    assert outs["a"]["model.safetensors"] != outs["c"]["model.safetensors"]


TRAINED: dict[str, dict[str, Any]] = {
    "omniquant": {
        "weights": {"method": "omniquant"},
        "omniquant": {"epochs": 1, "let": True, "rounding": "gptaq"},
    },
    "omniquant, qwen3": {
        "weights": {"method": "omniquant"},
        "omniquant": {
            "epochs": 1,
            "let": True,
            "rounding": "gptaq",
            "extra_weight_bits": 1,
        },
    },
    "omniquant, clips": {
        "weights": {"method": "omniquant"},
        "omniquant": {"epochs": 1, "rounding": "gptaq", "input_clip_rate": 0.01},
        "activations": {"clip": "learned", "clip_ratio": 0.9},
    },
    "searched clips": {"activations": {"clip": "searched"}},
    "refine": {"refine": {"scope": "model", "samples": 24, "steps": 3, "batch": 2}},
    "refine_layers": {
        "transforms": {"equalize": True},
        "weights": {"method": "gptaq"},
        "refine": {"scope": "layer", "steps": 3},
    },
}


OF = {"omniquant, qwen3": {"architecture": "Qwen3ForCausalLM"}}


@pytest.mark.parametrize("name", TRAINED)
def test_training_serves_what_it_measured_and_repeats(
    tmp_path: Path, tiny_model: Callable[..., Path], name: str
) -> None:
    model = tiny_model(tmp_path / "base", tokenizer=True, **OF.get(name, {}))
    data = {"samples": 8, "seq_len": 32}
    recipe = Recipe.model_validate({"data": data, **TRAINED[name]})
    outs = []
    for out in (tmp_path / "a" / "out", tmp_path / "b" / "out"):
        out.parent.mkdir()
        report = _run(out, recipe, model)
        outs.append({path.name: path.read_bytes() for path in out.iterdir()})
    assert outs[0] == outs[1]
    _check_served_as_calibrated(out, recipe, report)
    record = json.loads(outs[0]["calibration.json"])
    assert len(record["layers"]) == 14
    curves = {
        "omniquant": {f"omniquant.model.layers.{i}" for i in range(2)},
        "omniquant, qwen3": {f"omniquant.model.layers.{i}" for i in range(2)},
        "omniquant, clips": {f"omniquant.model.layers.{i}" for i in range(2)},
        "searched clips": set(),
        "refine": {"refine", "refine.validation"},
        "refine_layers": {f"refine.model.layers.{i}" for i in range(2)},
    }
    assert record["curves"].keys() == curves[name]
    found = report.config.scheme.activations.kept()
    assert len(found) == (8 if "clips" in name else 1)
    assert not found[1:] or len(set(found)) > 1


def test_record_holds_the_errors_of_every_linear(tmp_path: Path) -> None:
    errors = {}
    for name in ("rtn", "gptq"):
        _run(tmp_path / name, _recipe(name, scheme="w3a16", samples=4))
        record = json.loads((tmp_path / name / "calibration.json").read_text())
        assert record["curves"] == {} and len(record["layers"]) == 42
        errors[name] = record["layers"]["model.layers.0.self_attn.q_proj"]
    # GPTQ moves weights further, for outputs that are closer.
    assert errors["rtn"]["weight_error"] < errors["gptq"]["weight_error"]
    assert errors["gptq"]["output_error"] < 0.8 * errors["rtn"]["output_error"]


def test_files_of_the_checkpoint(tmp_path: Path) -> None:
    recipe = _recipe("rtn", samples=1, seq_len=8)
    _run(tmp_path / "out", recipe)
    out = tmp_path / "out"
    assert {path.name for path in out.iterdir()} == {
        "README.md",
        "calibration.json",
        "config.json",
        "generation_config.json",
        "lowbit_manifest.json",
        "model.safetensors",
        "recipe.yaml",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert load_recipe(str(out / "recipe.yaml")) == recipe
    config = json.loads((out / "config.json").read_text())
    base = json.loads((MODELS / "ref-7m" / "config.json").read_text())
    quantization = config.pop("quantization_config")
    assert config == base
    assert quantization["provenance"] == {
        "base_model": "ref-7m",
        "recipe": "rtn",
        "recipe_sha256": recipe.sha256(),
    }
    # Nothing is folded by rtn: norms and vocabulary are the base model's.
    ours = load_file(out / "model.safetensors")
    plain = load_file(MODELS / "ref-7m" / "model.safetensors")
    same = [name for name in plain if name in ours]
    assert len(same) == 15 and all(torch.equal(ours[n], plain[n]) for n in same)


def test_progress_counts_every_linear(tmp_path: Path) -> None:
    seen: list[tuple[int, int, str]] = []
    recipe = _recipe("rtn", samples=1, seq_len=8)
    calibrate(
        str(MODELS / "ref-7m"),
        tmp_path / "out",
        recipe,
        default_text(),
        "cpu",
        lambda done, total, what: seen.append((done, total, what)),
    )
    assert [done for done, _, _ in seen] == list(range(43))
    assert {total for _, total, _ in seen} == {42}
    assert seen[0][2] == "model.layers.0.self_attn.q_proj"


def test_denormals_are_zero_while_it_runs_and_after_only_if_before(
    tmp_path: Path,
) -> None:
    def product() -> float:
        return float(torch.tensor(1e-30) * 1e-10)

    seen: list[float] = []
    recipe = _recipe("rtn", samples=1, seq_len=8)
    arguments = (str(MODELS / "ref-7m"), tmp_path / "out", recipe, default_text())
    calibrate(*arguments, "cpu", lambda *_: seen.append(product()))
    assert set(seen) == {0.0} and product() > 0
    with flushed_denormals():
        with pytest.raises(OutputError):
            calibrate(*arguments, "cpu")
        assert product() == 0
    assert product() > 0


def _refused(
    tmp_path: Path, error: type[LowbitError], message: str, **arguments: Any
) -> None:
    given = {
        "model": str(MODELS / "ref-7m"),
        "output": tmp_path / "out",
        "recipe": _recipe("rtn"),
        "text": default_text(),
        "device": "cpu",
    } | arguments
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(error, match=message):
        calibrate(**given)
    assert sorted(tmp_path.rglob("*")) == before


def test_text_that_is_too_short(tmp_path: Path) -> None:
    text = tmp_path / "short.txt"
    text.write_text("One line only.\n")
    message = r"short\.txt: has \d+ tokens, 10 windows of 128 need 1280"
    _refused(tmp_path, ConfigError, message, text=text)


def test_output_that_exists(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "keep").write_text("x")
    _refused(tmp_path, OutputError, "out exists and is not empty")


def test_other_architecture(tmp_path: Path, tiny_model: Callable[..., Path]) -> None:
    model = tiny_model(tmp_path / "base", tokenizer=True)
    config = json.loads((model / "config.json").read_text())
    config["architectures"] = ["GPTNeoForCausalLM"]
    (model / "config.json").write_text(json.dumps(config))
    message = "GPTNeoForCausalLM.* not supported; supported: LlamaForCausalLM"
    _refused(tmp_path, UnsupportedError, message, model=str(model))


def test_model_that_is_already_quantized(
    tmp_path: Path, tiny_model: Callable[..., Path]
) -> None:
    model = tiny_model(tmp_path / "base", tokenizer=True)
    _run(tmp_path / "first", _recipe("rtn", samples=1, seq_len=8), model)
    message = "already quantized by 'lowbit'; calibrate its base model"
    _refused(tmp_path, ConfigError, message, model=str(tmp_path / "first"))


def test_model_that_is_not_there(tmp_path: Path) -> None:
    message = r"nowhere: not a directory"
    _refused(tmp_path, ConfigError, message, model=str(tmp_path / "nowhere"))


def test_missing_tensor(
    tmp_path: Path, tiny_model: Callable[..., Path], rewrite: Callable[..., Path]
) -> None:
    model = tiny_model(tmp_path / "base", tokenizer=True)
    rewrite(model, lambda t: t.pop("model.layers.1.mlp.up_proj.weight"))
    message = r"missing, first model\.layers\.1\.mlp\.up_proj\.weight"
    _refused(tmp_path, CheckpointError, message, model=str(model))


def test_non_finite_weight_names_the_layer_and_leaves_nothing(
    tmp_path: Path, tiny_model: Callable[..., Path], rewrite: Callable[..., Path]
) -> None:
    model = tiny_model(tmp_path / "base", tokenizer=True)

    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.1.mlp.down_proj.weight"][3, 5] = torch.nan

    rewrite(model, spoil)
    for recipe in (_recipe("rtn"), _recipe("quarot-gptq")):
        _refused(
            tmp_path,
            LowbitError,
            r"model\.layers\.1\.mlp\.down_proj\.weight holds a non-finite value",
            model=str(model),
            recipe=recipe,
        )


def test_hidden_states_that_overflow_name_the_layer(
    tmp_path: Path, tiny_model: Callable[..., Path], rewrite: Callable[..., Path]
) -> None:
    model = tiny_model(tmp_path / "base", tokenizer=True, dtype="float32")

    def enlarge(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.0.mlp.up_proj.weight"] *= 1e38
        tensors["model.layers.0.mlp.down_proj.weight"] *= 1e38

    rewrite(model, enlarge)
    _refused(tmp_path, CalibrationError, r"model\.layers\.0", model=str(model))


def test_scheme_that_does_not_fit(
    tmp_path: Path, tiny_model: Callable[..., Path]
) -> None:
    model = tiny_model(tmp_path / "base", tokenizer=True, intermediate_size=96)
    recipe = _recipe("rtn", scheme="w4a16-g128")
    message = "group_size 128 does not divide intermediate_size 96"
    _refused(tmp_path, UnsupportedError, message, model=str(model), recipe=recipe)


def test_devices() -> None:
    assert choose_device("cpu") == "cpu"
    assert choose_device("auto") == ("cuda" if torch.cuda.is_available() else "cpu")
    for device in ("quantum", "cuda:99"):
        with pytest.raises(ConfigError, match=f"--device {device}: "):
            choose_device(device)
