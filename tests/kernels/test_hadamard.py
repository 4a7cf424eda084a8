# SPDX-License-Identifier: Apache-2.0
"""Hadamard matrices of order K x 2^p and the transforms built on them."""

import importlib.util
from collections.abc import Callable

import pytest
import torch

from vllm_lowbit.kernels.hadamard import generic, matrices, reference
from vllm_lowbit.kernels.hadamard.matrices import (
    CORES,
    core_matrix,
    exists,
    factor,
    largest_order,
    matrix,
)

# Orders real models need: head sizes, then hidden and intermediate sizes.
ORDERS = (2, 16, 24, 40, 64, 80, 96, 112, 128, 256, 576, 768, 896)
WIDE_ORDERS = (2048, 3584, 4864, 8960, 11008, 13824, 14336, 18944, 29568)


def rounding_bound(x: torch.Tensor, y: torch.Tensor, order: int) -> torch.Tensor:
    """Largest error of the documented roundings of ``y = H x``, one block a row.

    Each of ``order`` elements moves by at most 2^-31 of the largest; then the result
    is rounded once to float32.
    """
    peak = x.double().abs().amax(-1, keepdim=True)
    return order**0.5 * 2.0**-31 * peak + 2.0**-24 * y.abs() * (1 + 1e-6)


def test_every_core_up_to_252_is_known() -> None:
    assert (*range(12, 253, 8), 924) == CORES
    assert all(exists(order) for order in range(4, 257, 4))


@pytest.mark.parametrize("core", CORES)
def test_core_is_a_hadamard_matrix(core: int) -> None:
    h = core_matrix(core).long()
    assert h.shape == (core, core)
    assert (h.abs() == 1).all()
    assert torch.equal(h @ h.t(), core * torch.eye(core, dtype=torch.long))


@pytest.mark.parametrize("order", (*CORES, *ORDERS))
def test_transform_of_the_identity(order: int) -> None:
    """Row i is column i of H, or of H^T; the entries are +-1 and H H^T = n I."""
    identity = torch.eye(order)
    rows = torch.arange(order) if order <= 256 else torch.randperm(order)[:16]
    h = matrix(order).double()
    for transpose in (False, True):
        scaled = generic.hadamard(identity[rows], order, transpose=transpose)
        scaled = scaled.double() * order**0.5
        signs = scaled.round()
        assert (signs.abs() == 1).all()
        assert (scaled - signs).abs().max() < 1e-5
        assert torch.equal(signs, (h if transpose else h.t())[rows])
        assert torch.equal(signs @ signs.t(), order * identity[rows][:, rows].double())
    assert torch.equal(h @ h.t(), order * identity.double())


@pytest.mark.parametrize("order", [1, 2, 4, 32, 512])
def test_powers_of_two_are_sylvester(order: int) -> None:
    index = torch.arange(order)
    both = index.unsqueeze(0) & index.unsqueeze(1)
    parity = sum(both >> bit & 1 for bit in range(order.bit_length())) % 2
    assert torch.equal(matrix(order).long(), 1 - 2 * parity)


@pytest.mark.parametrize("order", [24, 40, 112, 156 * 2])
def test_core_comes_first_in_the_product(order: int) -> None:
    core, power = factor(order)
    expected = torch.kron(core_matrix(core), matrix(power))
    assert torch.equal(matrix(order), expected)


@pytest.mark.parametrize("order", (*ORDERS, *WIDE_ORDERS))
@pytest.mark.parametrize("transpose", [False, True])
def test_generic_against_float64(order: int, transpose: bool) -> None:
    x = torch.randn(3, order) * torch.tensor([1e-3, 1.0, 1e3]).unsqueeze(-1)
    actual = generic.hadamard(x, order, transpose=transpose)
    assert actual.dtype == torch.float32
    if order <= 4096:
        expected = reference.hadamard(x, order, transpose=transpose)
    else:  # The matrix would be large: two smaller reference transforms.
        core, power = factor(order)
        half = reference.hadamard(x, power)
        expected = reference.hadamard(half, core, power, transpose=transpose)
    assert expected.dtype == torch.float64
    assert ((actual - expected).abs() <= rounding_bound(x, expected, order)).all()


@pytest.mark.parametrize("order", [2, 28, 64, 80, 128, 924, 14336])
def test_integers_are_rounded_once(order: int) -> None:
    """Sums are exact: one float64 scaling and one rounding to float32 remain."""
    x = torch.randint(-1000, 1001, (3, order)).float()
    core, power = factor(order)
    sums = x.double().view(3, core, power) @ matrix(power).double().t()
    sums = matrix(core).double() @ sums
    expected = (sums.flatten(1) * order**-0.5).float()
    assert torch.equal(generic.hadamard(x, order), expected)


@pytest.mark.parametrize("order", (12, 28, 64, 80, 116, 924, 14336))
@pytest.mark.parametrize("stride", [1, 4])
def test_transpose_is_the_inverse(order: int, stride: int) -> None:
    x = torch.randn(2, order * stride)
    for first in (False, True):
        once = generic.hadamard(x, order, stride, transpose=first)
        back = generic.hadamard(once, order, stride, transpose=not first)
        torch.testing.assert_close(back, x, rtol=0, atol=2e-5)
        torch.testing.assert_close(once.norm(dim=-1), x.norm(dim=-1), rtol=1e-5, atol=0)


