# SPDX-License-Identifier: Apache-2.0
"""Writing a checkpoint directory so that it is there whole or not at all."""

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from ..architecture import ModelShape
from ..checkpoint import INDEX, TensorSpec
from ..errors import LowbitError, OutputError
from ..manifest import ITEM_BYTES, tensor_sha256, write_manifest
from ..schema import TensorEntry

MAX_SHARD_BYTES = 1 << 30
DTYPES = {
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int32: "I32",
    torch.int64: "I64",
    torch.int8: "I8",
}
LICENCES = ("LICENSE*", "NOTICE*", "USE_POLICY*")
# What a served model needs beside its weights and config.
COMPANIONS = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template*",
    "generation_config.json",
    *LICENCES,
)


def check_output(directory: Path) -> None:
    """Refuse an output that exists, or that cannot be made.

    Raises:
        OutputError: naming the directory.
    """
    if directory.is_symlink() or (directory.exists() and not directory.is_dir()):
        raise OutputError(f"output {directory} exists and is not a directory")
    if directory.exists() and any(directory.iterdir()):
        raise OutputError(
            f"output directory {directory} exists and is not empty; choose another or "
            "remove it"
        )
    parent = directory.absolute().parent
    if not parent.is_dir():
        raise OutputError(f"output {directory}: {parent} is not a directory")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise OutputError(f"output {directory}: {parent} is not writable")


