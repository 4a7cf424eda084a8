# SPDX-License-Identifier: Apache-2.0
"""The manifest, and finding every way in which a checkpoint differs from it."""

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from vllm_lowbit.errors import CheckpointError, ConfigError
from vllm_lowbit.inspection import read_checkpoint
from vllm_lowbit.lowbit_checkpoint import expected_tensors
from vllm_lowbit.manifest import read_manifest, tensor_sha256, verify, write_manifest
from vllm_lowbit.schema import TensorEntry

SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
MANIFEST = "lowbit_manifest.json"
INDEX = "model.safetensors.index.json"


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory, tiny_model: Any) -> Path:
    return tiny_model(tmp_path_factory.mktemp("plain"))


@pytest.fixture(scope="module")
def sound(
    tmp_path_factory: pytest.TempPathFactory, plain: Path, published_checkpoint: Any
) -> Path:
    return published_checkpoint(tmp_path_factory.mktemp("sound"), plain, shards=2)


@pytest.fixture
def out(tmp_path: Path, sound: Path) -> Path:
    """A sound checkpoint in two shards, to be damaged."""
    return Path(shutil.copytree(sound, tmp_path / "out"))


def problems(directory: Path, **options: Any) -> list[str]:
    return list(map(str, verify(directory, *read_checkpoint(directory), **options)))


def edit(path: Path, change: Callable[[Any], object]) -> None:
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


def edit_shard(path: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def flip(path: Path, name: str, byte: int = 0) -> None:
    """Change one bit of a tensor's data."""
    content = bytearray(path.read_bytes())
    start = 8 + int.from_bytes(content[:8], "little")
    offset = json.loads(content[8:start])[name]["data_offsets"][0]
    content[start + offset + byte] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("tensor", "data"),
    [
        (torch.tensor([1.0, -2.0]), b"\0\0\x80\x3f\0\0\0\xc0"),
        (torch.tensor([[1, 2], [-1, 4]], dtype=torch.int8), b"\1\2\xff\4"),
        (torch.tensor([[1, 2], [-1, 4]], dtype=torch.int8).t(), b"\1\xff\2\4"),
        (torch.tensor([[1], [256]], dtype=torch.int32), b"\1\0\0\0\0\1\0\0"),
        (torch.tensor([1.0, 1.5], dtype=torch.bfloat16)[1:], b"\xc0\x3f"),
        (torch.tensor(1.0, dtype=torch.float16, requires_grad=True), b"\0\x3c"),
        (torch.empty(0, 4), b""),
    ],
)
def test_hash_is_of_the_bytes_in_row_order(tensor: torch.Tensor, data: bytes) -> None:
    assert tensor_sha256(tensor) == hashlib.sha256(data).hexdigest()


class TestFile:
    def test_what_is_written_is_read(self, tmp_path: Path) -> None:
        entries = {
            name: TensorEntry(
                file="a.safetensors", dtype=dtype, shape=shape, sha256=digit * 64
            )
            for name, dtype, shape, digit in (
                ("z", "F32", (2, 3), "0"),
                ("a", "I8", (), "f"),
            )
        }
        config = {"rope_theta": 1e4, "limits": [0.0, float("inf")], "tied": None}
        write_manifest(tmp_path, entries, config)
        read = read_manifest(tmp_path)
        assert read.tensors == entries
        assert read.config == config
        assert list(read.tensors) == ["z", "a"]

    @pytest.mark.parametrize(
        ("content", "error", "message"),
        [
            (None, CheckpointError, "cannot be read as JSON: [Errno 2] No such file"),
            (b"{", CheckpointError, "cannot be read as JSON: Expecting property"),
            (b"[" * 100_000, CheckpointError, "cannot be read as JSON: maximum recur"),
            (b"\xff", CheckpointError, "cannot be read as JSON: 'utf-8' codec"),
            (b"[]", ConfigError, "key (top level): Input should be a valid dictionary"),
            (b"{}", ConfigError, "key tensors: Field required"),
            (
                b'{"tensors": {"a": {}}}',
                ConfigError,
                "key tensors.a.sha256: Field requ",
            ),
            (b'{"tensors": {}, "b": 1}', ConfigError, "key b: Extra inputs are not"),
        ],
    )
    def test_not_a_manifest(
        self,
        tmp_path: Path,
        content: bytes | None,
        error: type[ValueError],
        message: str,
    ) -> None:
        path = tmp_path / MANIFEST
        if content is not None:
            path.write_bytes(
                content if isinstance(content, bytes) else content.encode()
            )
        with pytest.raises(error) as raised:
            read_manifest(tmp_path)
        assert str(raised.value).startswith(f"{path}: ")
        assert message in str(raised.value)


HADAMARD = {"order": 128, "block": 128}


