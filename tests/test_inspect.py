# SPDX-License-Identifier: Apache-2.0
"""`vllm-lowbit inspect`: what it says of sound checkpoints, and of all others."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from math import prod
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from vllm_lowbit import cli
from vllm_lowbit.architecture import ModelShape

SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
SIZES = {"order": 64, "block": 64}
ROTATIONS = {
    "residual": {"apply": "folded", "order": 128, "block": 128, "sign_seed": 7},
    "k": {"apply": "online", **SIZES},
    "v": {"apply": "folded", **SIZES},
    "o_input": {"apply": "online", "order": 4, "block": 256},
    "down_input": {"apply": "online", "order": 32, "block": 32},
    "max_tensor_parallel_size": 8,
}
KEYS = {
    "checkpoint",
    "provenance",
    "scheme",
    "linears",
    "vocabulary",
    "attention",
    "rotations",
    "max_tensor_parallel_size",
    "bits_per_weight",
    "kv_token",
    "weight_files",
    "weights",
    "verified",
}


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory, tiny_model: Any) -> Path:
    return tiny_model(tmp_path_factory.mktemp("plain"))


@pytest.fixture(scope="module")
def sound(
    tmp_path_factory: pytest.TempPathFactory, plain: Path, published_checkpoint: Any
) -> Path:
    """A w4a4kv4 checkpoint in two shards; not to be changed."""
    directory = tmp_path_factory.mktemp("sound")
    return published_checkpoint(directory, plain, shards=2, **ROTATIONS)


@pytest.fixture
def out(tmp_path: Path, sound: Path) -> Path:
    """The same, to be damaged."""
    return Path(shutil.copytree(sound, tmp_path / "out"))


def run(*arguments: object, code: int = 0) -> tuple[str, str]:
    """stdout and stderr of the command."""
    words = ["inspect", *map(str, arguments)]
    result = CliRunner().invoke(cli.app, words, env={"COLUMNS": "80"})
    assert result.exit_code == code, result.output
    return result.stdout, result.stderr


def read(*arguments: object) -> dict[str, Any]:
    stdout, stderr = run(*arguments, "--json")
    assert stderr == ""
    return json.loads(stdout)


def edit_json(path: Path, change: Callable[[Any], object]) -> None:
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


def edit_config(out: Path, change: Callable[[Any], object]) -> None:
    """Change config.json, and what the manifest says of it."""
    edit_json(out / "config.json", change)
    edit_json(out / "lowbit_manifest.json", lambda data: change(data["config"]))


def flip(path: Path, name: str) -> None:
    """Change one bit of a tensor's data."""
    content = bytearray(path.read_bytes())
    start = 8 + int.from_bytes(content[:8], "little")
    content[start + json.loads(content[8:start])[name]["data_offsets"][0]] ^= 1
    path.write_bytes(content)


