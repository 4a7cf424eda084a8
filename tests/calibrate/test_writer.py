# SPDX-License-Identifier: Apache-2.0
"""A checkpoint directory is there whole or not at all."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from vllm_lowbit.calibrate import writer as module
from vllm_lowbit.calibrate.writer import CheckpointWriter
from vllm_lowbit.checkpoint import TensorSpec
from vllm_lowbit.errors import OutputError
from vllm_lowbit.manifest import read_manifest, tensor_sha256

TENSORS = {
    "a": torch.arange(12, dtype=torch.float32).view(3, 4),
    "b": torch.ones(5, dtype=torch.bfloat16),
    "c": torch.full((2, 2), -3, dtype=torch.int32),
    "d": torch.tensor([[-7, 7]], dtype=torch.int8),
}
SPECS = {
    name: TensorSpec((module.DTYPES[t.dtype],), tuple(t.shape))
    for name, t in TENSORS.items()
}


def _write(directory: Path, max_shard_bytes: int = 1 << 20) -> None:
    with CheckpointWriter(directory, SPECS, max_shard_bytes) as writer:
        for name in reversed(TENSORS):
            writer.add(name, TENSORS[name])
        writer.write_text("recipe.yaml", "x\n")
        writer.commit({"model_type": "llama"})


def _nothing_left(parent: Path) -> bool:
    return list(parent.iterdir()) == []


def test_whole_checkpoint_in_one_file(tmp_path: Path) -> None:
    out = tmp_path / "out"
    _write(out)
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    assert {p.name for p in out.iterdir()} == {
        "config.json",
        "lowbit_manifest.json",
        "model.safetensors",
        "recipe.yaml",
    }
    loaded = load_file(out / "model.safetensors")
    assert all(torch.equal(loaded[name], t) for name, t in TENSORS.items())
    entries = read_manifest(out).tensors
    assert list(entries) == list(TENSORS)
    for name, entry in entries.items():
        assert entry.sha256 == tensor_sha256(TENSORS[name])
        assert (entry.dtype,) == SPECS[name].dtypes and entry.shape == SPECS[name].shape


def test_shards_are_planned_in_order_and_indexed(tmp_path: Path) -> None:
    _write(tmp_path / "out", max_shard_bytes=60)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    names = [f"model-0000{n}-of-00002.safetensors" for n in (1, 2)]
    assert index["weight_map"] == {
        "a": names[0],  # 48 bytes and 10
        "b": names[0],
        "c": names[1],
        "d": names[1],
    }
    assert index["metadata"]["total_size"] == 48 + 10 + 16 + 2
    for name, file in index["weight_map"].items():
        assert torch.equal(load_file(tmp_path / "out" / file)[name], TENSORS[name])


def test_a_tensor_larger_than_a_shard_has_its_own(tmp_path: Path) -> None:
    _write(tmp_path / "out", max_shard_bytes=1)
    assert len(list((tmp_path / "out").glob("*.safetensors"))) == len(TENSORS)


def test_others_may_read_what_the_umask_lets_them(tmp_path: Path) -> None:
    old = os.umask(0o022)
    try:
        _write(tmp_path / "out")
    finally:
        os.umask(old)
    assert (tmp_path / "out").stat().st_mode & 0o777 == 0o755
    for path in (tmp_path / "out").iterdir():
        assert path.stat().st_mode & 0o777 == 0o644, path.name


def test_companions_are_copied(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    names = ("tokenizer.json", "generation_config.json", "chat_template.jinja")
    for name in (*names, "LICENSE", "model.safetensors", "pytorch_model.bin"):
        (source / name).write_text(name)
    with CheckpointWriter(tmp_path / "out", {}) as writer:
        writer.copy_companions(source)
        writer.commit({})
    copied = {p.name for p in (tmp_path / "out").iterdir()}
    assert copied == {*names, "LICENSE", "config.json", "lowbit_manifest.json"}


def test_other_formats_have_no_manifest(tmp_path: Path) -> None:
    shape = torch.tensor([3, 4])
    specs = {"a.weight_shape": TensorSpec(("I64",), (2,))}
    with CheckpointWriter(tmp_path / "out", specs) as writer:
        writer.add("a.weight_shape", shape)
        writer.commit({}, manifest=False)
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"config.json", "model.safetensors"}
    loaded = load_file(tmp_path / "out" / "model.safetensors")
    assert torch.equal(loaded["a.weight_shape"], shape)


def test_an_empty_directory_is_filled(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    _write(tmp_path / "out")
    assert (tmp_path / "out" / "config.json").is_file()


@pytest.mark.parametrize("kind", ["filled", "file", "link", "dangling"])
def test_an_existing_output_is_refused_and_stays(tmp_path: Path, kind: str) -> None:
    out = tmp_path / "out"
    if kind == "filled":
        out.mkdir()
        (out / "mine").write_text("x")
    elif kind == "file":
        out.write_text("x")
    else:
        (tmp_path / "elsewhere").mkdir()
        out.symlink_to(tmp_path / ("elsewhere" if kind == "link" else "nowhere"))
    before = sorted(str(p) for p in tmp_path.rglob("*"))
    with pytest.raises(OutputError, match="out.* exists and is not"):
        _write(out)
    assert sorted(str(p) for p in tmp_path.rglob("*")) == before


def test_a_missing_parent_is_named(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=r"nowhere is not a directory"):
        _write(tmp_path / "nowhere" / "out")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_parent_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(OutputError, match="is not writable"):
        _write(tmp_path / "out")
    tmp_path.chmod(0o700)


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError, SystemExit])
def test_an_interrupted_run_leaves_nothing(
    tmp_path: Path, error: type[BaseException]
) -> None:
    with pytest.raises(error):
        with CheckpointWriter(tmp_path / "out", SPECS, 1) as writer:
            writer.add("a", TENSORS["a"])
            raise error
    assert _nothing_left(tmp_path)


def test_a_killed_run_leaves_nothing_that_looks_like_a_checkpoint(
    tmp_path: Path,
) -> None:
    code = (
        "import os, torch\n"
        "from pathlib import Path\n"
        "from vllm_lowbit.calibrate.writer import CheckpointWriter\n"
        "from vllm_lowbit.checkpoint import TensorSpec\n"
        "with CheckpointWriter(Path('out'), {'a': TensorSpec(('F32',), (4,))}) as w:\n"
        "    w.add('a', torch.zeros(4))\n"
        "    w.write_text('recipe.yaml', 'x')\n"
        "    os._exit(9)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=False)
    assert done.returncode == 9
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.rglob("config.json"))
    assert all(path.name.startswith(".out-") for path in tmp_path.iterdir())


def test_a_disk_that_is_too_small_is_refused_before_writing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=3 << 20)
    monkeypatch.setattr(module.shutil, "disk_usage", lambda path: usage)
    large = {"a": TensorSpec(("F32",), (1 << 20,))}
    with pytest.raises(OutputError, match=r"out takes about 4 MiB, 3 MiB are free"):
        CheckpointWriter(tmp_path / "out", large)
    assert _nothing_left(tmp_path)


@pytest.mark.parametrize("limit", [100, 5000])
def test_a_disk_that_fills_up_leaves_nothing(tmp_path: Path, limit: int) -> None:
    """A limit on the size of files fails a write in its middle, as a full disk does."""
    code = (
        "import resource, signal, sys, torch\n"
        "from pathlib import Path\n"
        "from vllm_lowbit.calibrate.writer import CheckpointWriter\n"
        "from vllm_lowbit.checkpoint import TensorSpec\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        f"resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))\n"
        "specs = {'a': TensorSpec(('F32',), (512,))}\n"
        "with CheckpointWriter(Path('out'), specs) as writer:\n"
        "    writer.add('a', torch.zeros(512))\n"
        "    writer.write_text('recipe.yaml', 'x' * 10000)\n"
        "    writer.commit({})\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert "/out could not be written, and was removed: " in done.stderr
    assert "File too large" in done.stderr
    assert _nothing_left(tmp_path)


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        ("a", torch.zeros(3, 4, dtype=torch.int32), "I32 twice or not one of"),
        ("a", torch.zeros(4, 3), r"\(4, 3\) is not \(3, 4\)"),
    ],
)
def test_what_was_not_announced_is_refused(
    tmp_path: Path, name: str, tensor: torch.Tensor, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        with CheckpointWriter(tmp_path / "out", SPECS) as writer:
            writer.add(name, tensor)
    assert _nothing_left(tmp_path)


def test_nothing_is_committed_with_a_tensor_missing(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"not written: \['b', 'c', 'd'\]"):
        with CheckpointWriter(tmp_path / "out", SPECS) as writer:
            writer.add("a", TENSORS["a"])
            writer.commit({})
    assert _nothing_left(tmp_path)
