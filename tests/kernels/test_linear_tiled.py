# SPDX-License-Identifier: Apache-2.0
"""The 16-bit linear of the vocabulary by BLAS: plain values, rows on their own."""

from collections.abc import Callable

import pytest
import torch

from vllm_lowbit.kernels.linear_tiled.generic import TILE, linear_tiled


@pytest.mark.parametrize("tokens", [0, 1, 15, 16, 17, 63])
@pytest.mark.parametrize("with_bias", [True, False])
def test_is_the_plain_product(tokens: int, with_bias: bool, dtype: torch.dtype) -> None:
    x, weight = torch.randn(tokens, 63).to(dtype), torch.randn(41, 63).to(dtype)
    bias = torch.randn(41).to(dtype) if with_bias else None
    out = linear_tiled(x, weight, bias)
    assert out.dtype == dtype and out.shape == (tokens, 41)
    exact = x.double() @ weight.double().t()
    if bias is not None:
        exact += bias.double()
    # A float32 sum of 63 terms, one rounding to the type, and again with the bias.
    terms = x.double().abs() @ weight.double().abs().t() * 64 * 2.0**-24
    slack = terms + torch.finfo(dtype).eps * (exact.abs() + 3)
    assert ((out.double() - exact).abs() <= slack).all()


@pytest.mark.parametrize(("k", "n"), [(64, 96), (448, 1000), (1000, 63)])
def test_rows_are_independent(
    k: int,
    n: int,
    dtype: torch.dtype,
    assert_rows_independent: Callable[..., None],
) -> None:
    """With one thread and with two; BLAS may round otherwise with another number."""
    x, weight = torch.randn(257, k).to(dtype), torch.randn(n, k).to(dtype)
    assert_rows_independent(
        lambda rows: linear_tiled(rows, weight, None), x, across_threads=False
    )


def test_every_product_has_the_same_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = []
    plain = torch.nn.functional.linear

    def recording(x: torch.Tensor, *rest: torch.Tensor) -> torch.Tensor:
        shapes.append(tuple(x.shape))
        return plain(x, *rest)

    monkeypatch.setattr(torch.nn.functional, "linear", recording)
    for tokens in (1, 16, 17, 40):
        linear_tiled(torch.randn(tokens, 8), torch.randn(4, 8), None)
    assert shapes == [(TILE, 8)] * (1 + 1 + 2 + 3)


def test_non_finite_stays_in_its_row() -> None:
    x, weight = torch.randn(20, 64), torch.randn(33, 64)
    clean = linear_tiled(x, weight, None)
    x[3, 5], x[17, 0] = torch.nan, torch.inf
    out = linear_tiled(x, weight, None)
    good = [i for i in range(20) if i not in (3, 17)]
    assert torch.equal(out[good], clean[good])
    assert not torch.isfinite(out[[3, 17]]).any()
