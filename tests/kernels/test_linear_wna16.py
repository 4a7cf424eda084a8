# SPDX-License-Identifier: Apache-2.0
"""The weight-only linear against its float64 definition and a float32 GEMM."""

from collections.abc import Callable

import pytest
import torch

from vllm_lowbit.kernels.grid import IntGrid, decode
from vllm_lowbit.kernels.linear_w4a4.generic import prepare
from vllm_lowbit.kernels.linear_wna16 import generic, reference
from vllm_lowbit.kernels.quantize_weight.reference import quantize_weight

Weight = tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]


def weight_of(grid: IntGrid, n: int, k: int, group_size: int | None) -> Weight:
    codes, scale, zero_point = quantize_weight(torch.randn(n, k) / 30, grid, group_size)
    return codes, scale, None if grid.symmetric else zero_point


def run_generic(
    x: torch.Tensor,
    weight: Weight,
    bias: torch.Tensor | None,
    grid: IntGrid,
    dtype: torch.dtype,
) -> torch.Tensor:
    codes, scale, zero_point = weight
    prepared = prepare(codes, zero_point)
    return generic.linear_wna16(x, prepared, scale, bias, grid.max_difference, dtype)


def dequantized(weight: Weight) -> torch.Tensor:
    """The float64 weight, decoded group by group."""
    codes, scale, zero_point = weight
    n, groups = scale.shape
    zero = torch.zeros(n, groups) if zero_point is None else zero_point
    parts = (codes.double().view(n, groups, -1) - zero.unsqueeze(-1)).double()
    return (parts * scale.double().unsqueeze(-1)).view(n, -1)


@pytest.mark.parametrize("bits", [2, 3, 4, 6, 8])
@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "affine"])
@pytest.mark.parametrize("group_size", [64, 128, None])
def test_against_reference(bits: int, symmetric: bool, group_size: int | None) -> None:
    """The error is that of rounding x to 22 bits, about what a float32 GEMM loses."""
    grid = IntGrid(bits, symmetric)
    weight = weight_of(grid, 48, 1024, group_size)
    x = torch.randn(16, 1024) * torch.logspace(-4, 4, 16).unsqueeze(-1)
    bias = torch.randn(48)
    expected = reference.linear_wna16(x, *weight, bias, torch.float64)
    w = dequantized(weight)
    torch.testing.assert_close(
        expected, x.double() @ w.t() + bias.double(), rtol=1e-12, atol=1e-12
    )
    actual = run_generic(x, weight, bias, grid, torch.float64)
    error = (actual - expected).abs()
    peak = x.double().abs().amax(-1, keepdim=True)
    # Half a unit, with the largest in [2^21, 2^22) units.
    assert (error <= peak * 2.0**-22 * w.abs().sum(-1) + 1e-12).all()
    in_float32 = torch.nn.functional.linear(x, w.float(), bias)
    float32_error = (in_float32 - expected).square().mean(-1).sqrt()
    assert (error.square().mean(-1).sqrt() < 4 * float32_error).all()


@pytest.mark.parametrize(("m", "n", "k"), [(1, 1, 1), (63, 1, 63), (1, 63, 1000)])
def test_ragged_sizes(m: int, n: int, k: int, dtype: torch.dtype) -> None:
    grid = IntGrid(4, False)
    weight = weight_of(grid, n, k, None)
    x = torch.randn(m, k).to(dtype)
    actual = run_generic(x, weight, None, grid, torch.float64)
    expected = reference.linear_wna16(x, *weight, None, torch.float64)
    assert actual.shape == (m, n)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-6)
    assert run_generic(x[:0], weight, None, grid, dtype).shape == (0, n)