@pytest.mark.parametrize("implementation", [reference.hadamard, generic.hadamard])
@pytest.mark.parametrize(
    ("blocks", "order", "stride"),
    [(1, 12, 1), (5, 12, 1), (1, 12, 7), (3, 8, 5), (2, 40, 3), (4, 1, 6), (3, 28, 64)],
)
def test_blocks_and_strides(
    implementation: Callable[..., torch.Tensor], blocks: int, order: int, stride: int
) -> None:
    """Element o of a transform sits at ``(block * order + o) * stride + s``."""
    x = torch.randn(2, blocks * order * stride)
    h = matrix(order).double()
    for transpose in (False, True):
        actual = implementation(x, order, stride, transpose=transpose)
        turned = h.t() if transpose else h
        for block in range(blocks):
            for s in range(stride):
                start = block * order * stride + s
                where = slice(start, start + order * stride, stride)
                expected = x[:, where].double() @ turned.t() * order**-0.5
                torch.testing.assert_close(
                    actual[:, where].double(), expected, rtol=0, atol=1e-5
                )


def test_cores_that_are_not_symmetric_tell_h_from_its_transpose() -> None:
    skewed = [c for c in CORES if not torch.equal(core_matrix(c), core_matrix(c).t())]
    assert {12, 20, 28, 44} <= set(skewed)
    for core in skewed:
        x = torch.randn(core * 2)
        h, ht = (generic.hadamard(x, core * 2, transpose=t) for t in (False, True))
        assert (h - ht).abs().max() > 0.1, core
        expected = reference.hadamard(x, core * 2)
        torch.testing.assert_close(h.double(), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("order", [3, 6, 7, 9, 22, 1000, 268, 553])
def test_unknown_order(order: int) -> None:
    odd = order
    while odd % 2 == 0:
        odd //= 2
    assert not exists(order)
    message = (
        rf"no Hadamard matrix of order {order} \(odd part {odd}\); known cores: 12"
    )
    for call in (
        lambda: factor(order),
        lambda: matrix(order),
        lambda: reference.hadamard(torch.ones(order), order),
        lambda: generic.hadamard(torch.ones(order), order),
    ):
        with pytest.raises(ValueError, match=message):
            call()


@pytest.mark.parametrize("order", [0, -4])
def test_order_must_be_positive(order: int) -> None:
    with pytest.raises(ValueError, match=f"order must be positive, got {order}"):
        factor(order)
    assert not exists(order)


def test_unknown_core() -> None:
    with pytest.raises(ValueError, match="no Hadamard core of order 268"):
        core_matrix(268)


@pytest.mark.parametrize("implementation", [reference.hadamard, generic.hadamard])
@pytest.mark.parametrize(("order", "stride"), [(8, 3), (16, 2), (0, 1), (4, 0), (5, 1)])
def test_blocks_that_do_not_divide(
    implementation: Callable[..., torch.Tensor], order: int, stride: int
) -> None:
    message = (
        f"blocks of order {order} x stride {stride} do not divide a dimension of 28"
    )
    with pytest.raises(ValueError, match=message):
        implementation(torch.ones(2, 28), order, stride)


@pytest.mark.parametrize("core", [92, 116])
def test_missing_tables_are_named(core: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=f"order {core} .*pip install compressed-ten"):
        matrices._from_tables(core)


@pytest.mark.parametrize(
    ("size", "order"),
    [(1, 1), (7, 1), (6, 2), (63, 1), (1000, 200), (4096, 4096), (14336, 14336)],
)
def test_largest_order(size: int, order: int) -> None:
    assert largest_order(size) == order
    assert all(size % d or not exists(d) for d in range(order + 1, size + 1))


def test_input_forms(dtype: torch.dtype) -> None:
    """Any rank and stride; the input stays as it was; no rows are no error."""
    x = torch.randn(4, 3, 24).to(dtype)
    before = x.clone()
    whole = generic.hadamard(x, 24)
    assert torch.equal(x, before)
    for i, j in ((0, 0), (3, 2)):
        assert torch.equal(whole[i, j], generic.hadamard(x[i, j], 24))
    turned = x.transpose(0, 2).contiguous().transpose(0, 2)
    assert torch.equal(generic.hadamard(turned, 24), whole)
    assert torch.equal(generic.hadamard(x.float(), 24), whole)
    assert generic.hadamard(x[:0], 24).shape == (0, 3, 24)


def test_rows_are_independent(
    assert_rows_independent: Callable[..., None], dtype: torch.dtype
) -> None:
    x = torch.randn(257, 224).to(dtype)
    for order, stride in ((224, 1), (28, 8), (32, 1)):
        assert_rows_independent(
            lambda rows, o=order, s=stride: generic.hadamard(rows, o, s), x
        )


@pytest.mark.parametrize("bad", [torch.inf, -torch.inf, torch.nan])
@pytest.mark.parametrize("stride", [1, 3])
def test_non_finite_stays_in_its_block(bad: float, stride: int) -> None:
    x = torch.randn(3, 240)
    clean = generic.hadamard(x, 20, stride)
    x[1, 120] = bad
    y = generic.hadamard(x, 20, stride)
    block = torch.zeros(3, 240, dtype=torch.bool)
    block[1, 120 : 120 + 20 * stride : stride] = True
    assert not torch.isfinite(y[block]).any()
    assert torch.equal(y[~block], clean[~block])
