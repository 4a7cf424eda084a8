# SPDX-License-Identifier: Apache-2.0
"""What a layer of vLLM keeps and computes with the GPU's kernels, against ``generic``.

Activations are quantized by the kernels of the CPU here: an op follows its tensors.
"""

import pytest
import torch

from vllm_lowbit.kernels.grid import IntGrid
from vllm_lowbit.linear_kernels import GenericLinear, LinearSpec, TritonLinear


def quantized(
    grid: IntGrid, n: int, k: int, group_size: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    weight = torch.randn(n, k).unflatten(1, (-1, group_size or k))
    codes, scale, zero = grid.quantize(weight)
    zero_point = None if grid.symmetric else zero.squeeze(-1)
    return codes.flatten(1), scale.squeeze(-1), zero_point


@pytest.mark.parametrize("activation_bits", [None, 4, 8])
@pytest.mark.parametrize("bits", [2, 3, 4, 6, 8])
@pytest.mark.parametrize("group_size", [0, 128])
@pytest.mark.parametrize("symmetric", [True, False])
def test_as_the_generic_backend(
    activation_bits: int | None, bits: int, group_size: int, symmetric: bool
) -> None:
    n, k = 24, 256
    grid = IntGrid(bits, symmetric)
    activations = None
    if activation_bits is not None:
        activations = IntGrid(activation_bits, symmetric)
    spec = LinearSpec(n, k, grid, activations, order=64)
    weights = quantized(grid, n, k, group_size)
    x = torch.randn(5, k).half()
    bias, input_scale = torch.randn(n), torch.rand(k) + 0.5
    outputs = []
    for kind in (GenericLinear, TritonLinear):
        layer = torch.nn.Module()
        kernel = kind(spec)
        kernel.keep(layer, *weights)
        outputs.append(kernel.multiply(layer, x, input_scale, bias, torch.float32))
    generic, actual = outputs
    # Weight-only: the rotated activations are rounded to float16 first.
    bound = 2e-3 if activations is None else 1e-6
    assert (actual - generic).abs().max() <= bound * generic.abs().max()


def test_rows_of_a_vocabulary() -> None:
    grid = IntGrid(8)
    weights = quantized(grid, 40, 200, 0)
    kernel, layer = TritonLinear(LinearSpec(40, 200, grid)), torch.nn.Module()
    kernel.keep(layer, *weights)
    index = torch.tensor([39, 0, 7, 7])
    expected = weights[0][index].float() * weights[1][index]
    assert torch.equal(kernel.rows(layer, index), expected)
