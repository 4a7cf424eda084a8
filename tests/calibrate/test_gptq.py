# SPDX-License-Identifier: Apache-2.0
"""GPTQ and GPTAQ against their own definitions, computed the slow way."""

import pytest
import torch

from vllm_lowbit.calibrate.gptq import Compensation, GPTQOptions, Hessian, gptq
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


def _gptq(
    weight: torch.Tensor,
    hessian: torch.Tensor,
    grid: IntGrid,
    group_size: int | None,
    options: GPTQOptions,
    name: str = "w",
    drift: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """From sums, which are kept."""
    sums = Hessian(len(hessian), hessian.device)
    sums.sum, sums.drift = hessian.clone(), None if drift is None else drift.clone()
    compensation = Compensation.of(sums, options, name)
    return gptq(weight, compensation, grid, group_size, options.block_size)


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
    codes, _, _ = _gptq(weight, _hessian(x), grid, group_size, options)
    expected = _by_definition(weight, _hessian(x), grid, group_size)
    # float32 updates may round a tie the other way, which moves later codes.
    assert (codes != expected).float().mean() < 0.005


def _asymmetric_by_definition(
    weight: torch.Tensor,
    x: torch.Tensor,
    plain: torch.Tensor,
    grid: IntGrid,
    correction: float,
) -> torch.Tensor:
    """Each column's error and drift left to those after it, by least squares.

    Li et al., eq. 8, on the inputs themselves: rows below them damp the change.
    """
    _, scale, zero_point = quantize_weight(weight, grid, None)
    x, plain, rest = x.double(), plain.double(), weight.double()
    damp = (DAMPING * x.square().sum(dim=0).mean()).sqrt()
    codes = []
    for i in range(weight.shape[1]):
        codes.append(grid.encode(rest[:, i], scale[:, 0], zero_point[:, 0]))
        done = decode(codes[-1], scale[:, 0], zero_point[:, 0]).double()
        after = x[:, i + 1 :]
        wanted = correction * torch.outer(plain[:, i] - x[:, i], rest[:, i])
        wanted -= torch.outer(x[:, i], done - rest[:, i])
        ridge = damp * torch.eye(after.shape[1], dtype=torch.float64)
        system = torch.cat((after, ridge))
        wanted = torch.cat((wanted, wanted.new_zeros(len(ridge), len(weight))))
        if len(ridge):
            rest = rest.clone()
            rest[:, i + 1 :] += torch.linalg.lstsq(system, wanted).solution.t()
    return torch.stack(codes, dim=1)


def _drifted(x: torch.Tensor) -> torch.Tensor:
    """Float inputs of which x are the quantized ones, as far as a mix of columns."""
    generator = torch.Generator().manual_seed(5)
    mix = torch.randn(x.shape[1], x.shape[1], generator=generator) * 0.02
    return x + x @ mix


@pytest.mark.parametrize("block_size", [1, 7, 128])
@pytest.mark.parametrize("correction", [0.25, 1.0])
def test_drift_is_handed_on_by_least_squares(
    block_size: int, correction: float
) -> None:
    x, weight, grid = _inputs(300, 64), _weight(20, 64), IntGrid(4)
    plain, hessian = _drifted(x), Hessian(64, x.device)
    hessian.add(x, plain)
    options = GPTQOptions(DAMPING, block_size, correction=correction)
    codes, _, _ = _gptq(weight, hessian.sum, grid, None, options, "w", hessian.drift)
    expected = _asymmetric_by_definition(weight, x, plain, grid, correction)
    assert (codes != expected).float().mean() < 0.01


@pytest.mark.parametrize("act_order", [False, True])
def test_float_outputs_are_met_better_than_without_the_drift(act_order: bool) -> None:
    x, weight, grid = _inputs(2000, 128), _weight(64, 128), IntGrid(4)
    plain, hessian = _drifted(x), Hessian(128, x.device)
    for part, plain_part in zip(x.split(700), plain.split(700), strict=True):
        hessian.add(part, plain_part)
    options = GPTQOptions(DAMPING, act_order=act_order, correction=1.0)

    def error(drift: torch.Tensor | None) -> float:
        done = _gptq(weight, hessian.sum, grid, None, options, "w", drift)
        return float((x @ _decoded(*done).t() - plain @ weight.t()).square().mean())

    assert error(hessian.drift) < 0.75 * error(None)


def test_inputs_without_drift_make_it_gptq() -> None:
    x, weight, grid = _inputs(300, 64), _weight(10, 64), IntGrid(3, symmetric=False)
    hessian = Hessian(64, x.device)
    hessian.add(x, x)
    done = _gptq(weight, hessian.sum, grid, 32, GPTQOptions(), "w", hessian.drift)
    for ours, expected in zip(
        done, _gptq(weight, hessian.sum, grid, 32, GPTQOptions()), strict=True
    ):
        assert torch.equal(ours, expected)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("act_order", [False, True])
def test_outputs_change_less_than_by_rounding(bits: int, act_order: bool) -> None:
    x, weight = _inputs(400, 128), _weight(64, 128)
    grid = IntGrid(bits, symmetric=bits > 3)

    def error(done: tuple[torch.Tensor, torch.Tensor, torch.Tensor]) -> float:
        return float((x @ (_decoded(*done) - weight).t()).square().mean())

    options = GPTQOptions(DAMPING, act_order=act_order)
    ours = error(_gptq(weight, _hessian(x), grid, None, options))
    assert ours < 0.75 * error(quantize_weight(weight, grid, None))


def test_order_of_columns_only_changes_when_they_are_rounded() -> None:
    x, weight, grid = _inputs(300, 64), _weight(10, 64), IntGrid(4)
    hessian = _hessian(x)
    order = torch.argsort(hessian.diagonal(), descending=True, stable=True)
    in_order = _gptq(
        weight[:, order], hessian[order][:, order], grid, None, GPTQOptions(), "w"
    )
    by_option = _gptq(weight, hessian, grid, None, GPTQOptions(act_order=True))
    assert torch.equal(by_option[0][:, order], in_order[0])
    assert torch.equal(by_option[1], in_order[1])


@pytest.mark.parametrize("group_size", [None, 16])
def test_uncorrelated_inputs_are_rounded_to_nearest(group_size: int | None) -> None:
    weight, grid = _weight(9, 48), IntGrid(4, symmetric=False)
    hessian = torch.diag(torch.rand(48, dtype=torch.float64) + 0.5)
    done = _gptq(weight, hessian, grid, group_size, GPTQOptions())
    for ours, expected in zip(
        done, quantize_weight(weight, grid, group_size), strict=True
    ):
        assert torch.equal(ours, expected)


def test_inputs_that_are_always_zero_are_rounded_on_their_own() -> None:
    x, weight, grid = _inputs(200, 32), _weight(8, 32), IntGrid(4)
    x[:, 5] = 0
    codes, _, _ = _gptq(weight, _hessian(x), grid, None, GPTQOptions())
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
        _gptq(_weight(2, 4), hessian, IntGrid(4), None, GPTQOptions(), "q_proj")


def test_indefinite_hessian_is_refused_by_name() -> None:
    hessian = torch.tensor([[1.0, 5.0], [5.0, 1.0]], dtype=torch.float64)
    with pytest.raises(CalibrationError, match=r"linear o_proj: .*weights\.damping"):
        _gptq(_weight(2, 2), hessian, IntGrid(4), None, GPTQOptions(), "o_proj")
