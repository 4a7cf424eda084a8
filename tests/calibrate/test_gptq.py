# SPDX-License-Identifier: Apache-2.0
"""GPTQ against its own definition, computed the slow way."""

import pytest
import torch

from vllm_lowbit.calibrate.gptq import GPTQOptions, Hessian, gptq
from vllm_lowbit.errors import CalibrationError
from vllm_lowbit.kernels.grid import IntGrid, decode
from vllm_lowbit.kernels.quantize_weight.reference import quantize_weight

DAMPING = 0.01


def _inputs(tokens: int, columns: int, seed: int = 0) -> torch.Tensor:
    """Correlated, with columns of different sizes, as hidden states are."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(columns, columns, generator=generator)
    size = torch.rand(columns, generator=generator).add(0.1)
    return torch.randn(tokens, columns, generator=generator) @ mix * size


def _weight(rows: int, columns: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(99)
    return torch.randn(rows, columns, generator=generator)


def _hessian(x: torch.Tensor) -> torch.Tensor:
    hessian = Hessian(x.shape[1], x.device)
    hessian.add(x)
    return hessian.sum


def _decoded(
    codes: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor
) -> torch.Tensor:
    size = codes.shape[1] // scale.shape[1]
    spread = (t.repeat_interleave(size, dim=1) for t in (scale, zero_point))
    return decode(codes, *spread)


def _by_definition(
    weight: torch.Tensor, hessian: torch.Tensor, grid: IntGrid, group_size: int | None
) -> torch.Tensor:
    """Optimal brain quantization of the columns in order, float64 (Frantar, eq. 2)."""
    _, scale, zero_point = quantize_weight(weight, grid, group_size)
    size = weight.shape[1] if group_size is None else group_size
    damped = hessian + torch.eye(len(hessian)) * DAMPING * hessian.diagonal().mean()
    rest, codes = weight.double(), []
    for i in range(weight.shape[1]):
        inverse = torch.linalg.inv(damped[i:, i:])
        s, z = scale[:, i // size], zero_point[:, i // size]
        codes.append(grid.encode(rest[:, i], s, z))
        error = rest[:, i] - decode(codes[-1], s, z)
        rest = rest.clone()
        rest[:, i:] -= torch.outer(error, inverse[0] / inverse[0, 0])
    return torch.stack(codes, dim=1)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group_size", [None, 32])
@pytest.mark.parametrize("block_size", [1, 7, 128])
def test_equals_optimal_brain_quantization(
    symmetric: bool, group_size: int | None, block_size: int
) -> None:
    x, weight, grid = _inputs(300, 96), _weight(20, 96), IntGrid(4, symmetric)
    options = GPTQOptions(DAMPING, block_size)
    codes, _, _ = gptq(weight, _hessian(x), grid, group_size, options, "w")
    expected = _by_definition(weight, _hessian(x), grid, group_size)
    # float32 updates may round a tie the other way, which moves later codes.
    assert (codes != expected).float().mean() < 0.005


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("act_order", [False, True])
def test_outputs_change_less_than_by_rounding(bits: int, act_order: bool) -> None:
    x, weight = _inputs(400, 128), _weight(64, 128)
    grid = IntGrid(bits, symmetric=bits > 3)

    def error(done: tuple[torch.Tensor, torch.Tensor, torch.Tensor]) -> float:
        return float((x @ (_decoded(*done) - weight).t()).square().mean())

    options = GPTQOptions(DAMPING, act_order=act_order)
    ours = error(gptq(weight, _hessian(x), grid, None, options, "w"))
    assert ours < 0.75 * error(quantize_weight(weight, grid, None))


def test_order_of_columns_only_changes_when_they_are_rounded() -> None:
    x, weight, grid = _inputs(300, 64), _weight(10, 64), IntGrid(4)
    hessian = _hessian(x)
    order = torch.argsort(hessian.diagonal(), descending=True, stable=True)
    in_order = gptq(
        weight[:, order], hessian[order][:, order], grid, None, GPTQOptions(), "w"
    )
    by_option = gptq(weight, hessian, grid, None, GPTQOptions(act_order=True), "w")
    assert torch.equal(by_option[0][:, order], in_order[0])
    assert torch.equal(by_option[1], in_order[1])


@pytest.mark.parametrize("group_size", [None, 16])
def test_uncorrelated_inputs_are_rounded_to_nearest(group_size: int | None) -> None:
    weight, grid = _weight(9, 48), IntGrid(4, symmetric=False)
    hessian = torch.diag(torch.rand(48, dtype=torch.float64) + 0.5)
    done = gptq(weight, hessian, grid, group_size, GPTQOptions(), "w")
    for ours, expected in zip(
        done, quantize_weight(weight, grid, group_size), strict=True
    ):
        assert torch.equal(ours, expected)


def test_inputs_that_are_always_zero_are_rounded_on_their_own() -> None:
    x, weight, grid = _inputs(200, 32), _weight(8, 32), IntGrid(4)
    x[:, 5] = 0
    codes, _, _ = gptq(weight, _hessian(x), grid, None, GPTQOptions(), "w")
    expected, _, _ = quantize_weight(weight, grid, None)
    assert torch.equal(codes[:, 5], expected[:, 5])
    assert not torch.equal(codes, expected)


def test_hessian_adds_up_over_calls() -> None:
    x = _inputs(5000, 24).view(10, 500, 24)
    parts = Hessian(24, x.device)
    for part in x.split(3):
        parts.add(part)
    rows = x.flatten(0, 1).double()
    assert torch.allclose(parts.sum, rows.t() @ rows, rtol=1e-4, atol=1e-2)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_non_finite_inputs_are_refused_by_name(bad: float) -> None:
    hessian = torch.eye(4, dtype=torch.float64)
    hessian[1, 2] = bad
    with pytest.raises(CalibrationError, match=r"linear q_proj: .* Inf or NaN"):
        gptq(_weight(2, 4), hessian, IntGrid(4), None, GPTQOptions(), "q_proj")


def test_indefinite_hessian_is_refused_by_name() -> None:
    hessian = torch.tensor([[1.0, 5.0], [5.0, 1.0]], dtype=torch.float64)
    with pytest.raises(CalibrationError, match=r"linear o_proj: .*weights\.damping"):
        gptq(_weight(2, 2), hessian, IntGrid(4), None, GPTQOptions(), "o_proj")
