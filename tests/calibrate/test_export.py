# SPDX-License-Identifier: Apache-2.0
"""An exported checkpoint holds what the lowbit one does; all others are refused."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from typer.testing import CliRunner

from vllm_lowbit import cli
from vllm_lowbit.calibrate.export import export
from vllm_lowbit.calibrate.writer import CheckpointWriter
from vllm_lowbit.errors import (
    CheckpointError,
    ConfigError,
    LowbitError,
    OutputError,
    UnsupportedError,
)
from vllm_lowbit.kernels.grid import decode
from vllm_lowbit.kernels.packing import pack, unpack
from vllm_lowbit.schema import scheme_from_name

pytest.importorskip("compressed_tensors")

FOLDED = {
    "residual": {"apply": "folded", "order": 128, "block": 128, "sign_seed": 3},
    "v": {"apply": "folded", "order": 64, "block": 64},
}
DOWN = {"apply": "online", "order": 256, "block": 256}
KEYS = {"apply": "online", "order": 64, "block": 64}
PLACES = ("attn_input", "o_input", "mlp_input", "down_input")
RATIOS = {place: [0.8, 1.0] for place in PLACES}
LINEAR = "model.layers.1.mlp.up_proj"
Make = Callable[..., Path]


def mapping(scheme: str, **changes: dict[str, Any]) -> dict[str, Any]:
    """A scheme as data, with keys of its parts replaced."""
    data = scheme_from_name(scheme).model_dump()
    return {**data, **{key: data[key] | value for key, value in changes.items()}}


@pytest.fixture
def make(tiny_model: Any, published_checkpoint: Any, tmp_path: Path) -> Make:
    """``make(scheme, model={...}, **rotations)``: a tiny lowbit checkpoint."""

    def build(
        scheme: Any = "w4a16",
        model: dict[str, Any] | None = None,
        vocab_bits: int = 16,
        shards: int = 1,
        **rotations: Any,
    ) -> Path:
        plain = tiny_model(tmp_path / "plain", tokenizer=True, **(model or {}))
        (tmp_path / "made").mkdir()
        return published_checkpoint(
            tmp_path / "made" / "lowbit",
            plain,
            shards,
            scheme=scheme,
            vocab_bits=vocab_bits,
            **rotations,
        )

    return build


def load(directory: Path) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = {}
    for path in directory.glob("*.safetensors"):
        tensors |= load_file(path)
    return tensors


def expected_weight(
    lowbit: dict[str, torch.Tensor], module: str, bits: int, dtype: torch.dtype
) -> torch.Tensor:
    """``[n, k]`` in ``dtype``, with scales rounded to it."""
    packed, scale = (lowbit[f"{module}.weight_{kind}"] for kind in ("packed", "scale"))
    columns = packed.shape[1] * 32 // bits
    codes = unpack(packed, bits, columns).unflatten(-1, (scale.shape[1], -1))
    rounded = scale.to(dtype).float().unsqueeze(-1)
    zero_point = torch.zeros_like(rounded, dtype=torch.int32)
    return decode(codes, rounded, zero_point).flatten(-2).to(dtype)


def test_stacked_linears(make: Make, tmp_path: Path) -> None:
    source = make("w4a16", {"architecture": "Phi3ForCausalLM"})
    with pytest.raises(UnsupportedError) as error:
        export(source, tmp_path / "out")
    assert str(error.value).startswith(
        f"{source}/config.json: Phi3ForCausalLM cannot be exported: other tools expect "
    )


@pytest.mark.parametrize(
    ("scheme", "dtype", "model"),
    [
        ("w4a16", "bfloat16", {"attention_bias": True}),
        ("w4a16", "bfloat16", {"architecture": "Qwen3ForCausalLM"}),
        ("w4a16-g32", "bfloat16", {"tie_word_embeddings": True}),
        ("w4a16-g128", "float16", {}),
        ("w4a16-g64", "float32", {}),
        ("w8a8", "bfloat16", {"attention_bias": True}),
        (mapping("w8a8", activations={"symmetric": True}), "float16", {}),
    ],
)
def test_the_library_reads_the_same_weights(
    make: Make, tmp_path: Path, scheme: Any, dtype: str, model: dict[str, Any]
) -> None:
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationConfig

    source = make(scheme, {"dtype": dtype, **model})
    out = tmp_path / "out"
    export(source, out)
    config = json.loads((out / "config.json").read_text())
    read = QuantizationConfig.model_validate(config["quantization_config"])
    compressor = BaseCompressor.get_value_from_registry(read.format)
    scheme = read.config_groups["group_0"]
    lowbit, exported = load(source), load(out)
    bits = scheme.weights.num_bits
    kept = torch.float32 if bits == 8 else getattr(torch, dtype)
    parts = compressor.compression_param_names(scheme)
    modules = [n.removesuffix(".weight_packed") for n in lowbit if "_packed" in n]
    assert len(modules) == 14
    for module in modules:
        stored = {part: exported.pop(f"{module}.{part}") for part in parts}
        assert stored["weight_scale"].dtype == kept
        weight = compressor.decompress(stored, scheme)["weight"]
        assert torch.equal(weight, expected_weight(lowbit, module, bits, kept))
        assert tuple(stored.get("weight_shape", weight.shape)) == weight.shape
    # Norms, biases and the vocabulary are what they were, and nothing else is there.
    rest = {n: t for n, t in lowbit.items() if n.rpartition(".")[0] not in modules}
    rest |= {n: t for n, t in lowbit.items() if n.endswith(".bias")}
    assert exported.keys() == rest.keys()
    assert all(torch.equal(exported[name], tensor) for name, tensor in rest.items())


@pytest.mark.parametrize("symmetric", [True, False])
def test_config_of_w8a8(make: Make, tmp_path: Path, symmetric: bool) -> None:
    """Activations keep their symmetry: stock vLLM runs both."""
    source = make(mapping("w8a8", activations={"symmetric": symmetric}))
    export(source, tmp_path / "out")
    before, after = (
        json.loads((directory / "config.json").read_text())
        for directory in (source, tmp_path / "out")
    )
    del before["quantization_config"]
    quantization = after.pop("quantization_config")
    assert after == before
    assert quantization["quant_method"] == "compressed-tensors"
    assert quantization["format"] == "int-quantized"
    assert quantization["ignore"] == ["lm_head"]
    group = quantization["config_groups"]["group_0"]
    assert group["targets"] == ["Linear"]
    assert group["weights"]["strategy"] == "channel"
    assert group["weights"]["symmetric"] is True
    inputs = group["input_activations"]
    assert (inputs["num_bits"], inputs["symmetric"]) == (8, symmetric)
    assert (inputs["dynamic"], inputs["strategy"]) == (True, "token")


def test_everything_beside_the_tensors(make: Make, tmp_path: Path) -> None:
    source = make("w4a16-g64", shards=2, **FOLDED)
    (source / "generation_config.json").write_text("{}")
    (source / "LICENSE").write_text("a licence")
    (source / "README.md").write_text("---\nlicense: mit\n---\nperplexity 1.0\n")
    out, seen = tmp_path / "out", []
    assert export(source, out, progress=lambda *update: seen.append(update)) == (
        "w4a16-g64"
    )
    assert seen[0][2] == "verifying" and seen[-1][0] == seen[-1][1]
    copied = (
        "tokenizer.json",
        "tokenizer_config.json",
        "generation_config.json",
        "LICENSE",
        "recipe.yaml",
    )
    for name in copied:
        assert (out / name).read_bytes() == (source / name).read_bytes()
    made = {"README.md", "config.json", "model.safetensors"}
    assert {path.name for path in out.iterdir()} == {*copied, *made}

    card = ModelCard.load(out / "README.md")
    assert card.data.license == "mit"
    assert card.data.base_model == "some/model"
    assert card.data.tags == ["vllm", "compressed-tensors", "quantized", "w4a16-g64"]
    for text in (
        "vllm serve ./out\n",
        "vllm-lowbit export lowbit -o ./out --format compressed-tensors\n",
        "one scale per 64 inputs",
        "Weight scales are bfloat16",
        hashlib.sha256((source / "recipe.yaml").read_bytes()).hexdigest(),
    ):
        assert text in card.text
    assert "perplexity" not in card.text


def test_the_same_checkpoint_gives_the_same_bytes(make: Make, tmp_path: Path) -> None:
    source = make("w8a8")
    for parent in ("a", "b"):
        (tmp_path / parent).mkdir()
        export(source, tmp_path / parent / "out")
    for path in (tmp_path / "a" / "out").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / "out" / path.name).read_bytes()


@pytest.mark.parametrize(
    ("arguments", "reasons"),
    [
        (
            {"scheme": "w4a4", "down_input": DOWN},
            [
                "scheme w4a4 cannot be exported",
                "activations.bits is 4: stock vLLM would run it as W4A16 where they",
                " were symmetric, and refuses asymmetric ones; choose a scheme",
                "rotations.down_input is online",
                "a recipe with transforms.down_input: none",
            ],
        ),
        (
            {"scheme": mapping("w4a4", activations={"symmetric": True})},
            ["activations.bits is 4: stock vLLM would run it as W4A16; choose"],
        ),
        ({"scheme": "w6a6"}, ["activations.bits is 6: stock vLLM has no 6-bit"]),
        (
            {"scheme": mapping("w8a8", activations={"clip_ratio": 0.9})},
            ["activations.clip_ratio is 0.9: stock vLLM keeps the whole range"],
        ),
        (
            {"scheme": mapping("w8a8", activations={"clip_ratios": RATIOS})},
            ["clip_ratios: down to 0.8: stock vLLM keeps the whole range of a token"],
        ),
        (
            {"scheme": "w4a8kv4", "k": KEYS},
            [
                "activations.bits is 8: stock vLLM would run it as W4A16",
                "kv_cache.bits is 4: stock vLLM does not have this cache",
                "rotations.k is online",
                "transforms.key: none",
            ],
        ),
        (
            {"scheme": "w4a16kv4"},
            ["kv_cache.bits is 4", "choose a scheme without kv"],
        ),
        (
            {"scheme": "w3a16"},
            [
                "weights.bits is 3: with unquantized activations",
                "choose a scheme of w4a16, ",
                "weights.symmetric is false",
            ],
        ),
        ({"scheme": "w2a16"}, ["weights.bits is 2"]),
        (
            {"scheme": mapping("w8a8", activations={"bits": 16})},
            ["scheme w8a16", "weights.bits is 8: with unquantized activations"],
        ),
        (
            {"scheme": mapping("w4a16", weights={"symmetric": False})},
            ["weights.symmetric is false: supported: symmetric"],
        ),
        (
            {"scheme": "w8a8-g64"},
            ["weights.group_size is 64", "choose the scheme w8a8"],
        ),
        (
            {"scheme": "w8a8-g64-ag64"},
            ["activations.group_size is 64: stock vLLM takes one scale per token"],
        ),
        (
            {"scheme": "w4a16", "vocab_bits": 8},
            ["vocab_bits is 8", "calibrate with --vocab-bits 16"],
        ),
        (
            {
                "model": {"tie_word_embeddings": True},
                "residual": {**FOLDED["residual"], "apply": "online"},
            },
            ["rotations.residual is online", "transforms.residual: none"],
        ),
        (
            {"attn_input": {"apply": "online", "order": 128, "block": 128}},
            [
                "rotations.attn_input is online: stock vLLM runs none of these on CPUs",
                "use a recipe with transforms.residual and attn_input: none",
            ],
        ),
    ],
)
def test_what_stock_vllm_would_not_run_is_refused(
    make: Make, tmp_path: Path, arguments: dict[str, Any], reasons: list[str]
) -> None:
    source = make(**arguments)
    with pytest.raises(UnsupportedError) as caught:
        export(source, tmp_path / "out")
    message = str(caught.value)
    assert message.startswith(f"{source / 'config.json'}: scheme w")
    for reason in reasons:
        assert reason in message
    assert not (tmp_path / "out").exists()


def refused(
    source: Path, out: Path, error: type[LowbitError], *parts: str, **options: str
) -> None:
    """It is, with these words, and nothing is left beside it."""
    beside = sorted(out.parent.iterdir())
    with pytest.raises(error) as caught:
        export(source, out, **options)
    for part in parts:
        assert part in str(caught.value)
    assert sorted(out.parent.iterdir()) == beside


def test_a_damaged_tensor_is_not_exported(
    make: Make, rewrite: Any, tmp_path: Path
) -> None:
    source = make()
    rewrite(source, lambda t: t[f"{LINEAR}.weight_packed"][3, 5].bitwise_xor_(1))
    refused(
        source,
        tmp_path / "out",
        CheckpointError,
        f"not exported: {source}/model.safetensors: tensor {LINEAR}.weight_packed has",
        "`vllm-lowbit inspect --verify` lists",
    )


def test_another_recipe_is_not_exported(make: Make, tmp_path: Path) -> None:
    source = make()
    (source / "recipe.yaml").write_text("name: gptq\n")
    refused(source, tmp_path / "out", CheckpointError, "recipe.yaml: has sha256")


@pytest.mark.parametrize("kind", ["packed", "scale"])
def test_a_value_that_the_grid_does_not_have_is_refused(
    make: Make, rewrite: Any, write_manifest: Any, tmp_path: Path, kind: str
) -> None:
    """Though its checksum is right."""
    source = make()
    name = f"{LINEAR}.weight_{kind}"

    def change(tensors: dict[str, torch.Tensor]) -> None:
        worst = pack(torch.full((1, 8), -8, dtype=torch.int8), 4)[0, 0]
        tensors[name][0, 0] = worst if kind == "packed" else -1.0

    rewrite(source, change)
    write_manifest(source)
    refused(source, tmp_path / "out", CheckpointError, f"tensor {name} holds")


@pytest.mark.parametrize("scale", [1e-9, 1e9])
def test_a_scale_that_the_dtype_does_not_hold_is_refused(
    make: Make, rewrite: Any, write_manifest: Any, tmp_path: Path, scale: float
) -> None:
    source = make(model={"dtype": "float16"})
    name = f"{LINEAR}.weight_scale"
    rewrite(source, lambda tensors: tensors[name][0, 0].fill_(scale))
    write_manifest(source)
    message = f"tensor {name} holds a scale that is 0 or infinite in float16"
    refused(source, tmp_path / "out", UnsupportedError, message)


def test_what_is_no_lowbit_checkpoint_is_refused(make: Make, tmp_path: Path) -> None:
    source, out = make(), tmp_path / "out"
    plain = tmp_path / "plain"
    refused(plain, out, CheckpointError, "plain/config.json has no quantization_config")
    refused(tmp_path / "no", out, CheckpointError, "no does not exist")
    export(source, tmp_path / "done")
    refused(tmp_path / "done", out, ConfigError, "quantized by 'compressed-tensors'")
    (source / "lowbit_manifest.json").unlink()
    refused(source, out, CheckpointError, "lowbit_manifest.json: cannot be read")


def test_a_rotation_that_cannot_be_is_refused(make: Make, tmp_path: Path) -> None:
    source = make(k=KEYS)
    refused(source, tmp_path / "out", ConfigError, "rotations.k: keys are rotated for")


def test_an_existing_output_stays(make: Make, tmp_path: Path) -> None:
    source, out = make(), tmp_path / "out"
    out.mkdir()
    (out / "mine").write_text("x")
    refused(source, out, OutputError, "exists and is not empty")
    assert [path.name for path in out.iterdir()] == ["mine"]


def test_a_format_that_does_not_exist_is_refused(make: Make, tmp_path: Path) -> None:
    refused(
        make(),
        tmp_path / "out",
        ConfigError,
        "format 'gguf' does not exist; supported: compressed-tensors",
        format="gguf",
    )


def test_an_interrupted_export_leaves_nothing(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = make()
    add = CheckpointWriter.add

    def interrupted(self: CheckpointWriter, name: str, tensor: torch.Tensor) -> None:
        if name == f"{LINEAR}.weight_packed":
            raise KeyboardInterrupt
        add(self, name, tensor)

    monkeypatch.setattr(CheckpointWriter, "add", interrupted)
    beside = sorted(tmp_path.iterdir())
    with pytest.raises(KeyboardInterrupt):
        export(source, tmp_path / "out")
    assert sorted(tmp_path.iterdir()) == beside


def test_command(make: Make, tmp_path: Path) -> None:
    source, out = make("w8a8"), tmp_path / "out"
    runner = CliRunner()
    words = ["export", str(source), "-o", str(out), "--format"]
    done = runner.invoke(cli.app, [*words, "gguf"])
    assert done.exit_code == 1
    assert "error: format 'gguf' does not exist" in done.stderr
    assert runner.invoke(cli.app, words[:-1]).exit_code == 2
    done = runner.invoke(cli.app, [*words, "compressed-tensors"])
    assert (done.exit_code, done.stderr) == (0, "")
    assert done.stdout == (
        f"{out}: w8a8 as compressed-tensors, serve it with: vllm serve {out}\n"
    )
    done = runner.invoke(cli.app, [*words, "compressed-tensors"])
    assert done.exit_code == 1
    assert "exists and is not empty" in done.stderr
