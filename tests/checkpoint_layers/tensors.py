# SPDX-License-Identifier: Apache-2.0
"""Tensors of a layer as a checkpoint has them, their loading and their shards."""

from typing import Any

import torch

from vllm_lowbit.kernels.grid import IntGrid
from vllm_lowbit.kernels.packing import pack
from vllm_lowbit.kernels.quantize_weight.reference import quantize_weight
from vllm_lowbit.schema import Weights

HIDDEN, INTERMEDIATE, VOCAB = 384, 192, 100


def quantized(n: int, k: int, weights: Weights) -> dict[str, torch.Tensor]:
    """Tensors of a random matrix as a checkpoint has them, and its codes."""
    grid = IntGrid(weights.bits, weights.symmetric)
    codes, scale, zero_point = quantize_weight(
        torch.randn(n, k), grid, weights.group_size
    )
    tensors = {"weight_packed": pack(codes, weights.bits), "weight_scale": scale}
    if not weights.symmetric:
        tensors["weight_zero_point"] = zero_point.char()
    return {**tensors, "codes": codes}


def load(layer: Any, tensors: dict[str, torch.Tensor], *shard: Any) -> None:
    for name, parameter in layer.named_parameters():
        if name in tensors:
            parameter.weight_loader(parameter, tensors[name], *shard)


KINDS = ("codes", "weight_scale", "weight_zero_point")


def stacked(parts: list[dict[str, torch.Tensor]]) -> list[torch.Tensor | None]:
    """Codes, scale and zero point (None when symmetric) of parts that are fused."""
    return [
        torch.cat([part[kind] for part in parts]) if kind in parts[0] else None
        for kind in KINDS
    ]


def cut(tensors: dict[str, torch.Tensor], dim: int, rank: int) -> dict[str, Any]:
    """The half of a rank; what has no groups is not cut along the inputs."""
    return {
        kind: tensors[kind].chunk(2, dim)[rank]
        if dim == 0 or tensors[kind].shape[1] > 1
        else tensors[kind]
        for kind in KINDS
        if kind in tensors
    }
