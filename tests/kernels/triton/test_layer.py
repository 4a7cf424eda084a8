# SPDX-License-Identifier: Apache-2.0
"""What a layer of vLLM keeps and computes with the GPU's kernels, against ``generic``.

Activations are quantized by the kernels of the CPU here: an op follows its tensors.
"""

from typing import Any

import pytest
import torch

from vllm_lowbit import linear_kernels, load_time
from vllm_lowbit.expert_kernels import TritonExperts
from vllm_lowbit.kernels.grid import IntGrid
from vllm_lowbit.kernels.implementations import IMPLEMENTATIONS
from vllm_lowbit.linear_kernels import GenericLinear, LinearSpec, TritonLinear
from vllm_lowbit.load_time import LinearRotations
from vllm_lowbit.schema import Rotation, Weights


def quantized(
    grid: IntGrid, n: int, k: int, group_size: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    weight = torch.randn(n, k).unflatten(1, (-1, group_size or k))
    codes, scale, zero = grid.quantize(weight)
    zero_point = None if grid.symmetric else zero.squeeze(-1)
    return codes.flatten(1), scale.squeeze(-1), zero_point


@pytest.mark.parametrize("activation_bits", [None, 4, 8])
@pytest.mark.parametrize("bits", [2, 3, 4, 6, 8])
@pytest.mark.parametrize(
    ("group_size", "of_inputs"), [(0, None), (128, None), (128, 128)]
)
@pytest.mark.parametrize("symmetric", [True, False])
def test_as_the_generic_backend(
    activation_bits: int | None,
    bits: int,
    group_size: int,
    of_inputs: int | None,
    symmetric: bool,
) -> None:
    n, k = 24, 256
    grid = IntGrid(bits, symmetric)
    activations = None
    if activation_bits is not None:
        activations = IntGrid(activation_bits, symmetric, group_size=of_inputs)
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


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_vocabulary_inside_a_rotation(dtype: torch.dtype) -> None:
    """Its input is float32, which no matrix unit takes."""
    grid = IntGrid(8)
    kernel, layer = TritonLinear(LinearSpec(40, 128, grid)), torch.nn.Module()
    codes, scale, _ = quantized(grid, 40, 128, 0)
    kernel.keep(layer, codes, scale, None)
    x = torch.randn(3, 128)
    out = kernel.multiply(layer, x, None, None, dtype)
    expected = x @ (codes.float() * scale).t()
    assert out.dtype == dtype
    assert (out.float() - expected).abs().max() <= 0.02 * expected.abs().max()


def test_a_weight_that_a_chip_has_no_memory_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It is refused while it loads, not by the first batch of some size."""
    k, grid = 2048, IntGrid(4)
    spec, layer = LinearSpec(8, k, grid), torch.nn.Module()
    codes, scale = torch.zeros(8, k, dtype=torch.int8), torch.ones(8, 2)
    TritonLinear(spec).keep(layer, codes, scale, None)
    monkeypatch.setattr(linear_kernels, "architecture", lambda device: "sm_86")
    for keep in (
        TritonLinear(spec).keep,
        lambda *weight: TritonExperts(spec, "up").keep(
            weight[0], weight[1][None], weight[2][None], None
        ),
    ):
        with pytest.raises(ValueError, match="groups of 1024 and .* sm_86 has 101376"):
            keep(torch.nn.Module(), codes, scale, None)


@pytest.mark.parametrize("group_size", [None, 32])
def test_quantized_while_loading(
    group_size: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the transform of a GPU: another rounding now and then, nothing else."""
    weight = torch.randn(80, 128).bfloat16()
    around = LinearRotations(
        Rotation(apply="folded", order=32, block=32),
        Rotation(apply="online", order=4, block=128, scaled=True),
        Rotation(apply="folded", order=16, block=16),
    )
    arguments = [80], [around], Weights(bits=4, group_size=group_size)
    expected = load_time.quantize_linear(weight, *arguments)

    def on_gpu(operator: str, device: str) -> Any:
        backend = {"hadamard": "triton", "quantize_weight": "generic"}[operator]
        return IMPLEMENTATIONS[operator, backend]

    monkeypatch.setattr(load_time, "implementation", on_gpu)
    actual = load_time.quantize_linear(weight, *arguments)
    assert torch.equal(actual.input_scale, expected.input_scale)
    moved = (actual.codes.int() - expected.codes.int()).abs()
    assert moved.float().mean() < 0.02
    ratio = actual.scale / expected.scale
    # The clip search may take the next of its 16 ratios where two are as good.
    assert ((ratio - 1).abs() < 1e-3).float().mean() > 0.95


def test_rows_of_a_vocabulary() -> None:
    grid = IntGrid(8)
    weights = quantized(grid, 40, 200, 0)
    kernel, layer = TritonLinear(LinearSpec(40, 200, grid)), torch.nn.Module()
    kernel.keep(layer, *weights)
    index = torch.tensor([39, 0, 7, 7])
    expected = weights[0][index].float() * weights[1][index]
    assert torch.equal(kernel.rows(layer, index), expected)
