# SPDX-License-Identifier: Apache-2.0
"""Compiled transforms and quantization: equal to the references, bit for bit.

On every instruction set, over random forms, magnitudes and non-finite elements. Equal
as numbers: a zero may have another sign.
"""

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_lowbit.kernels.cpu import library
from vllm_lowbit.kernels.grid import IntGrid
from vllm_lowbit.kernels.hadamard import cpu as hadamard_cpu
from vllm_lowbit.kernels.hadamard.matrices import CORES
from vllm_lowbit.kernels.hadamard_quantize import cpu, reference
from vllm_lowbit.kernels.quantize_weight import cpu as weight_cpu
from vllm_lowbit.kernels.quantize_weight import reference as weight_reference

pytestmark = pytest.mark.usefixtures("garbage_in_empty")

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ORDERS = (1, 2, 4, 8, 12, 16, 20, 24, 28, 40, 64, 92, 96, 112, 256, 448, 1024)
BAD = (torch.nan, torch.inf, -torch.inf)


def assert_equal(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """Equal type, shape and values; NaN and Inf at the same places."""
    assert (actual.dtype, actual.shape) == (expected.dtype, expected.shape)
    finite = expected.isfinite()
    assert torch.equal(actual.isfinite(), finite)
    assert torch.equal(actual[finite], expected[finite])


def assert_all_equal(actual: tuple, expected: tuple) -> None:
    for a, b in zip(actual, expected, strict=True):
        assert_equal(a, b)


def magnitudes(rows: int, spread: int, random: torch.Generator) -> torch.Tensor:
    """``[rows, 1]``, powers of two from ``2^-spread`` to ``2^spread``."""
    exponents = torch.randint(-spread, spread + 1, (rows, 1), generator=random)
    return torch.exp2(exponents.float())


@dataclass(frozen=True)
class Rows:
    """Activations of some form; each row has a magnitude of its own."""

    rows: int
    order: int
    stride: int
    blocks: int
    dtype: torch.dtype
    scaled: bool
    spread: int
    bad: tuple[float, ...]
    turned: bool
    seed: int

    @property
    def columns(self) -> int:
        return self.order * self.stride * self.blocks

    def draw(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        random = torch.Generator().manual_seed(self.seed)
        shape = self.rows, self.columns
        x = torch.randn(shape, generator=random)
        x *= magnitudes(self.rows, self.spread, random)
        x[self.seed % self.rows] *= self.seed % 3  # at times a row of zeros
        for i, value in enumerate(self.bad):
            x[(self.seed + i) % self.rows, self.seed % self.columns] = value
        x = x.to(self.dtype)
        if self.turned:
            x = x.t().contiguous().t()
        scale = torch.rand(self.columns, generator=random) + 0.5
        return x, scale if self.scaled else None


all_rows = st.builds(
    Rows,
    rows=st.integers(1, 9),
    order=st.sampled_from(ORDERS),
    stride=st.sampled_from((1, 1, 1, 2, 3, 7, 16)),
    blocks=st.integers(1, 3),
    dtype=st.sampled_from(DTYPES),
    scaled=st.booleans(),
    spread=st.sampled_from((0, 3, 90, 126)),
    bad=st.lists(st.sampled_from(BAD), max_size=2).map(tuple),
    turned=st.booleans(),
    seed=st.integers(0, 1 << 20),
).filter(lambda rows: rows.columns <= 4096)


@given(rows=all_rows, transpose=st.booleans())
@settings(max_examples=60)
def test_hadamard(isa: str, rows: Rows, transpose: bool) -> None:
    x, scale = rows.draw()
    expected = reference.transform(x, scale, rows.order, rows.stride, transpose)
    with library.force_isa(isa):
        actual = hadamard_cpu.transform(x, scale, rows.order, rows.stride, transpose)
    assert_equal(actual, expected)


@given(
    rows=all_rows,
    bits=st.integers(2, 8),
    symmetric=st.booleans(),
    clip_ratio=st.sampled_from([1.0, 0.9, 0.5]),
    groups=st.sampled_from([None, 1, 2, 3, 4, 8]),
)
@settings(max_examples=80)
def test_hadamard_quantize(
    isa: str,
    rows: Rows,
    bits: int,
    symmetric: bool,
    clip_ratio: float,
    groups: int | None,
) -> None:
    x, scale = rows.draw()
    size = None
    if groups is not None and rows.columns % groups == 0:
        size = rows.columns // groups
    grid = bits, symmetric, clip_ratio, size
    arguments = x, scale, rows.order, rows.stride, *grid
    expected = reference.hadamard_quantize(*arguments)
    with library.force_isa(isa):
        assert_all_equal(cpu.hadamard_quantize(*arguments), expected)


@pytest.mark.parametrize("core", CORES)
def test_every_core(isa: str, core: int) -> None:
    x = torch.randn(2, 2 * core)
    with library.force_isa(isa):
        for order, stride, transpose in (
            (core, 2, False),
            (2 * core, 1, False),
            (2 * core, 1, True),
        ):
            expected = reference.transform(x, None, order, stride, transpose)
            actual = hadamard_cpu.transform(x, None, order, stride, transpose)
            assert torch.equal(actual, expected)


@pytest.mark.parametrize("order", [2048, 11008, 14336])
def test_sizes_of_real_layers(isa: str, order: int) -> None:
    x = torch.randn(3, order).bfloat16()
    with library.force_isa(isa):
        expected = reference.transform(x, None, order, 1)
        assert torch.equal(hadamard_cpu.transform(x, None, order, 1), expected)


@pytest.mark.parametrize("threads", [1, 2])
def test_threads(isa: str, threads: int) -> None:
    """Many rows for both threads, and weights, some of them not finite."""
    x = torch.randn(50, 224) * torch.rand(50, 1)
    x[7, 3] = torch.nan
    torch.set_num_threads(threads)
    with library.force_isa(isa):
        expected = reference.transform(x, None, 28, 8)
        assert_equal(hadamard_cpu.transform(x, None, 28, 8), expected)
        arguments = x, None, 224, 1, 4, False
        expected_codes = reference.hadamard_quantize(*arguments)
        assert_all_equal(cpu.hadamard_quantize(*arguments), expected_codes)
        weight = x, IntGrid(4), 56
        expected_weight = weight_reference.quantize_weight(*weight)
        assert_all_equal(weight_cpu.quantize_weight(*weight), expected_weight)


def test_any_rank_and_no_rows(isa: str) -> None:
    x = torch.randn(3, 2, 24)
    with library.force_isa(isa):
        whole = hadamard_cpu.transform(x, None, 24, 1)
        assert whole.shape == x.shape
        assert torch.equal(whole[1, 1], hadamard_cpu.transform(x[1, 1], None, 24, 1))
        assert hadamard_cpu.transform(x[:0], None, 24, 1).shape == (0, 2, 24)
        shapes = [
            t.shape for t in cpu.hadamard_quantize(x[0, :0], None, 24, 1, 4, True)
        ]
        assert shapes == [(0, 24), (0, 1), (0, 1)]
        grid = IntGrid(4)
        shapes = [t.shape for t in weight_cpu.quantize_weight(x[0, :0], grid, 8)]
        assert shapes == [(0, 24), (0, 3), (0, 3)]


@pytest.mark.parametrize("symmetric", [True, False])
def test_rows_are_independent(
    isa: str, assert_rows_independent: Callable[..., None], symmetric: bool
) -> None:
    x = (torch.randn(257, 224) * torch.rand(257, 1) * 10).bfloat16()
    with library.force_isa(isa):
        assert_rows_independent(
            lambda rows: cpu.hadamard_quantize(rows, None, 224, 1, 4, symmetric), x
        )
        assert_rows_independent(
            lambda rows: hadamard_cpu.transform(rows, None, 28, 8), x
        )


@dataclass(frozen=True)
class FloatWeight:
    """A weight with heavy tails, degenerate rows and elements that are not finite."""

    n: int
    groups: int
    size: int
    dtype: torch.dtype
    spread: int
    bad: tuple[float, ...]
    constant: bool
    turned: bool
    seed: int

    def draw(self) -> torch.Tensor:
        random = torch.Generator().manual_seed(self.seed)
        shape = self.n, self.groups * self.size
        weight = torch.randn(shape, generator=random)
        weight[torch.rand(shape, generator=random) < 0.02] *= 8
        weight *= magnitudes(self.n, self.spread, random)
        weight[self.seed % self.n] *= self.seed % 3
        if self.constant:
            weight[-1] = weight[-1, 0]
        for i, value in enumerate(self.bad):
            weight[(self.seed + i) % self.n, self.seed % shape[1]] = value
        weight = weight.to(self.dtype)
        return weight.t().contiguous().t() if self.turned else weight


weights = st.builds(
    FloatWeight,
    n=st.integers(1, 20),
    groups=st.integers(1, 4),
    size=st.sampled_from((1, 2, 7, 16, 32, 33, 64, 100)),
    dtype=st.sampled_from((*DTYPES, torch.float64)),
    spread=st.sampled_from((0, 3, 60, 110)),
    bad=st.lists(st.sampled_from(BAD), max_size=2).map(tuple),
    constant=st.booleans(),
    turned=st.booleans(),
    seed=st.integers(0, 1 << 20),
)


@given(weight=weights, bits=st.integers(2, 8), symmetric=st.booleans())
@settings(max_examples=80)
def test_quantize_weight(
    isa: str, weight: FloatWeight, bits: int, symmetric: bool
) -> None:
    rows = weight.draw()
    for group_size in (weight.size, None):
        arguments = rows, IntGrid(bits, symmetric), group_size
        expected = weight_reference.quantize_weight(*arguments)
        with library.force_isa(isa):
            assert_all_equal(weight_cpu.quantize_weight(*arguments), expected)
