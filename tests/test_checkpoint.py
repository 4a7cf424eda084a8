# SPDX-License-Identifier: Apache-2.0
"""Plain checkpoints: a whole one passes, each defect is refused by file and tensor."""

import json
import pickle
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from vllm_lowbit.architecture import ModelShape
from vllm_lowbit.checkpoint import INDEX, check_plain_checkpoint, safetensors_files
from vllm_lowbit.errors import CheckpointError

Q_PROJ = "model.layers.1.self_attn.q_proj.weight"
NORM = "model.layers.0.input_layernorm.weight"
FIRST, SECOND = (f"model-0000{n}-of-00002.safetensors" for n in (1, 2))


@pytest.fixture(scope="module")
def originals(tmp_path_factory: Any, tiny_model: Any) -> dict[str, Path]:
    """Sound checkpoints, built once and copied by each test."""
    root = tmp_path_factory.mktemp("checkpoints")
    return {
        "one": tiny_model(root / "one"),
        "two": tiny_model(root / "two", shards=2),
        "tied": tiny_model(root / "tied", tie_word_embeddings=True),
        "biased": tiny_model(root / "biased", attention_bias=True, mlp_bias=True),
    }


@pytest.fixture
def copy(originals: dict[str, Path], tmp_path: Path) -> Callable[[str], Path]:
    return lambda name: Path(shutil.copytree(originals[name], tmp_path / name))


def check(directory: Path) -> None:
    config = json.loads((directory / "config.json").read_text())
    shape = ModelShape.from_config(config, "config.json")
    check_plain_checkpoint(str(directory), shape)


def refused(directory: Path, *named: object) -> str:
    """Check that the checkpoint is refused and the message holds every name."""
    with pytest.raises(CheckpointError) as error:
        check(directory)
    message = str(error.value)
    for name in named:
        assert str(name) in message
    assert len(message) < 1000
    return message


