# SPDX-License-Identifier: Apache-2.0
"""Checks of a checkpoint's files against its model, from headers alone."""

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open

from .architecture import LlamaShape
from .errors import CheckpointError
from .load_time import check_finite

FLOATS = ("BF16", "F16", "F32")
INDEX = "model.safetensors.index.json"


@dataclass(frozen=True)
class TensorSpec:
    """What a tensor of a checkpoint must be; dtypes as safetensors names them."""

    dtypes: tuple[str, ...]
    shape: tuple[int, ...]


def check_plain_checkpoint(model: str, shape: LlamaShape) -> None:
    """Check that a plain checkpoint on disk holds the model, before it is loaded.

    Raises:
        CheckpointError: as :func:`check_tensors`. A head that repeats a tied
            embedding, and rotary buffers of old checkpoints, may be there.
    """
    expected = {
        name: TensorSpec(FLOATS, size) for name, size in shape.tensors().items()
    }

    def ignorable(name: str) -> bool:
        repeated = shape.tie_word_embeddings and name == "lm_head.weight"
        return repeated or name.endswith("rotary_emb.inv_freq")

    check_tensors(Path(model), expected, ignorable)


def check_tensors(
    directory: Path,
    expected: Mapping[str, TensorSpec],
    ignorable: Callable[[str], bool] = lambda name: False,
) -> None:
    """Check that a checkpoint's files hold exactly the tensors they should.

    Names, shapes and dtypes come from the safetensors headers; one-dimensional
    tensors (norms and biases, which no layer method of ours sees) are also read and
    checked to be finite.

    Args:
        directory: where the files are.
        expected: every tensor that must be there.
        ignorable: other names that may be there.

    Raises:
        CheckpointError: naming the file and the tensor.
    """
    seen: dict[str, Path] = {}
    for path in safetensors_files(directory):
        with open_shard(path) as file:
            for name in file.keys():  # noqa: SIM118 (not a mapping)
                if name in seen:
                    raise CheckpointError(
                        f"tensor {name} is in both {seen[name]} and {path}"
                    )
                seen[name] = path
                if name in expected:
                    _check_tensor(file, path, name, expected[name])
    missing = [name for name in expected if name not in seen]
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
        names = set(json.loads(index.read_text())["weight_map"].values())
    except (
        OSError,
        ValueError,
        KeyError,
        AttributeError,
        TypeError,
        RecursionError,
    ) as error:
        raise CheckpointError(f"{index}: not a safetensors index: {error!r}") from None
    for name in sorted(map(str, names)):
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise CheckpointError(f"{index}: shard name {name!r} is not a file name")
        if not (directory / name).is_file():
            raise CheckpointError(f"{directory}: shard {name} of the index is missing")
    return [directory / str(name) for name in sorted(map(str, names))]


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
    if len(spec.shape) == 1:
        check_finite(file.get_tensor(name), f"{name} of {path}")