class TestJson:
    def test_keys_and_facts(self, sound: Path) -> None:
        found = read(sound)
        assert set(found) == KEYS
        assert found["checkpoint"] == str(sound)
        assert found["provenance"]["base_model"] == "some/model"
        assert found["provenance"]["base_revision"] == "abc123"
        assert found["provenance"]["recipe"] == "rtn"
        assert len(found["provenance"]["recipe_sha256"]) == 64
        assert found["scheme"] == "w4a4kv4"
        assert found["max_tensor_parallel_size"] == 8
        assert found["verified"] is False

    def test_layer_classes(self, sound: Path) -> None:
        found = read(sound)
        linear = {
            "weight_bits": 4,
            "weight_symmetric": True,
            "group_size": None,
            "activation_bits": 4,
            "activation_symmetric": False,
            "activation_group_size": None,
            "activation_clip_ratio": 1.0,
        }
        assert found["linears"] == {
            "qkv_proj": {**linear, "online_rotation": None},
            "o_proj": {**linear, "online_rotation": "o_input"},
            "gate_up_proj": {**linear, "online_rotation": None},
            "down_proj": {**linear, "online_rotation": "down_input"},
        }
        assert found["vocabulary"] == {
            "bits": 16,
            "embedding_dtype": "BF16",
            "head_dtype": "BF16",
            "tied": False,
        }
        assert found["attention"] == {
            "kv_bits": 4,
            "key_rotation": "online",
            "value_rotation": "folded",
        }

    def test_clip_ratios(self, out: Path) -> None:
        """Of every layer, in order; least and most in words."""
        ratios = {
            "attn_input": [0.9, 0.95],
            "o_input": [1.0, 1.0],
            "mlp_input": [0.8125, 0.75],
            "down_input": [0.5, 1.0],
        }

        def change(data: Any) -> None:
            activations = data["quantization_config"]["scheme"]["activations"]
            activations["clip_ratios"] = ratios

        edit_config(out, change)
        linears = read(out, "--verify")["linears"]
        found = [linear["activation_clip_ratio"] for linear in linears.values()]
        places = ("attn_input", "o_input", "mlp_input", "down_input")
        assert found == [ratios[place] for place in places]
        words = " ".join(run(out)[0].replace("│", " ").split())
        assert "clipped to" in words and "0.75 to" in words

        ratios["o_input"] = [1.0]
        edit_config(out, change)
        _, stderr = run(out, code=1)
        assert "config.json: scheme.activations.clip_ratios.o_input has 1 val" in stderr
        ratios["o_input"] = [1.0, 1.01]
        edit_config(out, change)
        _, stderr = run(out, code=1)
        assert (
            "clip_ratios.o_input.1: Input should be less than or equal to 1" in stderr
        )
        assert "got 1.01" in stderr

    def test_rotations_are_those_of_the_config(self, sound: Path) -> None:
        config = json.loads((sound / "config.json").read_text())
        rotations = config["quantization_config"]["rotations"]
        assert read(sound)["rotations"] == {
            name: rotation
            for name, rotation in rotations.items()
            if isinstance(rotation, dict)
        }

    def test_sizes(self, sound: Path) -> None:
        """From the shapes: int4 codes, one float32 scale per row, the rest bf16."""
        config = json.loads((sound / "config.json").read_text())
        shapes = ModelShape.from_config(config, "").tensors()
        linears = [size for name, size in shapes.items() if "_proj.weight" in name]
        weights, rows = (sum(map(f, linears)) for f in (prod, lambda size: size[0]))
        parameters = sum(map(prod, shapes.values()))
        linear_bits = 4 * weights + 32 * rows
        found = read(sound)
        assert found["bits_per_weight"]["linears"] == linear_bits / weights
        model_bits = linear_bits + 16 * (parameters - weights)
        assert found["bits_per_weight"]["model"] == model_bits / parameters

        # Two layers of two KV heads of 64: 72 bytes, of 256 in bf16.
        assert found["kv_token"] == {
            "bytes": 2 * 2 * 72,
            "bf16_bytes": 2 * 2 * 256,
            "ratio": 72 / 256,
        }
        files = {path.name: path.stat().st_size for path in sound.glob("*.safetensors")}
        assert found["weight_files"] == files
        assert found["weights"] == {
            "bytes": sum(files.values()),
            "bf16_bytes": 2 * parameters,
            "ratio": sum(files.values()) / (2 * parameters),
        }

    def test_groups_zero_points_and_biases(
        self, tmp_path: Path, tiny_model: Any, published_checkpoint: Any
    ) -> None:
        biased = tiny_model(tmp_path / "plain", attention_bias=True, dtype="float16")
        found = read(published_checkpoint(tmp_path, biased, scheme="w3a16-g64"))
        # 3 bits, and every 64 of them a float32 scale and an int8 zero point.
        assert found["bits_per_weight"]["linears"] == 3 + (32 + 8) / 64
        assert found["linears"]["o_proj"]["group_size"] == 64
        assert found["linears"]["o_proj"]["weight_symmetric"] is False
        assert found["linears"]["o_proj"]["activation_bits"] == 16
        assert found["vocabulary"]["head_dtype"] == "F16"
        assert found["attention"]["kv_bits"] == 16
        assert found["kv_token"]["ratio"] == 1
        assert found["rotations"] == {}

    def test_groups_of_activations(
        self, tmp_path: Path, tiny_model: Any, published_checkpoint: Any
    ) -> None:
        plain = tiny_model(tmp_path / "plain")
        out = published_checkpoint(tmp_path, plain, scheme="w4a4kv4-g32-ag32")
        found = read(out)
        assert found["scheme"] == "w4a4kv4-g32-ag32"
        for linear in found["linears"].values():
            assert linear["group_size"] == linear["activation_group_size"] == 32
        assert "a scale per token and group of 32" in run(out)[0]

    @pytest.mark.parametrize(
        ("architecture", "reader"),
        [
            ("MixtralForCausalLM", "gate_up_proj"),
            ("OPTForCausalLM", "up_proj"),
            ("GPT2LMHeadModel", "up_proj"),
        ],
    )
    def test_linears_of_other_names(
        self,
        tmp_path: Path,
        tiny_model: Any,
        published_checkpoint: Any,
        architecture: str,
        reader: str,
    ) -> None:
        plain = tiny_model(tmp_path / "plain", architecture=architecture)
        found = read(published_checkpoint(tmp_path, plain, scheme="w3a16-g64"))
        assert found["bits_per_weight"]["linears"] == 3 + (32 + 8) / 64
        assert list(found["linears"]) == ["qkv_proj", "o_proj", reader, "down_proj"]

    def test_tied_vocabulary_in_8_bits(
        self, tmp_path: Path, tiny_model: Any, published_checkpoint: Any
    ) -> None:
        tied = tiny_model(tmp_path / "plain", tie_word_embeddings=True)
        residual = {"apply": "online", "order": 128, "block": 128}
        out = published_checkpoint(tmp_path, tied, vocab_bits=8, residual=residual)
        found = read(out, "--verify")
        assert found["vocabulary"] == {
            "bits": 8,
            "embedding_dtype": "I32",
            "head_dtype": "I32",
            "tied": True,
        }
        assert found["verified"] is True

    def test_no_provenance(self, out: Path) -> None:
        def change(data: Any) -> None:
            data["quantization_config"].pop("provenance")

        edit_config(out, change)
        assert read(out)["provenance"] is None

    def test_reads_no_tensor(self, out: Path) -> None:
        """Data that is all wrong changes nothing: headers are enough."""
        before = read(out)
        for path in out.glob("*.safetensors"):
            content = path.read_bytes()
            start = 8 + int.from_bytes(content[:8], "little")
            path.write_bytes(content[:start] + b"\xff" * (len(content) - start))
        assert read(out) == before


