# SPDX-License-Identifier: Apache-2.0
"""The model with random weights, written once in bf16 and once for each stock arm."""

import json
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import safe_open

from vllm_lowbit.architecture import ModelShape
from vllm_lowbit.calibrate.compressed import layout_of, quantization_config
from vllm_lowbit.calibrate.writer import CheckpointWriter
from vllm_lowbit.checkpoint import TensorSpec
from vllm_lowbit.kernels.grid import IntGrid
from vllm_lowbit.kernels.packing import pack
from vllm_lowbit.lowbit_checkpoint import PackedWeight
from vllm_lowbit.schema import scheme_from_name

from .options import TINY, Options

# Its tokenizer only turns the random prompts of `vllm bench` into token ids.
TOKENIZER = Path(__file__).parents[2] / "models" / "ref-7m"
STANDARD_DEVIATION = 0.02


def bf16_checkpoint(options: Options) -> Path:
    """Directory of the bf16 checkpoint, written when it is not there."""
    directory = options.cache / options.model_name / "bf16"
    return _written(directory, options.model)


def tiny_checkpoint(options: Options) -> Path:
    """One whose weights take next to no memory, with the head size of the model."""
    return _written(options.cache / "baseline" / "bf16", TINY)


def stock_checkpoint(options: Options, scheme: str) -> Path:
    """The compressed-tensors checkpoint of the same weights, rounded to nearest.

    Args:
        scheme: ``w4a16-g128`` or ``w8a8``, whose activations are symmetric in stock
            vLLM.
    """
    directory = options.cache / options.model_name / scheme
    if _is_there(directory, options.model):
        return directory
    source = bf16_checkpoint(options)
    parsed = scheme_from_name(scheme, activations_symmetric=True)
    layout = layout_of(parsed, "BF16")
    specs: dict[str, TensorSpec] = {}
    for name, shape in _shape(options.model).tensors().items():
        if "_proj" in name:
            module = name.removesuffix(".weight")
            parts = layout.specs(shape[0], shape[1])
            specs |= {f"{module}.{kind}": spec for kind, spec in parts.items()}
        else:
            specs[name] = TensorSpec(("BF16",), shape)
    grid, size = IntGrid(parsed.weights.bits), parsed.weights.group_size
    with CheckpointWriter(directory, specs) as writer:
        for name, tensor in tensors(source):
            if "_proj" not in name:
                writer.add(name, tensor)
                continue
            codes, scale = round_to_nearest(tensor, grid, size)
            packed = pack(codes, 4) if grid.bits == 4 else codes
            made = layout.tensors(PackedWeight(packed, scale, None), codes)
            for kind, part in made.items():
                writer.add(f"{name.removesuffix('weight')}{kind}", part)
        writer.copy_companions(TOKENIZER)
        quantization = quantization_config(parsed, layout.name)
        config = options.model | {"quantization_config": quantization}
        writer.commit(config, manifest=False)
    return directory


def round_to_nearest(
    weight: torch.Tensor, grid: IntGrid, group_size: int | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """int8 codes ``[n, k]`` and float32 scales ``[n, groups]`` of ``[n, k]``."""
    rows = weight.unflatten(-1, (-1, group_size or weight.shape[1]))
    codes, scale, _ = grid.quantize(rows)
    return codes.flatten(1), scale.squeeze(-1)


def _written(directory: Path, config: dict[str, object]) -> Path:
    if _is_there(directory, config):
        return directory
    directory.parent.mkdir(parents=True, exist_ok=True)
    specs = {
        name: TensorSpec(("BF16",), shape)
        for name, shape in _shape(config).tensors().items()
    }
    generator = torch.Generator().manual_seed(0)
    with CheckpointWriter(directory, specs) as writer:
        for name, spec in specs.items():
            if len(spec.shape) == 1:
                tensor = torch.ones(spec.shape)
            else:
                tensor = torch.randn(spec.shape, generator=generator)
                tensor.mul_(STANDARD_DEVIATION)
            writer.add(name, tensor.bfloat16())
        writer.copy_companions(TOKENIZER)
        writer.commit(config, manifest=False)
    return directory


def _is_there(directory: Path, config: dict[str, object]) -> bool:
    file = directory / "config.json"
    if not file.is_file():
        return False
    found = json.loads(file.read_text())
    if {key: found.get(key) for key in config} != config:
        raise RuntimeError(f"{directory} holds another model; remove it")
    return True


def tensors(directory: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """Name and tensor of all that a checkpoint holds, one at a time."""
    for path in sorted(directory.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118 (it is no mapping)
                yield name, file.get_tensor(name)


def _shape(config: dict[str, object]) -> ModelShape:
    return ModelShape.from_config(config, "config")
