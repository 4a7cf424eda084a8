# SPDX-License-Identifier: Apache-2.0
"""The compiled 16-bit linear: near the exact product, its rows on their own."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_lowbit.kernels.cpu import library
from vllm_lowbit.kernels.linear_tiled.cpu import linear_tiled

pytestmark = pytest.mark.usefixtures("garbage_in_empty")

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@given(
    m=st.sampled_from((0, 1, 2, 3, 4, 5, 9, 17)),
    n=st.integers(0, 60),
    k=st.one_of(st.integers(0, 40), st.sampled_from((64, 100, 250))),
    dtype=st.sampled_from(DTYPES),
    bias_dtype=st.sampled_from((None, *DTYPES)),
    turned=st.booleans(),
    seed=st.integers(0, 1 << 20),
)
@settings(max_examples=60)
def test_is_the_plain_product(
    isa: str,
    m: int,
    n: int,
    k: int,
    dtype: torch.dtype,
    bias_dtype: torch.dtype | None,
    turned: bool,
    seed: int,
) -> None:
    """A float32 sum of k products and the bias, rounded once to the type."""
    torch.manual_seed(seed)
    x, weight = torch.randn(m, k).to(dtype), torch.randn(n, k).to(dtype)
    bias = None if bias_dtype is None else torch.randn(n).to(bias_dtype)
    if turned:
        x = x.t().contiguous().t()
    with library.force_isa(isa):
        out = linear_tiled(x, weight, bias)
    assert out.dtype == dtype and out.shape == (m, n)
    exact = x.double() @ weight.double().t()
    magnitude = x.double().abs() @ weight.double().abs().t()
    if bias is not None:
        exact, magnitude = exact + bias.double(), magnitude + bias.double().abs()
    # At most k / 16 + 5 additions and as many products on the way of a term.
    slack = magnitude * (k / 8 + 12) * 2.0**-24
    if dtype != torch.float32:
        slack = slack + torch.finfo(dtype).eps * exact.abs() + 2.0**-24
    assert ((out.double() - exact).abs() <= slack).all()


def test_integers_are_exact(isa: str, dtype: torch.dtype) -> None:
    """Every product and sum fits float32: no order of additions can show."""
    x = torch.randint(-8, 9, (5, 100)).to(dtype)
    weight = torch.randint(-8, 9, (40, 100)).to(dtype)
    bias = torch.randint(-8, 9, (40,)).float()
    with library.force_isa(isa):
        out = linear_tiled(x, weight, bias)
    assert torch.equal(out, (x.float() @ weight.float().t() + bias).to(dtype))


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_instruction_sets_agree(dtype: torch.dtype) -> None:
    """Products of 16-bit numbers are exact in float32, and added in one order."""
    x, weight = torch.randn(9, 250).to(dtype), torch.randn(41, 250).to(dtype)
    outs = []
    for isa in library.isas():
        with library.force_isa(isa):
            outs.append(linear_tiled(x, weight, None))
    assert all(torch.equal(out, outs[0]) for out in outs)


@pytest.mark.parametrize(("k", "n"), [(64, 97), (224, 100), (1000, 63)])
def test_rows_are_independent(
    isa: str,
    k: int,
    n: int,
    dtype: torch.dtype,
    assert_rows_independent: Callable[..., None],
) -> None:
    x, weight = torch.randn(257, k).to(dtype), torch.randn(n, k).to(dtype)
    with library.force_isa(isa):
        assert_rows_independent(lambda rows: linear_tiled(rows, weight, None), x)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_non_finite_stays_in_its_row(isa: str, bad: float) -> None:
    x, weight = torch.randn(9, 65), torch.randn(33, 65)
    with library.force_isa(isa):
        clean = linear_tiled(x, weight, None)
        x[3, 5], x[8, 64] = bad, bad
        out = linear_tiled(x, weight, None)
    good = [row for row in range(9) if row not in (3, 8)]
    assert torch.equal(out[good], clean[good])
    assert not torch.isfinite(out[[3, 8]]).any()