class TestText:
    def test_says_it_all(self, sound: Path) -> None:
        stdout, stderr = run(sound, "--verify")
        assert stderr == ""
        for line in (
            f"{sound}: lowbit checkpoint, scheme w4a4kv4",
            "base model: some/model, revision abc123",
            "recipe: rtn, sha256 2d80d88340f5fb09ecc24733e3bea19dec4b934898049c4d54c5",
            "│ down_proj    │ int4 symmetric │ channel   │ int4 asymmetric │ down_in",
            "vocabulary: embedding BF16, head BF16, not tied",
            "attention: KV cache int4 asymmetric per token and head, rotation of keys ",
            "│ residual   │ folded  │ hadamard │ 128   │ 128   │ random │",
            "tensor parallel sizes: divisors of 8",
            "bits per weight: 4.",
            "KV cache of one token, all layers: 288 bytes, 0.281 of 1,024 in bf16",
            f"  {SHARDS[1]}: ",
            "verified: every tensor is what the manifest says",
        ):
            assert line in stdout

    def test_names_with_markup(self, out: Path) -> None:
        def change(data: Any) -> None:
            data["quantization_config"]["provenance"]["base_model"] = "[red]a[/b]"

        edit_config(out, change)
        assert "base model: [red]a[/b], revision" in run(out)[0]