class TestSound:
    @pytest.mark.parametrize("shards", [1, 3])
    def test_nothing_is_found(
        self, tmp_path: Path, plain: Path, published_checkpoint: Any, shards: int
    ) -> None:
        assert problems(published_checkpoint(tmp_path, plain, shards=shards)) == []

    @pytest.mark.parametrize(
        ("model", "arguments"),
        [
            ({}, {"scheme": "w3a16-g64"}),
            ({}, {"scheme": "w6a6", "vocab_bits": 8}),
            (
                {"tie_word_embeddings": True},
                {"residual": {"apply": "online", **HADAMARD}},
            ),
            ({"attention_bias": True, "mlp_bias": True, "dtype": "float16"}, {}),
        ],
    )
    def test_every_kind_of_checkpoint(
        self,
        tmp_path: Path,
        tiny_model: Any,
        published_checkpoint: Any,
        model: dict[str, Any],
        arguments: dict[str, Any],
    ) -> None:
        source = tiny_model(tmp_path / "plain", **model)
        assert (
            problems(published_checkpoint(tmp_path / "out", source, **arguments)) == []
        )

    def test_progress_counts_every_element(self, out: Path) -> None:
        seen: list[tuple[int, int]] = []
        assert problems(out, progress=lambda *counts: seen.append(counts)) == []
        specs = expected_tensors(*read_checkpoint(out))
        total = sum(torch.Size(spec.shape).numel() for spec in specs.values())
        assert seen[0] == (0, total) and seen[-1] == (total, total)
        assert seen == sorted(seen)
        assert len(seen) == 1 + len(specs)


class TestData:
    def test_one_bit_of_any_tensor(self, out: Path) -> None:
        """Exactly the tensor whose byte was edited, whichever it is."""
        for name, entry in read_manifest(out).tensors.items():
            flip(out / entry.file, name)
            found = problems(out)
            assert len(found) == 1, name
            assert found[0].startswith(f"{entry.file}: tensor {name} has sha256 ")
            assert found[0].endswith(f"{MANIFEST} says {entry.sha256}")
            flip(out / entry.file, name)
        assert problems(out) == []

    def test_two_tensors(self, out: Path) -> None:
        names = ["model.norm.weight", "model.embed_tokens.weight"]
        for name in names:
            flip(out / read_manifest(out).tensors[name].file, name, byte=7)
        found = problems(out)
        assert len(found) == 2
        assert all(any(name in problem for problem in found) for name in names)

    def test_hash_edited_in_the_manifest(self, out: Path) -> None:
        def change(data: Any) -> None:
            data["tensors"]["model.norm.weight"]["sha256"] = "0" * 64

        edit(out / MANIFEST, change)
        (found,) = problems(out)
        assert "tensor model.norm.weight has sha256" in found
        assert found.endswith("0" * 64)


class TestFiles:
    def test_truncated_shard_hides_nothing_of_the_other(self, out: Path) -> None:
        entries = read_manifest(out).tensors
        name = next(name for name, entry in entries.items() if entry.file == SHARDS[1])
        flip(out / SHARDS[1], name)
        content = (out / SHARDS[0]).read_bytes()
        (out / SHARDS[0]).write_bytes(content[:-1])
        found = problems(out)
        assert len(found) == 2
        assert found[0].startswith(f"{SHARDS[0]}: not a whole safetensors file: ")
        assert found[1].startswith(f"{SHARDS[1]}: tensor {name} has sha256 ")

    @pytest.mark.parametrize("content", [b"", b"\0" * 8, b"\xff" * 100])
    def test_not_safetensors(self, out: Path, content: bytes) -> None:
        (out / SHARDS[0]).write_bytes(content)
        (found,) = problems(out)
        assert found.startswith(f"{SHARDS[0]}: not a whole safetensors file: ")

    def test_missing_shard(self, out: Path) -> None:
        (out / SHARDS[1]).unlink()
        assert problems(out) == [f"{SHARDS[1]}: is missing"]

    def test_another_file(self, out: Path) -> None:
        save_file({"a": torch.ones(1)}, out / "consolidated.safetensors")
        expected = f"consolidated.safetensors: is not listed in {MANIFEST}"
        assert problems(out) == [expected]

    def test_index(self, out: Path) -> None:
        index = (out / INDEX).read_text()
        edit(
            out / INDEX,
            lambda data: data["weight_map"].update({"model.norm.weight": SHARDS[0]}),
        )
        other = f"is in '{SHARDS[0]}', {MANIFEST} says '{SHARDS[1]}'"
        assert problems(out) == [f"{INDEX}: tensor model.norm.weight {other}"]
        (out / INDEX).write_text("[]")
        (found,) = problems(out)
        assert found.startswith(f"{INDEX}: is not a safetensors index: TypeError")
        (out / INDEX).unlink()
        missing = f"{INDEX}: is missing; the weights are in several files"
        assert problems(out) == [missing]
        (out / INDEX).write_text(index)
        assert problems(out) == []


