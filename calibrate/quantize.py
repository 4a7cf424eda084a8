# SPDX-License-Identifier: Apache-2.0
"""Quantizing one matrix and writing it, for linears and the vocabulary."""

from collections.abc import Callable

import torch

from ..kernels.grid import IntGrid, decode
from ..kernels.packing import pack
from ..kernels.quantize_weight.reference import quantize_weight
from ..schema import Scheme, Weights
from .gptq import GPTQOptions, Hessian, gptq
from .recipe import WeightMethod

Quantized = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
Add = Callable[[str, torch.Tensor], None]


def quantize_matrix(
    add: Add, name: str, weight: torch.Tensor, weights: Weights
) -> torch.Tensor:
    """Round a matrix to nearest on its own, and write it.

    Args:
        add: takes each tensor that is stored, by name.
        name: of the module, without ``.weight``.
        weight: ``[n, k]``, float.
        weights: the grid.

    Returns:
        the matrix as it will be served, float32 ``[n, k]``.
    """
    grid = IntGrid(weights.bits, weights.symmetric)
    done = quantize_weight(weight.float(), grid, weights.group_size)
    return _store(add, name, grid, done)


def quantize_linear(
    add: Add,
    name: str,
    weight: torch.Tensor,
    scheme: Scheme,
    recipe: WeightMethod,
    hessian: Hessian | None,
) -> torch.Tensor:
    """Quantize a linear as the recipe says; as :func:`quantize_matrix`.

    Args:
        hessian: of its inputs, for ``gptq``.
    """
    weights = scheme.weights
    if hessian is None:
        return quantize_matrix(add, name, weight, weights)
    options = GPTQOptions(recipe.damping, recipe.block_size, recipe.act_order)
    grid = IntGrid(weights.bits, weights.symmetric)
    done = gptq(weight.float(), hessian.sum, grid, weights.group_size, options, name)
    return _store(add, name, grid, done)


def _store(add: Add, name: str, grid: IntGrid, done: Quantized) -> torch.Tensor:
    codes, scale, zero_point = done
    add(f"{name}.weight_packed", pack(codes, grid.bits))
    add(f"{name}.weight_scale", scale)
    if not grid.symmetric:
        add(f"{name}.weight_zero_point", zero_point.to(torch.int8))
    grouped = codes.unflatten(-1, (scale.shape[1], -1))
    return decode(grouped, scale.unsqueeze(-1), zero_point.unsqueeze(-1)).flatten(-2)