def point(directory: Path, weight_map: object) -> Path:
    """Write an index."""
    (directory / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    return directory / INDEX


@pytest.mark.parametrize("name", ["one", "two", "tied", "biased"])
def test_whole_checkpoint(name: str, originals: dict[str, Path]) -> None:
    check(originals[name])


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_other_float_types(
    dtype: str, tmp_path: Path, tiny_model: Callable[..., Path]
) -> None:
    check(tiny_model(tmp_path, dtype=dtype))


def test_tied_model_may_repeat_its_head(copy: Any, rewrite: Any) -> None:
    def repeat(tensors: dict[str, torch.Tensor]) -> None:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()

    directory = copy("tied")
    rewrite(directory, repeat)
    check(directory)


def test_old_rotary_buffers_are_not_extra(copy: Any, rewrite: Any) -> None:
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    directory = copy("one")
    rewrite(directory, lambda tensors: tensors.update({name: torch.ones(32)}))
    check(directory)


@pytest.mark.parametrize("name", [Q_PROJ, NORM, "lm_head.weight", "model.norm.weight"])
def test_missing_tensor(name: str, copy: Any, rewrite: Any) -> None:
    directory = copy("one")
    rewrite(directory, lambda tensors: tensors.pop(name))
    message = refused(directory, directory, name)
    assert "1 tensors of the model are missing" in message


def test_missing_tensor_of_a_shard(copy: Any, rewrite: Any) -> None:
    directory = copy("two")
    rewrite(directory, lambda tensors: tensors.pop(NORM))
    refused(directory, directory, NORM)


@pytest.mark.parametrize("part", ["q_proj", "k_proj", "v_proj", "o_proj", "down_proj"])
def test_missing_bias(part: str, copy: Any, rewrite: Any) -> None:
    block = "mlp" if part == "down_proj" else "self_attn"
    name = f"model.layers.0.{block}.{part}.bias"
    directory = copy("biased")
    rewrite(directory, lambda tensors: tensors.pop(name))
    refused(directory, name)


def test_unexpected_bias(copy: Any, rewrite: Any) -> None:
    name = "model.layers.0.self_attn.q_proj.bias"
    directory = copy("one")
    path = rewrite(directory, lambda t: t.update({name: torch.zeros(256)}))
    refused(directory, f"{path}: tensor {name} does not belong to the model")


def test_every_tensor_missing(copy: Any) -> None:
    directory = copy("one")
    save_file({}, directory / "model.safetensors")
    refused(directory, "21 tensors of the model are missing, first model.embed_tokens")


@pytest.mark.parametrize(
    ("name", "shape"),
    [(Q_PROJ, [128, 256]), (Q_PROJ, [0, 128]), (NORM, [127]), (NORM, [128, 1])],
)
def test_misshaped_tensor(name: str, shape: list[int], copy: Any, rewrite: Any) -> None:
    directory = copy("one")
    needed = {Q_PROJ: [256, 128], NORM: [128]}[name]
    new = {name: torch.zeros(shape, dtype=torch.bfloat16)}
    path = rewrite(directory, lambda tensors: tensors.update(new))
    message = f"tensor {name} has shape {shape}, the model needs {needed}"
    refused(directory, f"{path}: {message}")


@pytest.mark.parametrize(
    ("dtype", "stored"),
    [
        (torch.int8, "I8"),
        (torch.int32, "I32"),
        (torch.bool, "BOOL"),
        (torch.float64, "F64"),
        (torch.float8_e4m3fn, "F8_E4M3"),
    ],
)
@pytest.mark.parametrize("name", [Q_PROJ, NORM])
def test_dtype(
    name: str, dtype: torch.dtype, stored: str, copy: Any, rewrite: Any
) -> None:
    directory = copy("one")
    path = rewrite(directory, lambda t: t.update({name: t[name].to(dtype)}))
    refused(directory, f"{path}: tensor {name} has dtype {stored}", "BF16, F16, F32")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize(
    ("checkpoint", "name"),
    [
        ("one", NORM),
        ("one", "model.norm.weight"),
        ("biased", "model.layers.1.mlp.up_proj.bias"),
    ],
)
def test_non_finite_vector(
    checkpoint: str, name: str, value: float, copy: Any, rewrite: Any
) -> None:
    """Norms and biases, which no layer method sees as they are in the file."""
    directory = copy(checkpoint)
    path = rewrite(directory, lambda tensors: tensors[name].view(-1)[-1:].fill_(value))
    refused(directory, f"tensor {name} of {path} holds a non-finite value")


@pytest.mark.parametrize("end", [0, 1, 7, 8, 100, 50_000, -1])
def test_truncated_file(end: int, copy: Any) -> None:
    directory = copy("two")
    path = directory / SECOND
    path.write_bytes(path.read_bytes()[:end])
    refused(directory, f"{path}: not a whole safetensors file")


@pytest.mark.parametrize(
    "content",
    [
        b"garbage" * 100,
        b"\xff" * 64,
        b"\x10" + bytes(7) + b"not json at all!",
        b"\x02" + bytes(7) + b"[]",
        pickle.dumps({"model.norm.weight": [1.0]}),
    ],
    ids=["text", "huge-header", "not-json", "not-object", "pickle"],
)
def test_garbage_file(content: bytes, copy: Any) -> None:
    directory = copy("one")
    path = directory / "model.safetensors"
    path.write_bytes(content)
    refused(directory, f"{path}: not a whole safetensors file")


def test_header_outside_of_the_file(copy: Any) -> None:
    """Offsets are the file's claim: none may reach past its end."""
    directory = copy("one")
    path = directory / "model.safetensors"
    header = {NORM: {"dtype": "BF16", "shape": [128], "data_offsets": [0, 256]}}
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(255))
    refused(directory, f"{path}: not a whole safetensors file")


def test_shard_that_is_a_directory(copy: Any) -> None:
    directory = copy("one")
    (directory / "model-2.safetensors").mkdir()
    refused(directory, f"{directory / 'model-2.safetensors'}: not a whole safetensors")


def test_missing_shard(copy: Any) -> None:
    directory = copy("two")
    (directory / SECOND).unlink()
    refused(directory, f"{directory}: shard {SECOND} of the index is missing")


@pytest.mark.parametrize(
    "name",
    [
        "../other.safetensors",
        "..",
        "sub/model.safetensors",
        "/etc/model.safetensors",
        "model.bin",
        "",
        7,
        None,
    ],
)
def test_index_names_files_beside_it(name: object, copy: Any) -> None:
    directory = copy("two")
    shutil.copy(directory / FIRST, directory.parent / "other.safetensors")
    index = point(directory, {NORM: FIRST, Q_PROJ: name})
    refused(directory, f"{index}: shard name {str(name)!r} is not a file name")


def test_index_absolute_path_to_a_real_shard(copy: Any) -> None:
    directory = copy("two")
    absolute = str(directory / SECOND)
    index = point(directory, {NORM: FIRST, Q_PROJ: absolute})
    refused(directory, f"{index}: shard name {absolute!r} is not a file name")


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"\xff\xfe",
        b"[]",
        b"3",
        b"null",
        b'"weight_map"',
        b"{}",
        b'{"weight_map": []}',
        b'{"weight_map": null}',
        b'{"weight_map": {"a": ["model.safetensors"]}}',
        b"[" * 100_000,
    ],
)
def test_index_that_is_none(content: bytes, copy: Any) -> None:
    directory = copy("two")
    (directory / INDEX).write_bytes(content)
    broken = content in (b"", b"{", b"\xff\xfe") or len(content) > 1000
    problem = "cannot be read as JSON" if broken else "not a safetensors index"
    refused(directory, f"{directory / INDEX}: {problem}")


