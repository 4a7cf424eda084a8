# SPDX-License-Identifier: Apache-2.0
"""Checks of a checkpoint's files against its model, from headers alone."""

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from .architecture import HEAD, ModelShape
from .errors import CheckpointError
from .load_time import check_finite

FLOATS = ("BF16", "F16", "F32")
INDEX = "model.safetensors.index.json"
# Far above that of any model: a manifest has 250 bytes a tensor.
MAX_JSON_BYTES = 64 << 20


@dataclass(frozen=True)
class TensorSpec:
    """What a tensor of a checkpoint must be.

    Attributes:
        dtypes: as safetensors names them.
        shape: of it.
        values: all it may hold, None for anything.
        meaning: of those values, for the error.
        optional: whether it may be missing.
        unseen: whether no layer method of ours will see it.
    """

    dtypes: tuple[str, ...]
    shape: tuple[int, ...]
    values: torch.Tensor | None = field(default=None, compare=False)
    meaning: str = ""
    optional: bool = False
    unseen: bool = False


def check_plain_checkpoint(model: str, shape: ModelShape) -> None:
    """Check that a plain checkpoint on disk holds the model, before it is loaded.

    Raises:
        CheckpointError: as :func:`check_tensors`. A head that repeats a tied
            embedding, and rotary buffers of old checkpoints, may be there.
    """
    expected = {
        name: TensorSpec(FLOATS, size, unseen=shape.is_stock(name))
        for name, size in shape.plain_tensors().items()
    }
    check_tensors(
        Path(model), expected, partial(may_be_there, shape), shape.names.whole
    )


def may_be_there(shape: ModelShape, name: str) -> bool:
    """Whether a tensor that is not the model's is known to be superfluous."""
    repeated = shape.tie_word_embeddings and name == HEAD
    return repeated or name.endswith(shape.architecture.superfluous)


def check_tensors(
    directory: Path,
    expected: Mapping[str, TensorSpec],
    ignorable: Callable[[str], bool] = lambda name: False,
    whole: Callable[[str], str] = lambda name: name,
) -> None:
    """Check that a checkpoint's files hold exactly the tensors they should.

    Names, shapes and dtypes come from the safetensors headers; tensors that no layer
    method of ours sees (norms, biases, routers) are also read and checked to be
    finite.

    Args:
        directory: where the files are.
        expected: every tensor that must be there.
        ignorable: other names that may be there.
        whole: makes a name that of ``expected``, where a file may leave out its start.

    Raises:
        CheckpointError: naming the file and the tensor.
    """
    seen: dict[str, Path] = {}
    for path in safetensors_files(directory):
        with open_shard(path) as file:
            for stored in file.keys():  # noqa: SIM118 (not a mapping)
                name = whole(stored)
                if name in seen:
                    raise CheckpointError(
                        f"tensor {name} is in both {seen[name]} and {path}"
                    )
                seen[name] = path
                if name in expected:
                    _check_tensor(file, path, stored, expected[name])
    missing = [n for n, spec in expected.items() if n not in seen and not spec.optional]
    if missing:
        raise CheckpointError(
            f"{directory}: {len(missing)} tensors of the model are missing, first "
            + ", ".join(missing[:4])
        )
    extra = [name for name in seen if name not in expected and not ignorable(name)]
    if extra:
        raise CheckpointError(
            f"{seen[extra[0]]}: tensor {extra[0]} does not belong to the model "
            f"({len(extra)} such tensors)"
        )


def safetensors_files(directory: Path) -> list[Path]:
    """The checkpoint's shards: those of the index, else every safetensors file.

    Raises:
        CheckpointError: for no file, a shard that is missing, or an index entry that
            is not a plain file name.
    """
    index = directory / INDEX
    if not index.is_file():
        files = sorted(directory.glob("*.safetensors"))
        if not files:
            raise CheckpointError(
                f"{directory}: no *.safetensors file; other formats are not read"
            )
        return files
    try:
        names = set(read_json(index)["weight_map"].values())
    except (KeyError, AttributeError, TypeError) as error:
        raise CheckpointError(f"{index}: not a safetensors index: {error!r}") from None
    for name in sorted(map(str, names)):
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise CheckpointError(f"{index}: shard name {name!r} is not a file name")
        if not (directory / name).is_file():
            raise CheckpointError(f"{directory}: shard {name} of the index is missing")
    return [directory / str(name) for name in sorted(map(str, names))]


def read_json(path: Path) -> Any:
    """A JSON file of a checkpoint, of at most MAX_JSON_BYTES.

    Raises:
        CheckpointError: when it is larger, cannot be read, or is no JSON.
    """
    try:
        with path.open("rb") as file:
            content = file.read(MAX_JSON_BYTES + 1)
        if len(content) > MAX_JSON_BYTES:
            raise CheckpointError(f"{path}: is larger than {MAX_JSON_BYTES >> 20} MiB")
        return json.loads(content)
    except (OSError, ValueError, RecursionError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{path}: cannot be read as JSON: {error}") from None


@contextmanager
def open_shard(path: Path) -> Iterator[safe_open]:
    """A safetensors file, opened.

    Raises:
        CheckpointError: naming it, when it is not there, truncated or another format.
    """
    try:
        file = safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{path}: not a whole safetensors file: {error}"
        ) from None
    with file:
        yield file


def _check_tensor(file: safe_open, path: Path, name: str, spec: TensorSpec) -> None:
    header = file.get_slice(name)
    if tuple(header.get_shape()) != spec.shape:
        raise CheckpointError(
            f"{path}: tensor {name} has shape {list(header.get_shape())}, the model "
            f"needs {list(spec.shape)}"
        )
    if header.get_dtype() not in spec.dtypes:
        raise CheckpointError(
            f"{path}: tensor {name} has dtype {header.get_dtype()}, supported: "
            + ", ".join(spec.dtypes)
        )
    if len(spec.shape) != 1 and not spec.unseen:
        return
    tensor = file.get_tensor(name)
    check_finite(tensor, f"{name} of {path}")
    if spec.values is not None and not bool((tensor == spec.values).all()):
        raise CheckpointError(
            f"{path}: tensor {name} must hold {spec.meaning}, it starts with "
            f"{tensor[:4].tolist()}"
        )
