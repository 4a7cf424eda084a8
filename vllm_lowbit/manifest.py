# SPDX-License-Identifier: Apache-2.0
"""lowbit_manifest.json: what every tensor of a checkpoint must be, and checking it."""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from .architecture import ModelShape
from .checkpoint import INDEX, TensorSpec, open_shard, read_json
from .errors import CheckpointError
from .load_time import is_finite
from .lowbit_checkpoint import MANIFEST, RECIPE, expected_tensors
from .schema import LowbitConfig, Manifest, TensorEntry, dotted, shorten

CONFIG = "config.json"
ITEM_BYTES = {"F32": 4, "F16": 2, "BF16": 2, "I32": 4, "I64": 8, "I8": 1}
_ABSENT = object()


@dataclass(frozen=True)
class Problem:
    """One way in which a checkpoint is not what it should be.

    Attributes:
        file: name of the file inside the checkpoint's directory.
        tensor: the tensor it concerns, None for the whole file.
        message: what it is, and what it should be.
    """

    file: str
    tensor: str | None
    message: str

    def __str__(self) -> str:
        tensor = "" if self.tensor is None else f"tensor {self.tensor} "
        return f"{self.file}: {tensor}{self.message}"


@dataclass(frozen=True)
class StoredTensor:
    """A tensor as the header of its safetensors file describes it."""

    file: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        """Bytes of its data; for the dtypes a lowbit checkpoint may hold."""
        return torch.Size(self.shape).numel() * ITEM_BYTES[self.dtype]


def tensor_sha256(tensor: torch.Tensor) -> str:
    """sha256, in hexadecimal, of a tensor's raw little-endian bytes in row order."""
    data = tensor.detach().cpu().contiguous().flatten().view(torch.uint8)
    return hashlib.sha256(data.numpy().data).hexdigest()


def write_manifest(
    directory: Path, entries: Mapping[str, TensorEntry], config: Mapping[str, Any]
) -> None:
    """Write lowbit_manifest.json into a checkpoint's directory.

    Args:
        directory: of the checkpoint.
        entries: every tensor of it, by name.
        config: what its config.json holds.
    """
    manifest = Manifest(tensors=dict(entries), config=dict(config))
    # Not pydantic's JSON, in which an infinity of the config would become null.
    text = json.dumps(manifest.model_dump(), indent=1)
    (directory / MANIFEST).write_text(text + "\n")


def read_manifest(directory: Path) -> Manifest:
    """The manifest of a checkpoint.

    Raises:
        CheckpointError: when there is none, or it is no JSON.
        ConfigError: for a key or value it cannot have.
    """
    path = directory / MANIFEST
    return Manifest.parse(read_json(path), str(path))


def require_headers(
    directory: Path, shape: ModelShape, config: LowbitConfig
) -> dict[str, StoredTensor]:
    """Refuse a checkpoint whose files, manifest and model do not agree.

    Arguments as in :func:`check_headers`; no tensor is read.

    Returns:
        The tensors there are, by name.

    Raises:
        CheckpointError: naming the first file and tensor that differs.
        ConfigError: for a manifest that does not validate.
    """
    found, problems = check_headers(directory, shape, config, read_manifest(directory))
    if problems:
        more = len(problems) - 1
        raise CheckpointError(
            f"{directory / str(problems[0])}"
            + (f" (and {more} more; `inspect --verify` lists them)" if more else "")
        )
    return found


def check_headers(
    directory: Path, shape: ModelShape, config: LowbitConfig, manifest: Manifest
) -> tuple[dict[str, StoredTensor], list[Problem]]:
    """Compare files, manifest and model by names, dtypes, shapes and config.json.

    Args:
        directory: of the checkpoint.
        shape: sizes of its model.
        config: its quantization.
        manifest: its manifest.

    Returns:
        The tensors there are, by name, and every difference.
    """
    found, problems = _stored_tensors(directory, manifest)
    unread = {problem.file for problem in problems if problem.tensor is None}
    problems += _index_problems(directory, manifest)
    # First, because tensors that do not fit follow from it.
    problems = [*_config_problems(directory, manifest), *problems]
    expected = expected_tensors(shape, config)
    for name in {**expected, **manifest.tensors, **found}:
        entry, stored = manifest.tensors.get(name), found.get(name)
        if stored is None and entry is not None and entry.file in unread:
            continue
        file = stored.file if stored else entry.file if entry else MANIFEST
        problems += [
            Problem(file, name, message)
            for message in _differences(expected.get(name), entry, stored)
        ]
    return found, problems


def verify(
    directory: Path,
    shape: ModelShape,
    config: LowbitConfig,
    progress: Callable[[int, int], object] = lambda done, total: None,
) -> Iterator[Problem]:
    """Compare a checkpoint with its manifest, its model and its recipe's hash.

    Tensors are read one at a time.

    Args:
        directory: of the checkpoint.
        shape: sizes of its model.
        config: its quantization.
        progress: called with the number of elements read so far and their total.

    Yields:
        Every difference there is.

    Raises:
        CheckpointError, ConfigError: for a manifest that cannot be read.
    """
    manifest = read_manifest(directory)
    found, problems = check_headers(directory, shape, config, manifest)
    yield from problems
    yield from _recipe_problems(directory, config)
    both = {name: found[name] for name in manifest.tensors if name in found}
    sizes = {name: torch.Size(both[name].shape).numel() for name in both}
    done, total = 0, sum(sizes.values())
    progress(done, total)
    for name, stored in both.items():
        sha256 = manifest.tensors[name].sha256
        message = data_problem(directory, name, stored.file, sha256)
        if message is not None:
            yield Problem(stored.file, name, message)
        done += sizes[name]
        progress(done, total)