def test_index_that_is_too_large(copy: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vllm_lowbit.checkpoint.MAX_JSON_BYTES", 1 << 20)
    directory = copy("two")
    (directory / INDEX).write_bytes(b" " * (1 << 20) + b"{}")
    refused(directory, f"{directory / INDEX}: is larger than 1 MiB")


def test_index_that_leaves_out_a_shard(copy: Any) -> None:
    """What the index does not name is not read."""
    directory = copy("two")
    point(directory, {NORM: FIRST})
    left_out = list(load_file(directory / SECOND))
    message = f"{len(left_out)} tensors of the model are missing"
    assert any(name in refused(directory, message) for name in left_out)


def test_empty_index(copy: Any) -> None:
    directory = copy("two")
    point(directory, {})
    refused(directory, "21 tensors of the model are missing")


@pytest.mark.parametrize("checkpoint", ["one", "two"])
def test_duplicate_tensor(checkpoint: str, copy: Any, originals: Any) -> None:
    directory = copy(checkpoint)
    if checkpoint == "two":
        last = load_file(directory / SECOND)
        last[NORM] = load_file(directory / FIRST)[NORM]
        save_file(last, directory / SECOND)
        files = (directory / FIRST, directory / SECOND)
    else:
        files = (directory / "a.safetensors", directory / "model.safetensors")
        save_file({NORM: torch.zeros(128)}, files[0])
    refused(directory, f"tensor {NORM} is in both {files[0]} and {files[1]}")


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.2.mlp.up_proj.weight",
        "model.layers.0.self_attn.q_proj.weight_scale",
        "model.layers.0.mlp.experts.0.w1.weight",
        "transformer.wte.weight",
    ],
)
def test_extra_tensor(name: str, copy: Any, rewrite: Any) -> None:
    directory = copy("one")
    path = rewrite(directory, lambda tensors: tensors.update({name: torch.zeros(1)}))
    message = refused(directory, f"{path}: tensor {name} does not belong to the model")
    assert "(1 such tensors)" in message


class Bomb:
    """Creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


@pytest.fixture
def bomb(tmp_path: Path) -> Iterator[Callable[[Path], None]]:
    """Writes a pickle; fails the test when anything loads it."""
    mark = tmp_path / "loaded"
    yield lambda path: path.write_bytes(pickle.dumps({NORM: Bomb(mark)}))
    assert not mark.exists()


@pytest.mark.parametrize("file", ["pytorch_model.bin", "model.pt", "consolidated.pth"])
def test_pickle_is_never_read(file: str, copy: Any, bomb: Any) -> None:
    directory = copy("one")
    (directory / "model.safetensors").unlink()
    bomb(directory / file)
    message = "no *.safetensors file; other formats are not read"
    refused(directory, f"{directory}: {message}")


def test_pickle_beside_safetensors_is_left_alone(copy: Any, bomb: Any) -> None:
    directory = copy("one")
    bomb(directory / "pytorch_model.bin")
    check(directory)


def test_bomb_works(tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    pickle.loads(pickle.dumps(Bomb(mark)))
    assert mark.exists()


def test_files_in_order(originals: dict[str, Path]) -> None:
    directory = originals["two"]
    assert safetensors_files(directory) == [directory / FIRST, directory / SECOND]


def test_hub_model_is_checked_once_it_is_on_disk(
    originals: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The worker fetches the files, and checks them before any layer exists."""
    config_module = pytest.importorskip("vllm_lowbit.config")
    hf_config = json.loads((originals["one"] / "config.json").read_text())
    hf_config["num_hidden_layers"] += 1  # so that a layer is missing
    name = "some-organisation/some-model"
    engine = SimpleNamespace(
        model_config=SimpleNamespace(
            model=name,
            revision="main",
            hf_config=SimpleNamespace(to_dict=lambda: hf_config),
        ),
        load_config=SimpleNamespace(load_format="auto", download_dir=None),
    )
    fetched = []

    def fetch(model: str, **options: object) -> str:
        fetched.append((model, options["revision"]))
        return str(originals["one"])

    monkeypatch.setattr(config_module, "snapshot_download", fetch)
    monkeypatch.setattr(config_module, "get_current_vllm_config", lambda: engine)
    monkeypatch.setattr(config_module, "refuse_engine_options", lambda *_: None)
    config = config_module.LowbitQuantizationConfig()
    config.maybe_update_config(name, engine.model_config.hf_config)
    with pytest.raises(CheckpointError, match="layers.2.*missing|missing.*layers.2"):
        config.get_quant_method(torch.nn.Linear(1, 1), "linear")
    assert fetched == [(name, "main")]