class CheckpointWriter:
    """Writes tensors into shards in a hidden directory that is renamed at the end.

    Used as a context manager; leaving it without :meth:`commit` removes everything.
    config.json is written last, so that even what a power failure leaves behind is
    not taken for a checkpoint.

    Args:
        directory: the checkpoint to be; must not exist, or be empty.
        specs: every tensor that will be added, in file order; a tensor that may have
            several dtypes is planned at its widest.
        max_shard_bytes: of tensor data in one file; also what is held in memory.

    Raises:
        OutputError: when it cannot be made, or the disk is too small.
    """

    def __init__(
        self,
        directory: Path,
        specs: Mapping[str, TensorSpec],
        max_shard_bytes: int = MAX_SHARD_BYTES,
    ) -> None:
        check_output(directory)
        self.directory = directory.absolute()
        self.specs = specs
        self.shards = _plan(specs, max_shard_bytes)
        self._pending: dict[str, dict[str, torch.Tensor]] = {}
        self._entries: dict[str, TensorEntry] = {}
        needed = sum(largest_bytes(spec) for spec in specs.values())
        free = shutil.disk_usage(self.directory.parent).free
        if needed > free:
            raise OutputError(
                f"output {directory} takes about {needed >> 20} MiB, "
                f"{free >> 20} MiB are free there"
            )

    def __enter__(self) -> Self:
        parent = self.directory.parent
        try:
            staging = tempfile.mkdtemp(prefix=f".{self.directory.name}-", dir=parent)
        except OSError as error:
            raise OutputError(f"output {self.directory}: {error}") from None
        self.staging = Path(staging)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self.staging.exists():
            shutil.rmtree(self.staging, ignore_errors=True)
        if isinstance(error, OSError | SafetensorError) and not isinstance(
            error, LowbitError
        ):
            raise OutputError(
                f"output {self.directory} could not be written, and was removed: "
                f"{error}"
            ) from error

    @property
    def tensor_bytes(self) -> int:
        """Bytes of the safetensors files written so far."""
        files = self.staging.glob("*.safetensors")
        return sum(path.stat().st_size for path in files)

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Add one tensor; a shard is written when its last one arrives.

        Raises:
            ValueError: for a tensor that was not announced, or announced otherwise.
        """
        spec, dtype = self.specs[name], DTYPES[tensor.dtype]
        if name in self._entries or dtype not in spec.dtypes:
            raise ValueError(f"{name}: {dtype} twice or not one of {spec.dtypes}")
        if tuple(tensor.shape) != spec.shape:
            raise ValueError(f"{name}: {tuple(tensor.shape)} is not {spec.shape}")
        tensor = tensor.detach().cpu().contiguous()
        file = self.shards[name]
        entry = {"file": file, "dtype": dtype, "shape": spec.shape}
        self._entries[name] = TensorEntry.model_validate(
            {**entry, "sha256": tensor_sha256(tensor)}
        )
        pending = self._pending.setdefault(file, {})
        pending[name] = tensor
        if len(pending) == sum(shard == file for shard in self.shards.values()):
            self._write_shard(file, self._pending.pop(file))

    def _write_shard(self, file: str, tensors: dict[str, torch.Tensor]) -> None:
        ordered = {name: tensors[name] for name in self.shards if name in tensors}
        save_file(ordered, self.staging / file, metadata={"format": "pt"})

    def copy_companions(self, source: Path) -> None:
        """Copy tokenizer, generation config, chat template and licence files."""
        for pattern in COMPANIONS:
            for path in sorted(source.glob(pattern)):
                if path.is_file():
                    shutil.copyfile(path, self.staging / path.name)

    def write_text(self, name: str, text: str) -> None:
        """Write one text file."""
        (self.staging / name).write_text(text, encoding="utf-8")

    def commit(self, config: Mapping[str, Any], manifest: bool = True) -> None:
        """Write index, manifest and config.json, and put the directory in place.

        Args:
            config: what config.json will hold.
            manifest: whether to write one; other formats than lowbit have none.

        Raises:
            ValueError: when an announced tensor was never added.
        """
        missing = [name for name in self.specs if name not in self._entries]
        if missing:
            raise ValueError(f"tensors were not written: {missing[:4]}")
        entries = {name: self._entries[name] for name in self.specs}
        if len(set(self.shards.values())) > 1:
            total = sum(largest_bytes(spec) for spec in self.specs.values())
            index = {"metadata": {"total_size": total}, "weight_map": self.shards}
            self.write_text(INDEX, json.dumps(index, indent=2) + "\n")
        if manifest:
            write_manifest(self.staging, entries, config)
        for path in self.staging.iterdir():
            _sync(path)
        self.write_text("config.json", json.dumps(config, indent=2) + "\n")
        _sync(self.staging / "config.json")
        # mkdtemp and save_file make what only their owner may read.
        mask = _umask()
        self.staging.chmod(0o777 & ~mask)
        for path in self.staging.iterdir():
            path.chmod(0o666 & ~mask)
        _sync(self.staging)
        # Replaces an empty directory, and nothing else.
        os.rename(self.staging, self.directory)
        _sync(self.directory.parent)


def stacking(
    writer: CheckpointWriter, shape: ModelShape
) -> Callable[[str, torch.Tensor], None]:
    """Takes tensors by their names here, and stacks those that are one in the files.

    Args:
        writer: that they go to.
        shape: sizes of the model.
    """
    parts: dict[str, list[torch.Tensor]] = {}

    def add(name: str, tensor: torch.Tensor) -> None:
        stored, rows = shape.in_lowbit(name)
        if rows != slice(None):
            so_far = parts.setdefault(stored, [])
            so_far.append(tensor)
            if sum(map(len, so_far)) < writer.specs[stored].shape[0]:
                return
            tensor = torch.cat(so_far)
        writer.add(stored, tensor)

    return add


def _plan(specs: Mapping[str, TensorSpec], max_bytes: int) -> dict[str, str]:
    """File of each tensor, in order, files no larger than max_bytes if they can."""
    numbers, filled = {}, 0
    number = 1
    for name, spec in specs.items():
        size = largest_bytes(spec)
        if filled and filled + size > max_bytes:
            number, filled = number + 1, 0
        numbers[name] = number
        filled += size
    if number == 1:
        return dict.fromkeys(specs, "model.safetensors")
    return {
        name: f"model-{n:05}-of-{number:05}.safetensors" for name, n in numbers.items()
    }


def largest_bytes(spec: TensorSpec) -> int:
    """Bytes of a tensor, in the widest of its dtypes."""
    size = max(ITEM_BYTES[dtype] for dtype in spec.dtypes)
    for extent in spec.shape:
        size *= extent
    return size


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
