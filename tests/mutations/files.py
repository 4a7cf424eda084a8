# SPDX-License-Identifier: Apache-2.0
"""Mutations of files: safetensors files, their index, and the manifest."""

import json
from collections.abc import Callable, Iterator
from typing import Any

from .edits import (
    DROP,
    Edit,
    assemble,
    content,
    directory_instead,
    header,
    move,
    pickle_instead,
    put,
    remove,
    sparse,
    together,
    write,
)
from .mutation import (
    DOWN,
    EMBEDDING,
    FINAL_NORM,
    FIRST,
    HEAD,
    INDEX,
    MANIFEST,
    NORM,
    ONE,
    SECOND,
    Mutation,
)

TOO_LARGE = 65 << 20
DEEP = b'{"a":' * 50_000
MATRIX = f"{EMBEDDING}.weight"
# What is done to a safetensors file, whichever one.
FILES: dict[str, Callable[[str], Edit]] = {
    "missing": remove,
    "empty": lambda file: write(file, b""),
    "garbage": lambda file: content(file, lambda old: bytes(range(256)) * 64),
    "text": lambda file: write(file, b"version https://git-lfs.github.com/spec/v1\n"),
    "zeros": lambda file: content(file, lambda old: bytes(len(old))),
    "a directory": directory_instead,
    "a pickle": pickle_instead,
    "cut in the header": lambda file: content(file, lambda old: old[:100]),
    "cut in the length": lambda file: content(file, lambda old: old[:5]),
    "cut in the data": lambda file: content(file, lambda old: old[: len(old) * 2 // 3]),
    "a byte less": lambda file: content(file, lambda old: old[:-1]),
    "a byte more": lambda file: content(file, lambda old: old + b"\0"),
    "a page more": lambda file: content(file, lambda old: old + bytes(4096)),
    "huge header length": lambda file: content(file, lambda old: b"\xff" * 8 + old[8:]),
    "header length 0": lambda file: content(file, lambda old: bytes(8) + old[8:]),
    "header is no JSON": lambda file: content(
        file, lambda old: old[:8] + b"[" + old[9:]
    ),
    "header is a list": lambda file: write(file, assemble(b"[1, 2]", b"")),
    "header without tensors": lambda file: write(file, assemble(b"{}", b"")),
}


def _entry(name: str, key: str, value: Any) -> Callable[[dict[str, Any]], object]:
    return lambda entries: entries[name].update({key: value})


def _alias(entries: dict[str, Any]) -> None:
    entries[MATRIX]["data_offsets"] = entries[f"{HEAD}.weight"]["data_offsets"]


HEADERS: dict[str, Callable[[dict[str, Any]], object]] = {
    "two tensors with one data": _alias,
    "offsets beyond the file": _entry(MATRIX, "data_offsets", [0, 1 << 40]),
    "negative offsets": _entry(MATRIX, "data_offsets", [-4, 0]),
    "offsets the wrong way": _entry(MATRIX, "data_offsets", [8192, 0]),
    "dtype of another size": _entry(MATRIX, "dtype", "F32"),
    "unknown dtype": _entry(MATRIX, "dtype", "I5"),
    "huge shape": _entry(MATRIX, "shape", [1 << 62, 1 << 62]),
    "negative shape": _entry(MATRIX, "shape", [-256, -16]),
    "entry is a number": lambda entries: entries.update({MATRIX: 3}),
    "entry lacks the shape": lambda entries: entries[MATRIX].pop("shape"),
}
# Of the same bytes: the file is whole, and another one. Whether the manifest agrees:
# with another float type it is a possible checkpoint, of other numbers.
SAME_SIZE: list[tuple[str, Callable[[dict[str, Any]], object], bool]] = [
    ("F16", _entry(MATRIX, "dtype", "F16"), False),
    ("I16", _entry(MATRIX, "dtype", "I16"), False),
    ("I16", _entry(MATRIX, "dtype", "I16"), True),
    ("transposed", lambda entries: entries[MATRIX]["shape"].reverse(), False),
    ("transposed", lambda entries: entries[MATRIX]["shape"].reverse(), True),
]

# What weight_map says of one tensor of the second file.
MAPPED: dict[str, Any] = {
    "of the other shard": FIRST,
    "of no file": "model-00003-of-00003.safetensors",
    "in the directory above": f"../{SECOND}",
    "absolute": f"/etc/{SECOND}",
    "in a subdirectory": f"weights/{SECOND}",
    "of a pickle": "pytorch_model.bin",
    "a number": 2,
    "null": None,
}
INDICES: dict[str, Edit] = {
    "missing": remove(INDEX),
    "empty": write(INDEX, b""),
    "not JSON": write(INDEX, b"{"),
    "not UTF-8": write(INDEX, b"\xff\xfe"),
    "a list": write(INDEX, b"[]"),
    "nothing in it": write(INDEX, b"{}"),
    "empty map": write(INDEX, b'{"weight_map": {}}'),
    "map is a list": write(INDEX, b'{"weight_map": [1]}'),
    "deep": write(INDEX, DEEP),
    "too large": sparse(INDEX, TOO_LARGE),
    "a directory": directory_instead(INDEX),
    "lacks a tensor": put(INDEX, f"weight_map/{FINAL_NORM}", DROP),
    "a tensor too many": put(INDEX, "weight_map/other.weight", FIRST),
}
MANIFESTS: dict[str, Edit] = {
    "missing": remove(MANIFEST),
    "empty": write(MANIFEST, b""),
    "not JSON": write(MANIFEST, b"{"),
    "not UTF-8": write(MANIFEST, b"\xff\xfe"),
    "a list": write(MANIFEST, b"[]"),
    "deep": write(MANIFEST, DEEP),
    "too large": sparse(MANIFEST, TOO_LARGE),
    "a directory": directory_instead(MANIFEST),
}
# Key path, value, and what is named.
MANIFEST_KEYS: list[tuple[str, Any, str]] = [
    ("format_version", 2, "format_version"),
    ("format_version", "1", "format_version"),
    ("format_version", True, "format_version"),
    ("signature", "x", "signature"),
    ("tensors", DROP, "tensors"),
    ("tensors", {}, ONE),
    ("tensors", None, "tensors"),
    ("config", DROP, "config"),
    ("config", {}, "key architectures"),
    ("config", [], "config"),
    ("config/rms_norm_eps", DROP, "rms_norm_eps"),
    ("config/rms_norm_eps", 1.0, "rms_norm_eps"),
    ("config/other", 1, "other"),
    (f"tensors/{NORM}", DROP, NORM),
    (f"tensors/{NORM}", None, NORM),
    ("tensors/other.weight", {}, "other.weight"),
    (f"tensors/{NORM}/mode", "rw", NORM),
    (f"tensors/{NORM}/sha256", "0" * 64, NORM),
    (f"tensors/{DOWN}.weight_scale/sha256", "f" * 64, f"{DOWN}.weight_scale"),
    (f"tensors/{NORM}/sha256", "0", NORM),
    (f"tensors/{NORM}/sha256", None, NORM),
    (f"tensors/{NORM}/sha256", DROP, NORM),
    (f"tensors/{NORM}/dtype", "F16", NORM),
    (f"tensors/{NORM}/dtype", "F64", NORM),
    (f"tensors/{NORM}/shape", [64], NORM),
    (f"tensors/{NORM}/shape", [], NORM),
    (f"tensors/{NORM}/shape", [-128], NORM),
    (f"tensors/{NORM}/shape", [1 << 60], NORM),
    (f"tensors/{NORM}/shape", [128.0], NORM),
    (f"tensors/{NORM}/shape", [1] * 100, NORM),
    (f"tensors/{NORM}/file", "other.safetensors", "other.safetensors"),
    (f"tensors/{NORM}/file", "../model.safetensors", NORM),
    (f"tensors/{NORM}/file", "/model.safetensors", NORM),
    (f"tensors/{NORM}/file", "a/model.safetensors", NORM),
    (f"tensors/{NORM}/file", "pytorch_model.bin", NORM),
    (f"tensors/{NORM}/file", "", NORM),
]


def file_mutations() -> Iterator[Mutation]:
    """All are found with the manifest as it was; it cannot agree with most of them."""
    for what, make in FILES.items():
        for variant, file in (("rotated", ONE), ("sharded", SECOND)):
            yield Mutation("broken file", variant, make(file), file, what)
    for what, change in HEADERS.items():
        yield Mutation("broken header", "rotated", header(ONE, change), ONE, what)
    for what, change, agree in SAME_SIZE:
        edit = header(ONE, change)
        yield Mutation("other header", "rotated", edit, MATRIX, what, agree)
    yield from _additional_files()
    for what, edit in INDICES.items():
        yield Mutation("wrong index", "sharded", edit, INDEX, what)
    for what, file in MAPPED.items():
        edit = put(INDEX, f"weight_map/{FINAL_NORM}", file)
        yield Mutation("wrong index", "sharded", edit, INDEX, what)
    for what, edit in MANIFESTS.items():
        yield Mutation("wrong manifest", "rotated", edit, MANIFEST, what)
    for keys, value, named in MANIFEST_KEYS:
        shown = "deleted" if value is DROP else json.dumps(value)[:30]
        detail = f"{keys.replace(NORM, 'norm')} {shown}"
        edit = put(MANIFEST, keys, value)
        yield Mutation("wrong manifest", "rotated", edit, named, detail)


def _additional_files() -> Iterator[Mutation]:
    for file in ("more.safetensors", "consolidated.safetensors"):
        edit = write(file, assemble(b"{}", b""))
        yield Mutation("additional file", "rotated", edit, file)
    for to in (f"weights/{ONE}", "pytorch_model.bin"):
        yield Mutation("moved file", "rotated", move(ONE, to), ONE, to)
    swapped = together(move(FIRST, "old"), move(SECOND, FIRST), move("old", SECOND))
    yield Mutation("moved file", "sharded", swapped, FIRST, "names exchanged")