class TestVerify:
    def test_edited_byte(self, out: Path) -> None:
        name = "model.layers.1.mlp.down_proj.weight_packed"
        files = json.loads((out / "model.safetensors.index.json").read_text())
        file = files["weight_map"][name]
        flip(out / file, name)
        run(out)
        stdout, stderr = run(out, "--verify", "--json", code=1)
        assert stdout == ""
        problem, error = stderr.splitlines()
        assert problem.startswith(f"{out}/{file}: tensor {name} has sha256 ")
        assert error == f"error: {out}: 1 problem, listed above"

    def test_edited_recipe(self, out: Path) -> None:
        (out / "recipe.yaml").write_text("name: gptq\n")
        run(out)
        _, stderr = run(out, "--verify", code=1)
        assert stderr.startswith(f"{out}/recipe.yaml: has sha256 ")

    def test_every_problem_is_listed(self, out: Path) -> None:
        (out / "recipe.yaml").unlink()
        content = (out / SHARDS[0]).read_bytes()
        (out / SHARDS[0]).write_bytes(content[: len(content) // 2])
        (out / "stray.safetensors").write_bytes(b"")
        _, stderr = run(out, "--verify", code=1)
        assert f"{out}/recipe.yaml: cannot be read: No such file" in stderr
        assert f"{out}/{SHARDS[0]}: not a whole safetensors file" in stderr
        assert f"{out}/stray.safetensors: is not listed in low" in stderr
        assert f"error: {out}: 3 problems, listed above" in stderr


class TestRefused:
    def test_plain_checkpoint(self, plain: Path) -> None:
        _, stderr = run(plain, code=1)
        assert f"error: {plain}/config.json has no quantization_config: this" in stderr

    @pytest.mark.parametrize("options", [(), ("--verify",), ("--json",)])
    def test_no_directory(self, tmp_path: Path, options: tuple[str, ...]) -> None:
        missing = tmp_path / "missing"
        stdout, stderr = run(missing, *options, code=1)
        assert stdout == ""
        assert stderr.startswith(f"error: {missing} does not exist; a lowbit check")
        missing.write_text("")
        _, stderr = run(missing, *options, code=1)
        assert stderr.startswith(f"error: {missing} is not a directory; a lowbit ")

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            (None, "cannot be read as JSON: [Errno 2] No such file"),
            ("{", "cannot be read as JSON"),
            ("3", "not a JSON object"),
            (
                '{"quantization_config": {"quant_method": "gptq"}}',
                "the checkpoint is already quantized by 'gptq'",
            ),
            (
                '{"quantization_config": {"quant_method": "lowbit"}}',
                "quantization_config: key scheme: Field required",
            ),
        ],
    )
    def test_config(self, tmp_path: Path, content: str | None, message: str) -> None:
        if content is not None:
            (tmp_path / "config.json").write_text(content)
        _, stderr = run(tmp_path, code=1)
        assert stderr.startswith(f"error: {tmp_path}/config.json: ")
        assert message in stderr

    def test_architecture_and_group_size(self, out: Path) -> None:
        def architecture(data: Any) -> None:
            data["architectures"] = ["GPTNeoXForCausalLM"]

        def group_size(data: Any) -> None:
            data["architectures"] = ["LlamaForCausalLM"]
            data["intermediate_size"] = 250
            data["quantization_config"]["scheme"]["weights"]["group_size"] = 64

        edit_json(out / "config.json", architecture)
        assert "architectures ['GPTNeoXForCausalLM'] is not" in run(out, code=1)[1]
        edit_json(out / "config.json", group_size)
        assert "group_size 64 does not divide intermediate" in run(out, code=1)[1]

    @pytest.mark.parametrize("options", [(), ("--verify",)])
    def test_manifest(self, out: Path, options: tuple[str, ...]) -> None:
        manifest = out / "lowbit_manifest.json"
        manifest.unlink()
        _, stderr = run(out, *options, code=1)
        assert f"error: {manifest}: cannot be read as JSON: [Errno 2] No" in stderr
        manifest.write_text("{}")
        _, stderr = run(out, *options, code=1)
        assert f"error: {manifest}: key tensors: Field required" in stderr

    def test_truncated_shard(self, out: Path) -> None:
        content = (out / SHARDS[0]).read_bytes()
        (out / SHARDS[0]).write_bytes(content[:-1])
        _, stderr = run(out, code=1)
        assert stderr.startswith(f"error: {out}/{SHARDS[0]}: not a whole safetensors")
        (out / SHARDS[1]).unlink()
        _, stderr = run(out, code=1)
        assert stderr.startswith(f"error: {out}/{SHARDS[1]}: is missing")
        assert stderr.endswith("(and 1 more; `inspect --verify` lists them)\n")


def test_without_vllm_and_transformers(sound: Path) -> None:
    """torch, safetensors and pydantic are enough."""
    code = (
        "import sys\n"
        "for name in ('vllm', 'transformers', 'tqdm', 'triton', 'huggingface_hub'):\n"
        "    sys.modules[name] = None\n"
        "from vllm_lowbit import cli\n"
        "cli.app()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "inspect", str(sound), "--verify", "--json"],
        capture_output=True,
        text=True,
        cwd="/",
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["verified"] is True
    assert done.stderr == ""
