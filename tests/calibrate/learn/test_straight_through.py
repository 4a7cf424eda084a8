# SPDX-License-Identifier: Apache-2.0
"""Forward is the serving grid; backward is the slope of the error."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from vllm_lowbit.calibrate.straight_through import fake_quantize, through_cache
from vllm_lowbit.kernels.grid import (
    IntGrid,
    decode,
    kv_decode,
    kv_encode,
    kv_parameters,
)

GRIDS = [
    IntGrid(4, False),
    IntGrid(4),
    IntGrid(2, False),
    IntGrid(8),
    IntGrid(6, False),
]


def _cache(x: torch.Tensor) -> torch.Tensor:
    scale, zero = kv_parameters(x)
    return kv_decode(kv_encode(x, scale, zero), scale, zero).float()


def _rows(seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(40, 24, generator=generator)
    x[1] = 0  # degenerate rows of every kind
    x[2] = 1.5
    x[3] = x[3].abs()
    x[4] = -x[4].abs() - 3
    x[5, 7] = 100
    return x


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("ratio", [1.0, 0.6])
def test_forward_is_the_grid(grid: IntGrid, ratio: float) -> None:
    x = _rows().requires_grad_()
    scale, zero_point = grid.parameters(x, ratio)
    expected = decode(grid.encode(x, scale, zero_point), scale, zero_point)
    assert torch.equal(fake_quantize(x, grid, ratio), expected)


@pytest.mark.parametrize("grid", GRIDS)
def test_groups_are_rows(grid: IntGrid) -> None:
    """Forward and backward, of the ratio too."""
    grouped, weight = replace(grid, group_size=8), torch.randn(40, 24)
    found = []
    for size in (24, 8):
        x = _rows().view(-1, size).requires_grad_()
        ratio = torch.tensor(0.75, requires_grad=True)
        values = fake_quantize(x, grouped if size == 24 else grid, ratio)
        (values * weight.view(-1, size)).sum().backward()
        assert x.grad is not None and ratio.grad is not None
        found.append((values.view(40, 24), x.grad.view(40, 24), ratio.grad))
    for of_groups, of_rows in zip(*found, strict=True):
        torch.testing.assert_close(of_groups, of_rows, rtol=1e-5, atol=1e-6)
    assert torch.equal(found[0][0], found[1][0])
    codes, scale, zero_point = grouped.quantize(_rows())
    parts = scale.unsqueeze(-1), zero_point.unsqueeze(-1)
    expected = decode(codes.unflatten(-1, (3, 8)), *parts).flatten(-2)
    assert torch.equal(fake_quantize(_rows(), grouped), expected)


def test_forward_is_the_cache() -> None:
    x = _rows().requires_grad_()
    assert torch.equal(through_cache(x), _cache(x.detach()))


def _by_autograd(
    x: torch.Tensor, quantized: torch.Tensor, scale: torch.Tensor
) -> torch.Tensor:
    """The formula of the module, from a scale that autograd follows."""
    error = ((quantized - x) / scale).detach()
    inside = error.abs() <= 1
    return torch.where(inside, x + error * scale, (quantized / scale).detach() * scale)


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("ratio", [1.0, 0.5])
def test_backward_follows_the_scale(grid: IntGrid, ratio: float) -> None:
    x, other = (_rows()[3:].clone().requires_grad_() for _ in range(2))
    weight = torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    (fake_quantize(x, grid, ratio) * weight).sum().backward()

    low, high = other.amin(-1, keepdim=True), other.amax(-1, keepdim=True)
    if grid.symmetric:
        scale = torch.maximum(high, -low) * ratio / grid.code_max
    else:
        spread = high.clamp(min=0) - low.clamp(max=0)
        scale = spread * ratio / (grid.code_max - grid.code_min)
    quantized = fake_quantize(other.detach(), grid, ratio)
    (_by_autograd(other, quantized, scale) * weight).sum().backward()
    assert x.grad is not None and other.grad is not None
    assert torch.allclose(x.grad, other.grad, atol=1e-4)


def test_backward_of_the_cache_follows_the_scale() -> None:
    x, other = (_rows()[3:].clone().requires_grad_() for _ in range(2))
    weight = torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    (through_cache(x) * weight).sum().backward()
    scale = (other.amax(-1, keepdim=True) - other.amin(-1, keepdim=True)) / 15
    quantized = through_cache(other.detach())
    (_by_autograd(other, quantized, scale) * weight).sum().backward()
    assert x.grad is not None and other.grad is not None
    # fp16 rounds the scale that the error is measured in.
    assert torch.allclose(x.grad, other.grad, atol=2e-3)


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("start", [0.9, 0.5])
def test_backward_of_the_ratio(grid: IntGrid, start: float) -> None:
    """That of the scale, whose elements beyond the range have their code as slope."""
    x = _rows()[3:].requires_grad_()
    weight = torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    ratio, other = (torch.tensor(start, requires_grad=True) for _ in range(2))
    (fake_quantize(x, grid, ratio) * weight).sum().backward()

    plain = x.detach()
    assert torch.equal(fake_quantize(x, grid, ratio), fake_quantize(plain, grid, start))
    scale, zero_point = grid.parameters(plain, start)
    steps = torch.round(plain * (1 / scale)) + zero_point
    beyond = (steps < grid.code_min) | (steps > grid.code_max)
    # Within half a step of the end of a coarse grid everything keeps its code.
    assert bool(beyond.any()) or start == 0.9
    quantized = decode(grid.encode(plain, scale, zero_point), scale, zero_point)
    slope = torch.where(beyond, quantized, quantized - plain) / scale
    (slope * (scale / start * other) * weight).sum().backward()
    assert ratio.grad is not None and other.grad is not None
    assert torch.allclose(ratio.grad, other.grad, rtol=1e-3)
    # The gradient of x is that of a ratio that is not learned.
    assert x.grad is not None
    again = plain.clone().requires_grad_()
    (fake_quantize(again, grid, start) * weight).sum().backward()
    assert again.grad is not None
    assert torch.allclose(x.grad, again.grad, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize(("bits", "start"), [(4, 0.6), (4, 0.75), (8, 0.9), (8, 0.6)])
def test_gradient_of_the_ratio_is_the_slope_of_the_error(
    bits: int, start: float, symmetric: bool
) -> None:
    """Over many rows, as a finite difference; x itself need not ask for a gradient."""
    grid = IntGrid(bits, symmetric)
    x = torch.randn(20000, 64, generator=torch.Generator().manual_seed(0))

    def error(ratio: torch.Tensor) -> torch.Tensor:
        return (fake_quantize(x, grid, ratio) - x).square().mean()

    ratio = torch.tensor(start, requires_grad=True)
    error(ratio).backward()
    with torch.no_grad():
        slope = (error(ratio + 0.01) - error(ratio - 0.01)) / 0.02
    assert float(slope) < -1e-3
    assert ratio.grad is not None
    assert float(ratio.grad) == pytest.approx(float(slope), rel=0.05)


def test_rows_without_a_range_have_finite_gradients() -> None:
    ratio = torch.tensor(0.9, requires_grad=True)
    grid = IntGrid(4, False)
    for quantize in (
        through_cache,
        lambda t: fake_quantize(t, grid),
        lambda t: fake_quantize(t, grid, ratio),
    ):
        x = torch.zeros(3, 8)
        x[1] = 2.0
        x.requires_grad_()
        quantize(x).sum().backward()
        assert x.grad is not None
        assert torch.isfinite(x.grad).all()
    # No ratio changes what such rows become.
    assert ratio.grad is not None and float(ratio.grad) == 0


@pytest.mark.parametrize("name", ["asymmetric", "symmetric", "cache"])
def test_gradient_is_that_of_the_error(name: str) -> None:
    """Over many rows the error is a smooth function of an outlier channel's size, and
    its slope is what backward says. The straight-through term alone would say 0."""
    functions: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
        "asymmetric": lambda t: fake_quantize(t, IntGrid(4, False)),
        "symmetric": lambda t: fake_quantize(t, IntGrid(4)),
        "cache": through_cache,
    }
    base = torch.randn(20000, 64, generator=torch.Generator().manual_seed(0))

    def error(size: torch.Tensor) -> torch.Tensor:
        x = torch.cat((base[:, :1] * size, base[:, 1:]), dim=1)
        return (functions[name](x) - x).square().mean()

    size = torch.tensor(5.0, requires_grad=True)
    error(size).backward()
    with torch.no_grad():
        slope = (error(size + 0.5) - error(size - 0.5)) / 1.0
    assert size.grad is not None
    assert float(slope) > 1e-3
    assert float(size.grad) == pytest.approx(float(slope), rel=0.05)