def _stored_tensors(
    directory: Path, manifest: Manifest
) -> tuple[dict[str, StoredTensor], list[Problem]]:
    """What the headers of the checkpoint's files hold; no tensor is read.

    Returns:
        Tensors by name, and the files that are missing, broken, or not listed in the
        manifest.
    """
    listed = {entry.file for entry in manifest.tensors.values()}
    present = {path.name for path in directory.glob("*.safetensors")}
    problems = [Problem(f, None, "is missing") for f in sorted(listed - present)]
    problems += [
        Problem(f, None, f"is not listed in {MANIFEST}")
        for f in sorted(present - listed)
    ]
    found: dict[str, StoredTensor] = {}
    for file in sorted(listed & present):
        try:
            tensors = _read_header(directory / file)
        except CheckpointError as error:
            message = str(error).removeprefix(f"{directory / file}: ")
            problems.append(Problem(file, None, message))
            continue
        for name in tensors.keys() & found.keys():
            problems.append(Problem(file, name, f"is in {found[name].file} too"))
        found = {**tensors, **found}
    return found, problems


def _read_header(path: Path) -> dict[str, StoredTensor]:
    tensors = {}
    with open_shard(path) as file:
        for name in file.keys():  # noqa: SIM118 (not a mapping)
            header = file.get_slice(name)
            tensors[name] = StoredTensor(
                path.name, header.get_dtype(), tuple(header.get_shape())
            )
    return tensors


def _config_problems(directory: Path, manifest: Manifest) -> Iterator[Problem]:
    """Every key of config.json that is not as it was written."""
    todo: list[tuple[tuple[str, ...], Any, Any]] = [
        ((), read_json(directory / CONFIG), manifest.config)
    ]
    while todo:
        keys, found, written = todo.pop(0)
        if isinstance(found, dict) and isinstance(written, dict):
            todo += [
                ((*keys, key), found.get(key, _ABSENT), written.get(key, _ABSENT))
                for key in {**written, **found}
            ]
        elif repr(found) != repr(written):  # unlike ==, tells 1 from true
            yield Problem(
                CONFIG,
                None,
                f"key {dotted(keys)} is {_shown(found)}, {MANIFEST} says "
                f"{_shown(written)}; to serve with another value, leave the file as it "
                "was and use --hf-overrides",
            )


def _shown(value: object) -> str:
    return "missing" if value is _ABSENT else shorten(value)


def _index_problems(directory: Path, manifest: Manifest) -> Iterator[Problem]:
    """The index names each tensor's file, where there are several."""
    path = directory / INDEX
    files = {name: entry.file for name, entry in manifest.tensors.items()}
    if not path.exists():
        if len(set(files.values())) > 1:
            yield Problem(INDEX, None, "is missing; the weights are in several files")
        return
    try:
        listed = read_json(path)["weight_map"]
    except (CheckpointError, KeyError, TypeError) as error:
        yield Problem(INDEX, None, f"is not a safetensors index: {error!r}")
        return
    if not isinstance(listed, dict):
        yield Problem(INDEX, None, "is not a safetensors index: no map of tensors")
        return
    for name in {**files, **listed}:
        file = listed.get(name)
        if file != files.get(name):
            shown, of = shorten(file), shorten(files.get(name))
            yield Problem(INDEX, name, f"is in {shown}, {MANIFEST} says {of}")


def _differences(
    spec: TensorSpec | None, entry: TensorEntry | None, stored: StoredTensor | None
) -> Iterator[str]:
    """What does not fit together of a tensor in the model, manifest and files."""
    if stored is None:
        yield "is in none of the files"
        return
    if spec is None:
        yield "does not belong to the model"
    else:
        if stored.dtype not in spec.dtypes:
            yield f"has dtype {stored.dtype}, supported: {', '.join(spec.dtypes)}"
        if stored.shape != spec.shape:
            yield f"has shape {list(stored.shape)}, the model needs {list(spec.shape)}"
    if entry is None:
        yield f"is not listed in {MANIFEST}"
        return
    for key in ("file", "dtype", "shape"):
        is_, listed = getattr(stored, key), getattr(entry, key)
        if is_ != listed:
            yield f"has {key} {_text(is_)}, {MANIFEST} says {_text(listed)}"


def _text(value: object) -> str:
    return str(list(value)) if isinstance(value, tuple) else str(value)


def _recipe_problems(directory: Path, config: LowbitConfig) -> Iterator[Problem]:
    if config.provenance is None:
        message = "quantization_config has no provenance to check recipe.yaml against"
        yield Problem(CONFIG, None, message)
        return
    try:
        digest = hashlib.sha256((directory / RECIPE).read_bytes()).hexdigest()
    except OSError as error:
        yield Problem(RECIPE, None, f"cannot be read: {error.strerror}")
        return
    if digest != config.provenance.recipe_sha256:
        expected = config.provenance.recipe_sha256
        yield Problem(RECIPE, None, f"has sha256 {digest}, config.json says {expected}")


def data_problem(directory: Path, name: str, file: str, sha256: str) -> str | None:
    """What is wrong with a tensor's data, None for nothing.

    Args:
        directory: of the checkpoint.
        name: of the tensor.
        file: that holds it.
        sha256: it should have.
    """
    try:
        with open_shard(directory / file) as shard:
            tensor = shard.get_tensor(name)
    except (CheckpointError, SafetensorError, OSError) as error:
        return f"cannot be read: {error}"
    digest = tensor_sha256(tensor)
    if digest != sha256:
        return f"has sha256 {digest}, {MANIFEST} says {sha256}"
    if tensor.is_floating_point() and not is_finite(tensor):
        return "holds a non-finite value (Inf or NaN)"
    return None