class TestHeaders:
    def test_missing_tensor(self, out: Path) -> None:
        name = "model.norm.weight"
        file = read_manifest(out).tensors[name].file
        edit_shard(out / file, lambda tensors: tensors.pop(name))
        missing = f"{file}: tensor {name} is in none of the files"
        assert problems(out) == [missing]
        # Nor does the manifest know of it: then only the model misses it.
        edit(out / MANIFEST, lambda data: data["tensors"].pop(name))
        edit(out / INDEX, lambda data: data["weight_map"].pop(name))
        assert problems(out) == [f"{MANIFEST}: tensor {name} is in none of the files"]

    def test_tensor_of_no_model(self, out: Path) -> None:
        edit_shard(out / SHARDS[0], lambda t: t.update(extra=torch.ones(1)))
        assert problems(out) == [
            f"{SHARDS[0]}: tensor extra does not belong to the model",
            f"{SHARDS[0]}: tensor extra is not listed in {MANIFEST}",
        ]

    def test_dtype_and_shape(self, out: Path) -> None:
        name = "model.layers.0.mlp.up_proj.weight_scale"
        file = read_manifest(out).tensors[name].file

        def change(tensors: dict[str, torch.Tensor]) -> None:
            tensors[name] = tensors[name].double().flatten()

        edit_shard(out / file, change)
        found = problems(out)
        prefix = f"{file}: tensor {name} has "
        assert found[:4] == [
            prefix + "dtype F64, supported: F32",
            prefix + "shape [256], the model needs [256, 1]",
            prefix + f"dtype F64, {MANIFEST} says F32",
            prefix + f"shape [256], {MANIFEST} says [256, 1]",
        ]
        assert len(found) == 5 and found[4].startswith(prefix + "sha256 ")

    def test_tensor_in_another_file(self, out: Path) -> None:
        name = "model.norm.weight"
        taken: dict[str, torch.Tensor] = {}
        edit_shard(out / SHARDS[1], lambda t: taken.update({name: t.pop(name)}))
        edit_shard(out / SHARDS[0], lambda tensors: tensors.update(taken))
        moved = f"{SHARDS[0]}: tensor {name} has file {SHARDS[0]}, {MANIFEST} says "
        assert problems(out) == [moved + SHARDS[1]]

    def test_tensor_in_two_files(self, out: Path) -> None:
        name = "model.norm.weight"
        copy = {name: load_file(out / SHARDS[1])[name]}
        edit_shard(out / SHARDS[0], lambda tensors: tensors.update(copy))
        found = problems(out)
        assert f"{SHARDS[1]}: tensor {name} is in {SHARDS[0]} too" in found


class TestRecipe:
    def test_edited_by_hand(self, out: Path) -> None:
        recipe = out / "recipe.yaml"
        before = hashlib.sha256(recipe.read_bytes()).hexdigest()
        recipe.write_text(recipe.read_text() + "# a comment\n")
        after = hashlib.sha256(recipe.read_bytes()).hexdigest()
        expected = f"recipe.yaml: has sha256 {after}, config.json says {before}"
        assert problems(out) == [expected]

    def test_missing(self, out: Path) -> None:
        (out / "recipe.yaml").unlink()
        unread = "recipe.yaml: cannot be read: No such file or directory"
        assert problems(out) == [unread]

    def test_no_provenance(self, out: Path) -> None:
        edit(
            out / "config.json",
            lambda data: data["quantization_config"].pop("provenance"),
        )
        edit(
            out / MANIFEST,
            lambda data: data["config"]["quantization_config"].pop("provenance"),
        )
        (found,) = problems(out)
        assert found.startswith("config.json: quantization_config has no provenance")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda data: data["rope_parameters"].update(rope_theta=10000),
            "rope_parameters.rope_theta is 10000, lowbit_manifest.json says 10000.0",
        ),
        (
            lambda data: data["quantization_config"]["scheme"].pop("kv_cache"),
            "quantization_config.scheme.kv_cache is missing, lowbit_manifest.json says",
        ),
        (
            lambda data: data.update(a=None),
            "a is None, lowbit_manifest.json",
        ),
        (
            lambda data: data.update(bos_token_id=True),
            "bos_token_id is True, lowbit_manifest.json",
        ),
    ],
)
def test_config_is_as_it_was_written(
    out: Path, change: Callable[[Any], object], message: str
) -> None:
    shape, config = read_checkpoint(out)
    edit(out / "config.json", change)
    (found,) = map(str, verify(out, shape, config))
    assert found.startswith(f"config.json: key {message}")
    assert found.endswith("leave the file as it was and use --hf-overrides")


def test_config_may_be_formatted_otherwise(out: Path) -> None:
    path = out / "config.json"
    data = json.loads(path.read_text())
    path.write_text(json.dumps(dict(reversed(data.items())), indent=7))
    assert problems(out) == []


def test_config_of_another_scheme(out: Path) -> None:
    """Files and manifest agree with each other, but not with config.json."""
    weights = {"bits": 3, "symmetric": False}
    edit(
        out / "config.json",
        lambda data: data["quantization_config"]["scheme"].update(weights=weights),
    )
    found = problems(out)
    assert any("weight_zero_point is in none of the files" in p for p in found)
    assert any("shape [256, 16], the model needs [256, 12]" in p for p in found)
