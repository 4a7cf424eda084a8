# SPDX-License-Identifier: Apache-2.0
"""The model that is calibrated: where it is, and its tensors one at a time."""

from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from safetensors import safe_open

from ..architecture import ModelShape
from ..checkpoint import check_plain_checkpoint, safetensors_files
from ..errors import ConfigError
from ..lowbit_checkpoint import read_config
from .writer import LICENCES

_NEEDED = (
    "*.safetensors",
    "*.json",
    "*.txt",
    "*.jinja",
    "*.md",
    "tokenizer*",
    "LICENSE*",
)


@dataclass(frozen=True)
class Source:
    """A plain checkpoint on disk.

    Attributes:
        directory: where it is.
        name: hub name, also of a directory in the hub's cache, or the directory's own.
        revision: commit of the hub it was taken from, None for a plain directory.
        shape: its sizes.
        files: file of each tensor, and its name there.
    """

    directory: Path
    name: str
    revision: str | None
    shape: ModelShape
    files: dict[str, tuple[Path, str]]

    @classmethod
    def open(cls, model: str) -> "Source":
        """Find a model and check that its files are whole.

        Args:
            model: local directory, or a name on the hub.

        Raises:
            ConfigError: when it is not there, or already quantized.
            UnsupportedError, CheckpointError: for an architecture that is not
                supported or tensors that are missing, misshaped or not float.
        """
        directory = _locate(model)
        config, quantized = read_config(str(directory))
        source = f"{directory / 'config.json'}"
        if quantized is not None:
            raise ConfigError(
                f"{source}: the checkpoint is already quantized by 'lowbit'; calibrate "
                "its base model"
            )
        shape = ModelShape.from_config(config, source)
        check_plain_checkpoint(str(directory), shape)
        files: dict[str, tuple[Path, str]] = {}
        for path in safetensors_files(directory):
            with safe_open(path, framework="pt") as file:
                files |= {shape.names.whole(name): (path, name) for name in file.keys()}  # noqa: SIM118
        name, revision = _identity(directory.resolve())
        return cls(
            directory=directory,
            name=name,
            revision=revision,
            shape=shape,
            files=files,
        )

    def tensor(self, name: str) -> torch.Tensor:
        """One tensor of the model, read now.

        Args:
            name: one of ``shape.tensors()``, which may be some rows of one in a file.
        """
        stored, rows = self.shape.in_plain(name)
        path, file_name = self.files[stored]
        with safe_open(path, framework="pt") as file:
            if rows == slice(None):
                tensor = file.get_tensor(file_name)
            elif self.shape.is_transposed(name):
                tensor = file.get_slice(file_name)[:, rows]
            else:
                tensor = file.get_slice(file_name)[rows]
        transposed = self.shape.is_transposed(name)
        return tensor.t().contiguous() if transposed else tensor

    def layer(self, index: int) -> dict[str, torch.Tensor]:
        """Tensors of a decoder layer, by name after ``model.layers.N.``."""
        prefix = f"model.layers.{index}."
        return {
            name.removeprefix(prefix): self.tensor(name)
            for name in self.shape.tensors()
            if name.startswith(prefix)
        }


def _identity(directory: Path) -> tuple[str, str | None]:
    """Name and revision of a model.

    The hub's client keeps OWNER/NAME in ``models--OWNER--NAME/snapshots/COMMIT``.
    """
    kind, *parts = directory.parent.parent.name.split("--")
    if directory.parent.name == "snapshots" and kind == "models" and parts:
        return "/".join(parts), directory.name
    return directory.name, None


def _locate(model: str) -> Path:
    directory = Path(model)
    if directory.is_dir():
        return directory
    if directory.exists() or model.startswith(("/", "./", "../", "~")):
        raise ConfigError(f"model {model}: not a directory")
    try:
        return Path(snapshot_download(model, allow_patterns=[*_NEEDED, *LICENCES]))
    except HFValidationError as error:
        raise ConfigError(
            f"model {model}: neither a directory nor a hub name: {error}"
        ) from None
    except (HfHubHTTPError, OSError) as error:
        raise ConfigError(
            f"model {model}: not a directory, and could not be downloaded: {error}"
        ) from None
