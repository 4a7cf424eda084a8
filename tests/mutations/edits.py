# SPDX-License-Identifier: Apache-2.0
"""Edits of a checkpoint: each function returns one that takes the directory.

Files are taken apart here without the code under test. An edit of something that the
checkpoint does not have raises KeyError.
"""

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

Edit = Callable[[Path], object]
Tensors = dict[str, torch.Tensor]
DROP = object()


def shards(directory: Path) -> list[Path]:
    """Files of the checkpoint's tensors, in order."""
    return sorted(directory.glob("*.safetensors"))


def parse(path: Path) -> tuple[dict[str, Any], bytes]:
    """Header and data of a safetensors file."""
    content = path.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    return json.loads(content[8:start]), content[start:]


def assemble(header: bytes, data: bytes) -> bytes:
    """A safetensors file."""
    return len(header).to_bytes(8, "little") + header + data


def locate(directory: Path, name: str) -> tuple[Path, int, int]:
    """File of a tensor and the offsets of its data there."""
    for path in shards(directory):
        content = path.read_bytes()
        length = 8 + int.from_bytes(content[:8], "little")
        header = json.loads(content[8:length])
        if name in header:
            first, end = header[name]["data_offsets"]
            return path, length + first, length + end
    raise KeyError(name)


def tensors(name: str, change: Callable[[Tensors], object]) -> Edit:
    """Change the tensors of the file that holds ``name``."""

    def edit(directory: Path) -> None:
        path = locate(directory, name)[0]
        loaded = load_file(path)
        change(loaded)
        save_file({n: t.contiguous() for n, t in loaded.items()}, path)

    return edit


def drop(name: str) -> Edit:
    """Delete a tensor."""
    return tensors(name, lambda loaded: loaded.pop(name))


def rename(name: str, to: str) -> Edit:
    """Give a tensor another name."""
    return tensors(name, lambda loaded: loaded.update({to: loaded.pop(name)}))


def copy(name: str, to: str) -> Edit:
    """Store a tensor a second time under another name."""
    return tensors(name, lambda loaded: loaded.update({to: loaded[name].clone()}))


def replace(name: str, by: Callable[[torch.Tensor], torch.Tensor]) -> Edit:
    """Store something else in a tensor's place."""
    return tensors(name, lambda loaded: loaded.update({name: by(loaded[name])}))


def poke(name: str, value: float) -> Edit:
    """Set one element, in the middle of a tensor."""

    def change(loaded: Tensors) -> None:
        elements = loaded[name].view(-1)
        elements[len(elements) // 2] = value

    return tensors(name, change)


def duplicate(name: str) -> Edit:
    """Store a tensor in the other shard too."""

    def edit(directory: Path) -> None:
        path = locate(directory, name)[0]
        other = next(shard for shard in shards(directory) if shard != path)
        save_file({**load_file(other), name: load_file(path)[name]}, other)

    return edit


def flip(name: str, bit: int = 0) -> Edit:
    """Change one bit, in the middle of a tensor's data."""

    def edit(directory: Path) -> None:
        path, first, end = locate(directory, name)
        content = bytearray(path.read_bytes())
        content[(first + end) // 2] ^= 1 << bit
        path.write_bytes(content)

    return edit


def swap(name: str, other: str) -> Edit:
    """Exchange the data of two tensors of equal shape and dtype."""

    def edit(directory: Path) -> None:
        data = {}
        for key in (name, other):
            path, first, end = locate(directory, key)
            data[key] = path.read_bytes()[first:end]
        assert len(data[name]) == len(data[other])
        for key, source in ((name, other), (other, name)):
            path, first, end = locate(directory, key)
            content = bytearray(path.read_bytes())
            content[first:end] = data[source]
            path.write_bytes(content)

    return edit


def header(file: str, change: Callable[[dict[str, Any]], object]) -> Edit:
    """Change the header of a safetensors file and leave its data."""

    def edit(directory: Path) -> None:
        entries, data = parse(directory / file)
        change(entries)
        (directory / file).write_bytes(assemble(json.dumps(entries).encode(), data))

    return edit


def content(file: str, change: Callable[[bytes], bytes]) -> Edit:
    """Change the bytes of a file."""

    def edit(directory: Path) -> None:
        (directory / file).write_bytes(change((directory / file).read_bytes()))

    return edit


def write(file: str, text: bytes) -> Edit:
    """Write a file, whether it is there or not."""
    return lambda directory: (directory / file).write_bytes(text)


def remove(file: str) -> Edit:
    """Delete a file."""
    return lambda directory: (directory / file).unlink()


def sparse(file: str, size: int) -> Edit:
    """Make a file as large as this, all zeros, without taking the disk."""

    def edit(directory: Path) -> None:
        with (directory / file).open("wb") as out:
            out.truncate(size)

    return edit


def directory_instead(file: str) -> Edit:
    """Put a directory in a file's place."""

    def edit(directory: Path) -> None:
        (directory / file).unlink()
        (directory / file).mkdir()

    return edit


def pickle_instead(file: str) -> Edit:
    """Store the tensors of a safetensors file as a pickle of the same name."""

    def edit(directory: Path) -> None:
        loaded = {n: t.float().numpy() for n, t in load_file(directory / file).items()}
        (directory / file).write_bytes(pickle.dumps(loaded))

    return edit


def move(file: str, to: str) -> Edit:
    """Give a file another name, in a subdirectory if it has one."""

    def edit(directory: Path) -> None:
        (directory / to).parent.mkdir(exist_ok=True)
        shutil.move(directory / file, directory / to)

    return edit


def put(file: str, keys: str, value: Any) -> Edit:
    """Set a value in a JSON file, keys separated by ``/``; DROP removes the key."""

    def edit(directory: Path) -> None:
        path = directory / file
        data = json.loads(path.read_text())
        *parents, last = keys.split("/")
        inner = data
        for key in parents:
            inner = inner[key]
        if value is DROP:
            del inner[last]
        else:
            inner[last] = value
        path.write_text(json.dumps(data))

    return edit


def together(*edits: Edit) -> Edit:
    """Several edits, one after the other."""

    def edit(directory: Path) -> None:
        for each in edits:
            each(directory)

    return edit
