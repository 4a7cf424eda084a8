# SPDX-License-Identifier: Apache-2.0
"""A compressed-tensors checkpoint of a lowbit one, for vLLM without this plugin."""

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from itertools import islice
from pathlib import Path

import torch

from ..architecture import ModelShape
from ..checkpoint import TensorSpec, open_shard
from ..errors import CheckpointError, ConfigError, UnsupportedError
from ..inspection import read_checkpoint
from ..lowbit_checkpoint import RECIPE, PackedWeight, read_config
from ..manifest import read_manifest, verify
from ..rotations import check_rotations
from ..schema import LowbitConfig, TensorEntry, shorten
from .base_card import CARD, base_metadata
from .card import ExportCard, render_export_card
from .compressed import TORCH_DTYPES, Layout, layout_of, quantization_config
from .stock import refuse_what_differs
from .writer import CheckpointWriter, check_output

FORMATS = ("compressed-tensors",)
PACKAGES = ("vllm-lowbit", "compressed-tensors")
Progress = Callable[[int, int, str], object]
_SHOWN_PROBLEMS = 4


@dataclass(frozen=True)
class LowbitSource:
    """A lowbit checkpoint that was verified.

    Attributes:
        directory: where it is.
        shape: sizes of its model.
        config: its quantization.
        stored: its tensors, by name.
    """

    directory: Path
    shape: ModelShape
    config: LowbitConfig
    stored: Mapping[str, TensorEntry]

    def tensor(self, name: str) -> torch.Tensor:
        """One tensor, read now."""
        with open_shard(self.directory / self.stored[name].file) as file:
            return file.get_tensor(name)

    def weight(self, module: str) -> PackedWeight:
        """A quantized matrix with symmetric codes."""
        return PackedWeight(
            self.tensor(f"{module}.weight_packed"),
            self.tensor(f"{module}.weight_scale"),
            None,
        )


def export(
    checkpoint: Path,
    output: Path,
    format: str = FORMATS[0],
    progress: Progress = lambda done, total, what: None,
) -> str:
    """Write a checkpoint that stock vLLM runs, of a lowbit one.

    Args:
        checkpoint: directory of the lowbit checkpoint.
        output: directory to make; must not exist, or be empty.
        format: one of FORMATS.
        progress: called with what was done, the total, and what is being done.

    Returns:
        name of the scheme.

    Raises:
        ConfigError: for an unknown format, or a config.json that cannot be.
        CheckpointError: when the checkpoint is no lowbit one, or damaged.
        UnsupportedError: when stock vLLM would not run it as it was calibrated.
        OutputError: when the output exists or cannot be written; nothing is left.
    """
    if format not in FORMATS:
        raise ConfigError(
            f"format {shorten(format)} does not exist; supported: {', '.join(FORMATS)}"
        )
    shape, config = read_checkpoint(checkpoint)
    config_file = str(checkpoint / "config.json")
    check_rotations(shape, config, config_file)
    refuse_what_differs(config, config_file)
    if shape.architecture.fused:
        raise UnsupportedError(
            f"{config_file}: {shape.architecture.name} cannot be exported: other tools "
            "expect its stacked linears, and this checkpoint holds each by itself; "
            "supported: architectures without stacked linears"
        )
    if shape.num_experts or shape.architecture.layer_norm:
        raise UnsupportedError(
            f"{config_file}: {shape.architecture.name} cannot be exported: it was "
            "never tested in vLLM without this plugin"
        )
    check_output(output)
    _refuse_damage(checkpoint, shape, config, progress)
    stored = read_manifest(checkpoint).tensors
    source = LowbitSource(checkpoint, shape, config, stored)
    layout = layout_of(config.scheme, stored["model.norm.weight"].dtype)
    quantization = quantization_config(config.scheme, layout.name)
    with CheckpointWriter(output, _specs(source, layout)) as writer:
        _write_tensors(writer, source, layout, progress)
        writer.copy_companions(checkpoint)
        shutil.copyfile(checkpoint / RECIPE, writer.staging / RECIPE)
        writer.write_text(CARD, render_export_card(_card(writer, source, layout)))
        model, _ = read_config(str(checkpoint))
        model["quantization_config"] = quantization
        writer.commit(model, manifest=False)
    return config.scheme.name


def _refuse_damage(
    checkpoint: Path, shape: ModelShape, config: LowbitConfig, progress: Progress
) -> None:
    def update(done: int, total: int) -> None:
        progress(done, total, "verifying")

    problems = verify(checkpoint, shape, config, update)
    found = [str(checkpoint / str(p)) for p in islice(problems, _SHOWN_PROBLEMS)]
    if found:
        raise CheckpointError(
            f"not exported: {'; '.join(found)}; `vllm-lowbit inspect --verify` lists "
            "every problem"
        )


def _specs(source: LowbitSource, layout: Layout) -> dict[str, TensorSpec]:
    specs: dict[str, TensorSpec] = {}
    for name, size in source.shape.tensors().items():
        if name in source.stored:
            entry = source.stored[name]
            specs[name] = TensorSpec((entry.dtype,), entry.shape)
            continue
        module = name.removesuffix(".weight")
        n, k = size
        specs |= {f"{module}.{kind}": s for kind, s in layout.specs(n, k).items()}
    return specs


def _write_tensors(
    writer: CheckpointWriter, source: LowbitSource, layout: Layout, progress: Progress
) -> None:
    names = source.shape.tensors()
    for done, (name, size) in enumerate(names.items()):
        progress(done, len(names), name)
        if name in source.stored:
            writer.add(name, source.tensor(name))
            continue
        module = name.removesuffix(".weight")
        weight = source.weight(module)
        codes = weight.codes(module, size[1], source.config.scheme.weights)
        tensors = layout.tensors(weight, codes)
        _check_scale(module, tensors["weight_scale"])
        for kind, tensor in tensors.items():
            writer.add(f"{module}.{kind}", tensor)
    progress(len(names), len(names), "writing")


def _check_scale(module: str, scale: torch.Tensor) -> None:
    """Rounding to float16 may overflow, or leave nothing."""
    if not bool((scale.isfinite() & (scale > 0)).all()):
        raise UnsupportedError(
            f"tensor {module}.weight_scale holds a scale that is 0 or infinite in "
            f"{_name(scale.dtype)}, the dtype in which stock vLLM keeps it; calibrate "
            "the base model in bfloat16"
        )


def _card(writer: CheckpointWriter, source: LowbitSource, layout: Layout) -> ExportCard:
    made = source.config.provenance
    assert made is not None  # verified
    return ExportCard(
        name=writer.directory.name,
        base_model=made.base_model,
        base_revision=made.base_revision,
        base=base_metadata(source.directory),
        config=source.config,
        method=FORMATS[0],
        format=layout.name,
        scale_dtype=_name(TORCH_DTYPES[layout.scale_dtype]),
        exported_from=source.directory.resolve().name,
        versions={package: version(package) for package in PACKAGES},
    )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