def test_output_type_and_bias(dtype: torch.dtype) -> None:
    """The bias is added before the one rounding to the output type, whose own bits say
    how many the fixed point has."""
    grid = IntGrid(4)
    weight = weight_of(grid, 24, 128, 64)
    x, bias = torch.randn(5, 128).to(dtype), (100 * torch.randn(24)).to(dtype)
    out = run_generic(x, weight, bias, grid, dtype)
    assert out.dtype == dtype
    exact = reference.linear_wna16(x, *weight, bias, torch.float64)
    step = 1 / (2 * generic.HALF_MAX) if dtype == torch.bfloat16 else 2.0**-22
    rounding = exact.abs() * torch.finfo(dtype).eps / 2
    # Every input is off by half a step of its token's largest at most.
    w = dequantized(weight).abs().sum(-1)
    bound = rounding * 1.01 + x.double().abs().amax(-1, keepdim=True) * step * w
    assert ((out.double() - exact).abs() <= bound).all()
    wide = run_generic(x, weight, bias, grid, torch.float64)
    without = run_generic(x, weight, None, grid, torch.float64)
    torch.testing.assert_close(without + bias.double(), wide)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_results_lose_less_than_their_own_rounding(dtype: torch.dtype) -> None:
    """Also for a token with an input that stands out."""
    grid = IntGrid(8)
    weight = weight_of(grid, 64, 2048, None)
    x = torch.randn(8, 2048)
    x[:, 5] *= 40
    x = x.to(dtype)
    exact = reference.linear_wna16(x, *weight, None, torch.float64)
    out = run_generic(x, weight, None, grid, dtype).double()
    rounded = exact.to(dtype).double()
    size = exact.square().mean(-1).sqrt()
    lost, own = ((t - exact).square().mean(-1).sqrt() / size for t in (out, rounded))
    assert (lost < 1.25 * own).all()


def test_zero_input_is_the_bias() -> None:
    grid = IntGrid(3, False)
    weight, bias = weight_of(grid, 8, 64, None), torch.randn(8)
    out = run_generic(torch.zeros(2, 64), weight, bias, grid, torch.float32)
    assert torch.equal(out, bias.expand(2, -1))


@pytest.mark.parametrize("bad", [torch.inf, -torch.inf, torch.nan])
def test_non_finite_stays_in_its_row(bad: float) -> None:
    grid = IntGrid(4)
    weight = weight_of(grid, 8, 128, 64)
    x = torch.randn(3, 128)
    clean = run_generic(x, weight, None, grid, torch.float32)
    x[1, 70] = bad
    out = run_generic(x, weight, None, grid, torch.float32)
    assert not torch.isfinite(out[1]).any()
    assert torch.equal(out[[0, 2]], clean[[0, 2]])


@pytest.mark.parametrize(("bits", "group_size"), [(4, 128), (4, None), (2, 64)])
def test_rows_are_independent(
    bits: int,
    group_size: int | None,
    dtype: torch.dtype,
    assert_rows_independent: Callable[..., None],
) -> None:
    grid = IntGrid(bits, False)
    weight, bias = weight_of(grid, 96, 512, group_size), torch.randn(96)
    x = (torch.randn(257, 512) * torch.rand(257, 1)).to(dtype)
    # float64 shows a difference that a rounded output would hide.
    for out_dtype in (torch.float64, dtype):
        assert_rows_independent(
            lambda rows, o=out_dtype: run_generic(rows, weight, bias, grid, o), x
        )


def test_integer_operands_give_the_integer_product() -> None:
    """Unit scales and small integers: nothing is rounded, so nothing may differ."""
    grid = IntGrid(8)
    codes = torch.randint(-127, 128, (9, 256), dtype=torch.int8)
    x = torch.randint(-1000, 1001, (7, 256))
    weight = codes, torch.ones(9, 4), None
    out = run_generic(x.float(), weight, None, grid, torch.float64)
    assert torch.equal(out.long(), x @ codes.long().t())
    ones = torch.ones(9, 1)
    assert torch.equal(decode(codes, ones, torch.zeros(9, 1).int()), codes.float())


def test_length_whose_sums_cannot_be_exact() -> None:
    """For integers that no width here has: theirs end at 8 million columns."""
    weight, k = 1 << 20, (1 << (53 - 22 - 20)) + 1
    arguments = torch.zeros(1, k, dtype=torch.int32), torch.ones(1, 1), None
    x = torch.zeros(1, k)
    generic.linear_wna16(x, *arguments, weight - weight // 1024, torch.float32)
    with pytest.raises(ValueError, match="do not fit float64 exactly"):
        generic.linear_wna16(x, *arguments, weight, torch.float32)


@pytest.mark.parametrize(("columns", "groups"), [(10, 3), (12, 2)])
@pytest.mark.parametrize(
    "which",
    [
        "reference",
        pytest.param("generic"),
    ],
)
def test_shapes_that_do_not_fit(which: str, columns: int, groups: int) -> None:
    x, codes = torch.randn(1, columns), torch.ones(2, 10, dtype=torch.int8)
    weight = codes, torch.ones(2, groups), None
    message = f"activations have {columns} columns, the weight 10, in {groups} groups"
    with pytest.raises(ValueError, match=message):
        if which == "generic":
            run_generic(x, weight, None, IntGrid(4), torch.float32)
        else:
            reference.linear_wna16(x, *weight, None, torch.float32)
