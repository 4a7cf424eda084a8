# SPDX-License-Identifier: Apache-2.0
"""Integer products by float GEMMs: exact at and around every bound."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_lowbit.kernels import exact
from vllm_lowbit.kernels.exact import exact_dtype, exact_matmul, fixed_point


def integer_matmul(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """``a @ b.T`` in int64."""
    product = a.numpy().astype(np.int64) @ b.numpy().astype(np.int64).T
    return torch.from_numpy(product)


def test_dtype_at_the_bounds() -> None:
    assert exact_dtype(0) == exact_dtype(1 << 24) == torch.float32
    assert exact_dtype((1 << 24) + 1) == exact_dtype(1 << 53) == torch.float64
    with pytest.raises(ValueError, match=f"up to {(1 << 53) + 1} do not fit float64"):
        exact_dtype((1 << 53) + 1)


@pytest.mark.parametrize("b_dtype", [torch.int8, torch.int16, torch.int32])
@pytest.mark.parametrize(("m", "n", "k"), [(1, 1, 1), (3, 5, 63), (17, 40, 1000)])
def test_equals_int64(m: int, n: int, k: int, b_dtype: torch.dtype) -> None:
    for limit in (7, 127):
        a = torch.randint(-limit, limit + 1, (m, k), dtype=torch.int16)
        b = torch.randint(-limit, limit + 1, (n, k)).to(b_dtype)
        product = exact_matmul(a, b, limit, limit)
        assert product.dtype == exact_dtype(limit * limit * k)
        assert torch.equal(product.long(), integer_matmul(a, b))


def test_blocks_of_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every split of b, ragged and of one row, gives the same product."""
    a = torch.randint(-7, 8, (5, 64), dtype=torch.int8)
    b = torch.randint(-7, 8, (33, 64), dtype=torch.int8)
    for elements in (1, 64, 5 * 64, 32 * 64, 33 * 64):
        monkeypatch.setattr(exact, "_BLOCK_ELEMENTS", elements)
        assert torch.equal(exact_matmul(a, b, 7, 7).long(), integer_matmul(a, b))


@pytest.mark.parametrize("extra", [0, 1])
def test_largest_sums_around_2_24(extra: int) -> None:
    """The last length float32 holds, and the first it does not."""
    k = (1 << 24) // (15 * 15) + extra
    k += extra * (1 - k % 2)  # An odd sum, which float32 would round.
    a = torch.full((2, k), 15, dtype=torch.int8)
    a[1] = -15
    b = torch.full((2, k), 15, dtype=torch.int8)
    b[1, ::2] = -15
    product = exact_matmul(a, b, 15, 15)
    assert product.dtype == (torch.float64 if extra else torch.float32)
    assert torch.equal(product.long(), integer_matmul(a, b))
    if extra:
        total = 225 * k
        assert int(torch.tensor(float(total), dtype=torch.float32)) != total


def test_largest_sums_of_fixed_point() -> None:
    """28-bit integers against 8-bit codes: odd sums beyond 2^44."""
    k = 1001
    a = torch.full((1, k), (1 << 28) - 1, dtype=torch.int64)
    b = torch.full((1, k), 127, dtype=torch.int8)
    product = exact_matmul(a, b, 1 << 28, 127)
    assert int(product) == ((1 << 28) - 1) * 127 * k


def test_sums_that_cannot_be_exact() -> None:
    a, b = torch.ones(1, 4), torch.ones(1, 4, dtype=torch.int8)
    with pytest.raises(ValueError, match="do not fit float64 exactly"):
        exact_matmul(a, b, 1 << 45, 127)


def test_inputs_are_not_changed() -> None:
    a = torch.randint(-7, 8, (4, 32)).float()
    b = torch.randint(-7, 8, (6, 64), dtype=torch.int8)
    before = a.clone(), b.clone()
    part = b[:, 16:48]
    assert torch.equal(exact_matmul(a, part, 7, 7).long(), integer_matmul(a, part))
    assert torch.equal(a, before[0]) and torch.equal(b, before[1])


class TestFixedPoint:
    @settings(max_examples=200, deadline=None)
    @given(
        row=st.lists(st.floats(-3e38, 3e38), min_size=1, max_size=12),
        bits=st.sampled_from([1, 8, 28, 30]),
    )
    def test_rounding(self, row: list[float], bits: int) -> None:
        x = torch.tensor([row], dtype=torch.float32)
        integers, unit = fixed_point(x, bits)
        assert integers.dtype == unit.dtype == torch.float64
        assert torch.equal(integers, integers.round())
        assert (integers.abs() <= 2**bits).all()
        mantissa, _ = torch.frexp(unit)
        assert mantissa.item() == 0.5
        assert ((x.double() - integers * unit).abs() <= unit / 2).all()
        if x.any():
            # No coarser than needed: the peak uses the top bit.
            assert integers.abs().max() >= 2 ** (bits - 1)

    def test_ties_round_to_even(self) -> None:
        x = torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5]])
        integers, unit = fixed_point(x, 7)
        assert unit.item() == 1
        assert integers.tolist() == [[127, 0, 2, 2, 0, -2]]

    def test_float32_survives_when_the_range_is_narrow(self) -> None:
        x = 1 + torch.rand(5, 64)
        integers, unit = fixed_point(x, 28)
        assert torch.equal((integers * unit).float(), x)

    def test_zero_row(self) -> None:
        integers, unit = fixed_point(torch.zeros(2, 3), 28)
        assert (integers == 0).all()
        assert torch.isfinite(unit).all() and (unit > 0).all()

    @pytest.mark.parametrize("value", [5e-324, 1e-318, 2.0**-1045, 2.0**-1022, 1e308])
    def test_ends_of_float64(self, value: float) -> None:
        """Tiny probabilities lose digits, never more; the unit is never zero."""
        x = torch.tensor([[value, -value / 2]], dtype=torch.float64)
        integers, unit = fixed_point(x, 30)
        assert torch.isfinite(integers).all() and torch.isfinite(unit).all()
        assert (unit >= 2.0**-1022).all() and (integers.abs() <= 1 << 30).all()
        assert ((x - integers * unit).abs() <= unit / 2).all()

    @pytest.mark.parametrize("bad", [np.inf, -np.inf, np.nan])
    def test_non_finite_row(self, bad: float) -> None:
        x = torch.randn(3, 8)
        good = fixed_point(x, 28)
        x[1, 5] = bad
        integers, unit = fixed_point(x, 28)
        assert not torch.isfinite(integers[1, 5] * unit[1])
        for actual, expected in zip((integers, unit), good, strict=True):
            assert torch.equal(actual[[0, 2]], expected[[0, 2]])
