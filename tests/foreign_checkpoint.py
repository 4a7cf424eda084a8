# SPDX-License-Identifier: Apache-2.0
"""Checkpoints as compressed-tensors, GPTQ and AWQ tools write them.

The first are packed by the library itself, the others by code that shares nothing with
what reads them. Loaded by the fixture of the same name.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from compressed_tensors.compressors.pack_quantized import pack_to_int32
from compressed_tensors.quantization import QuantizationConfig
from safetensors.torch import load_file, save_file

WEIGHTS = "model.safetensors"


def _rounded(
    weight: torch.Tensor, bits: int, symmetric: bool, group_size: int | None
) -> Any:
    """Unsigned fields ``[n, k]``, fp16 scales and zero points ``[n, groups]``."""
    middle, top = 1 << (bits - 1), (1 << bits) - 1
    groups = weight.double().unflatten(1, (-1, group_size or weight.shape[1]))
    low, high = groups.amin(2).clamp(max=0), groups.amax(2).clamp(min=0)
    if symmetric:
        high = (-low).maximum(high)
        low = -high
    scale = ((high - low) / top).half()
    zero = (-low / scale).round().clamp(1, top)
    zero = zero * 0 + middle if symmetric else zero
    fields = (groups / scale.unsqueeze(2)).round() + zero.unsqueeze(2)
    return fields.clamp(0, top).flatten(1).long(), scale, zero.long()


def _words(fields: torch.Tensor, bits: int, order: Any = None) -> torch.Tensor:
    """int32 words along the last dimension, ``order[i]`` of every few at place i."""
    order = range(32 // bits) if order is None else order
    parts = [fields[..., p :: len(order)] << bits * i for i, p in enumerate(order)]
    return torch.stack(parts).sum(0).to(torch.int32)


def _tensors(
    weight: torch.Tensor, kind: str, bits: int, symmetric: bool, group_size: int | None
) -> dict[str, torch.Tensor]:
    """Tensors of one linear as the other tools write them."""
    fields, scale, zero = _rounded(weight, bits, symmetric, group_size)
    middle = 1 << (bits - 1)
    codes, zero_codes = (fields - middle).char(), (zero - middle).char()
    if kind == "awq":
        order = (0, 2, 4, 6, 1, 3, 5, 7)
        found = {"qweight": _words(fields.t(), bits, order)}
        return {**found, "qzeros": _words(zero.t(), bits, order), "scales": scale.t()}
    if kind in ("gptq", "gptq_v2"):
        found = {"qweight": _words(fields, bits).t(), "scales": scale.t()}
        size = group_size or weight.shape[1]
        found["g_idx"] = torch.arange(weight.shape[1], dtype=torch.int32) // size
        return {**found, "qzeros": _words(zero.t() - int(kind == "gptq"), bits)}
    packed = kind == "pack-quantized"
    found = {"weight_scale": scale, "weight": codes}
    if packed:
        del found["weight"]
        found["weight_packed"] = pack_to_int32(codes, bits)
        found["weight_shape"] = torch.tensor(codes.shape)
    if not symmetric:
        zeros = pack_to_int32(zero_codes, bits, packed_dim=0) if packed else zero_codes
        found["weight_zero_point"] = zeros
    return found


def _config(
    kind: str, bits: int, symmetric: bool, group_size: int | None, inputs: Any
) -> dict[str, Any]:
    common = {"bits": bits, "group_size": group_size or -1}
    if kind == "awq":
        more = {"zero_point": not symmetric, "version": "gemm"}
        return {**common, **more, "quant_method": "awq", "modules_to_not_convert": None}
    if kind in ("gptq", "gptq_v2"):
        more = {"sym": symmetric, "desc_act": False, "checkpoint_format": kind}
        more |= {"damp_percent": 0.01, "meta": {"quantizer": ["gptqmodel:2.0"]}}
        return {**common, **more, "quant_method": "gptq", "lm_head": False}
    weights = {"num_bits": bits, "symmetric": symmetric, "group_size": group_size}
    weights["strategy"] = "group" if group_size else "channel"
    if inputs is not None:
        inputs = {"num_bits": inputs, "strategy": "token", "dynamic": True}
    group = {"targets": ["Linear"], "weights": weights, "input_activations": inputs}
    config = QuantizationConfig(
        config_groups={"group_0": group},
        format=kind,
        quantization_status="compressed",
        ignore=["lm_head"],
    ).model_dump(mode="json")
    return {**config, "version": "0.17.0"}


def foreign_checkpoint(
    directory: Path,
    source: Path | str,
    kind: str,
    bits: int = 4,
    symmetric: bool = True,
    group_size: int | None = None,
    activations: int | None = None,
) -> Path:
    """Write a plain checkpoint anew as another tool would, rounded to nearest.

    Args:
        directory: to write.
        source: plain checkpoint in one file.
        kind: ``pack-quantized``, ``int-quantized``, ``gptq``, ``gptq_v2`` or ``awq``.
        bits: of the weights.
        symmetric: weights without zero points.
        group_size: inputs that share a scale, None for all.
        activations: bits of the inputs, of compressed-tensors only; None is 16.

    Returns:
        The directory.
    """
    tensors = {}
    for name, tensor in load_file(Path(source) / WEIGHTS).items():
        module, _, suffix = name.rpartition(".")
        if suffix == "weight" and module.endswith("_proj"):
            found = _tensors(tensor, kind, bits, symmetric, group_size)
            tensors |= {f"{module}.{part}": t for part, t in found.items()}
        else:
            tensors[name] = tensor
    directory.mkdir(parents=True, exist_ok=True)
    save_file({n: t.contiguous() for n, t in tensors.items()}, directory / WEIGHTS)
    hf_config = json.loads((Path(source) / "config.json").read_text())
    hf_config["quantization_config"] = _config(
        kind, bits, symmetric, group_size, activations
    )
    (directory / "config.json").write_text(json.dumps(hf_config))
    for path in Path(source).glob("tokenizer*"):
        shutil.copy(path, directory)
    return directory
