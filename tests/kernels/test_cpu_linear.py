# SPDX-License-Identifier: Apache-2.0
"""Compiled quantized linears: equal to the references, bit for bit.

On every instruction set, for all widths, groups and ragged sizes.
"""

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_lowbit.kernels.cpu import library
from vllm_lowbit.kernels.grid import IntGrid
from vllm_lowbit.kernels.hadamard_quantize.reference import (
    hadamard_quantize,
    transform,
)
from vllm_lowbit.kernels.linear_packed.cpu import linear_packed
from vllm_lowbit.kernels.linear_w4a4 import cpu, reference
from vllm_lowbit.kernels.linear_w4a4.cpu import PackedWeight, pack, packed_bytes
from vllm_lowbit.kernels.linear_w4a4.generic import prepare
from vllm_lowbit.kernels.linear_wna16 import generic as weight_only
from vllm_lowbit.kernels.linear_wna16.cpu import linear_wna16
from vllm_lowbit.kernels.packing import PACKABLE_BITS

pytestmark = pytest.mark.usefixtures("garbage_in_empty")

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
every_width = pytest.mark.parametrize("bits", PACKABLE_BITS)


def assert_equal(actual: torch.Tensor, expected: torch.Tensor, x: torch.Tensor) -> None:
    """Equal type, shape and values; not finite where a row of x is not."""
    assert (actual.dtype, actual.shape) == (expected.dtype, expected.shape)
    good = x.isfinite().all(-1)
    assert torch.equal(actual[good], expected[good])
    assert not actual[~good].isfinite().any()
    assert not expected[~good].isfinite().any()


@dataclass(frozen=True)
class Weight:
    """A quantized weight with any code that its width has."""

    codes: torch.Tensor
    scale: torch.Tensor
    zero_point: torch.Tensor | None
    bias: torch.Tensor | None
    bits: int

    @property
    def n(self) -> int:
        return len(self.codes)

    @property
    def max_difference(self) -> int:
        half = 1 << (self.bits - 1)
        return half if self.zero_point is None else 2 * half - 1

    @property
    def packed(self) -> PackedWeight:
        return pack(self.codes, self.scale, self.zero_point, self.bits)

    def integer(self, *rows: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """By the reference: rows are codes, scale and zero point."""
        return reference.linear_w4a4(
            *rows, self.codes, self.scale, self.zero_point, self.bias, dtype
        )

    def weight_only(self, x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """By the portable implementation, whose sums are exact."""
        prepared = prepare(self.codes, self.zero_point)
        return weight_only.linear_wna16(
            x, prepared, self.scale, self.bias, self.max_difference, dtype
        )

    def packed_integer(self, *rows: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        return cpu.linear_w4a4(*rows, self.packed, self.n, self.bits, self.bias, dtype)

    def packed_weight_only(self, x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        return linear_wna16(x, self.packed, self.n, self.bits, self.bias, dtype)


def draw_weight(
    n: int,
    k: int,
    groups: int = 1,
    bits: int = 4,
    symmetric: bool = True,
    bias: torch.dtype | None = torch.float32,
) -> Weight:
    half = 1 << (bits - 1)
    zero_point = torch.randint(-half, half, (n, groups), dtype=torch.int8)
    return Weight(
        torch.randint(-half, half, (n, k), dtype=torch.int8),
        torch.rand(n, groups) / 100,
        None if symmetric else zero_point,
        None if bias is None else torch.randn(n).to(bias),
        bits,
    )


def draw_codes(
    m: int, k: int, bits: int, symmetric: bool, groups: int = 1
) -> tuple[torch.Tensor, ...]:
    """Codes anywhere on their grid, scales and zero points."""
    grid = IntGrid(bits, symmetric)
    zero_point = torch.zeros(m, groups, dtype=torch.int32)
    if not symmetric:
        zero_point.random_(grid.code_min, grid.code_max + 1)
    codes = torch.randint(grid.code_min, grid.code_max + 1, (m, k), dtype=torch.int8)
    return codes, torch.rand(m, groups), zero_point


# Tiles have up to 6 rows; from a few tiles on, weights are unpacked first.
tokens = st.sampled_from((0, 1, 1, 2, 3, 4, 5, 6, 7, 12, 13, 25, 41, 67))
weights = st.builds(
    dict,
    n=st.one_of(st.integers(1, 40), st.integers(60, 140)),
    size=st.one_of(st.integers(1, 70), st.sampled_from((64, 128, 200))),
    groups=st.sampled_from((1, 1, 2, 3, 5)),
    bits=st.sampled_from(PACKABLE_BITS),
    symmetric=st.booleans(),
    bias=st.sampled_from((None, *DTYPES)),
)
seeds = st.integers(0, 1 << 20)
dtypes = st.sampled_from(DTYPES)


def weight_of(sizes: dict, seed: int) -> Weight:
    torch.manual_seed(seed)
    k = sizes["size"] * sizes["groups"]
    return draw_weight(k=k, **{a: b for a, b in sizes.items() if a != "size"})


@given(
    m=tokens,
    sizes=weights,
    bits=st.integers(2, 8),
    symmetric=st.booleans(),
    of_groups=st.booleans(),
    dtype=dtypes,
    seed=seeds,
)
@settings(max_examples=100)
def test_integer(
    isa: str,
    m: int,
    sizes: dict,
    bits: int,
    symmetric: bool,
    of_groups: bool,
    dtype: torch.dtype,
    seed: int,
) -> None:
    weight = weight_of(sizes, seed)
    groups = sizes["groups"] if of_groups else 1
    rows = draw_codes(m, weight.codes.shape[1], bits, symmetric, groups)
    if m > 2:
        rows[1][1, -1] = torch.nan  # the scale of a row that is not finite
    with library.force_isa(isa):
        actual = weight.packed_integer(*rows, dtype=dtype)
    assert_equal(actual, weight.integer(*rows, dtype=dtype), rows[1])


@given(
    m=tokens,
    sizes=weights,
    x_dtype=dtypes,
    dtype=dtypes,
    spread=st.sampled_from((0, 3, 90, 126)),
    bad=st.sampled_from((None, torch.nan, torch.inf, -torch.inf)),
    turned=st.booleans(),
    seed=seeds,
)
@settings(max_examples=100)
def test_weight_only(
    isa: str,
    m: int,
    sizes: dict,
    x_dtype: torch.dtype,
    dtype: torch.dtype,
    spread: int,
    bad: float | None,
    turned: bool,
    seed: int,
) -> None:
    weight = weight_of(sizes, seed)
    k = weight.codes.shape[1]
    exponents = torch.randint(-spread, spread + 1, (m, 1)).float()
    x = torch.randn(m, k) * torch.exp2(exponents)
    if m > 2:
        x[0] = 0
        if bad is not None:
            x[1, seed % k] = bad
    x = x.to(x_dtype)
    if turned:
        x = x.t().contiguous().t()
    with library.force_isa(isa):
        actual = weight.packed_weight_only(x, dtype)
    assert_equal(actual, weight.weight_only(x, dtype), x)


@every_width
@pytest.mark.parametrize("groups", [1, 3])
def test_every_code_is_kept(isa: str, bits: int, groups: int) -> None:
    """Unit activations and scales give the codes back, in their places."""
    half = 1 << (bits - 1)
    k = 37 * groups
    codes = (torch.arange(35 * k) % (2 * half) - half).to(torch.int8).view(35, k)
    identity = torch.eye(k, dtype=torch.int8)
    ones, zeros = torch.ones(k, 1), torch.zeros(k, 1, dtype=torch.int32)
    with library.force_isa(isa):
        weight = pack(codes, torch.ones(35, groups), None, bits)
        out = cpu.linear_w4a4(
            identity, ones, zeros, weight, 35, bits, None, torch.float32
        )
    assert torch.equal(out.t(), codes.float())
    assert len(weight.weight) == packed_bytes(35, k, groups, bits)
    sums = codes.view(35, groups, -1).sum(-1, dtype=torch.int32).t()
    assert torch.equal(weight.sum[:, :35], sums)
    assert weight.zero is None and (weight.sum[:, 35:] == 0).all()


@every_width
def test_instruction_sets_pack_alike(bits: int) -> None:
    torch.manual_seed(0)
    weight = draw_weight(70, 90, 3, bits, symmetric=False)
    packed = []
    for isa in library.isas():
        with library.force_isa(isa):
            packed.append(weight.packed)
    for other in packed[1:]:
        for a, b in zip(other, packed[0], strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("threads", [1, 2])
def test_large_and_with_threads(isa: str, threads: int) -> None:
    """More rows than a cache keeps at once, and channels for several panels."""
    weight = draw_weight(150, 4096, 2, 4, symmetric=False)
    x = torch.randn(50, 4096)
    torch.set_num_threads(threads)
    with library.force_isa(isa):
        for groups in (1, 2):
            rows = draw_codes(125, 4096, 4, False, groups)
            expected = weight.integer(*rows, dtype=torch.float32)
            actual = weight.packed_integer(*rows, dtype=torch.float32)
            assert torch.equal(actual, expected)
        for m in (2, 50):
            expected = weight.weight_only(x[:m], torch.float32)
            actual = weight.packed_weight_only(x[:m], torch.float32)
            assert torch.equal(actual, expected)


def test_sums_at_the_end_of_int32(isa: str) -> None:
    """Extreme codes of 8 bits, at the last k whose sums fit and past it."""
    k = (2**31 - 1) // (255 * 255)
    ones = torch.ones(2, 1)
    low = torch.tensor([[-128], [127]])
    codes = torch.cat((torch.full((1, k), 127), torch.full((1, k), -128))).to(
        torch.int8
    )
    weight = Weight(codes, ones, low.to(torch.int8), None, 8)
    rows = codes, ones, low.int()
    total = float(255 * 255 * k)
    with library.force_isa(isa):
        actual = weight.packed_integer(*rows, dtype=torch.float32)
        assert torch.equal(actual, torch.tensor([[total, -total], [-total, total]]))
        longer = torch.nn.functional.pad(codes, (0, 1))
        weight = Weight(longer, ones, low.to(torch.int8), None, 8)
        with pytest.raises(ValueError, match=f"magnitude {255 * 255 * (k + 1)} do not"):
            weight.packed_integer(longer, *rows[1:], dtype=torch.float32)
        # A narrower bound on the activations admits it.
        cpu.linear_w4a4(
            longer, *rows[1:], weight.packed, 2, 8, None, torch.float32, code_max=254
        )
        k = (2**31 - 1) // (255 * 128) + 1
        wide = Weight(codes[:, :1].expand(2, k), ones, low.to(torch.int8), None, 8)
        with pytest.raises(ValueError, match="do not fit int32"):
            wide.packed_weight_only(torch.ones(1, k), torch.float32)


def packed_arguments(
    weight: Weight, bits: int, symmetric: bool, dtype: torch.dtype, order: int
) -> tuple:
    return (
        *(order, 1, bits, symmetric, *weight.packed),
        *(weight.bias, weight.n, weight.bits, dtype),
    )


@pytest.mark.parametrize("bits", [2, 4, 8, 16])
@pytest.mark.parametrize("order", [1, 64])
@pytest.mark.parametrize("scaled", [True, False])
@pytest.mark.parametrize("clip_ratio", [1.0, 0.9])
def test_whole_linear(
    isa: str, bits: int, order: int, scaled: bool, clip_ratio: float
) -> None:
    """Transform, quantization and product in one call."""
    weight = draw_weight(40, 192, 3, 4, symmetric=False)
    x = torch.randn(7, 192).bfloat16()
    x[2, 5], x[4] = torch.inf, 0
    scale = torch.rand(192) + 0.5 if scaled else None
    rest = packed_arguments(weight, bits, False, torch.bfloat16, order)
    with library.force_isa(isa):
        actual = linear_packed(x, scale, *rest, clip_ratio)
    if bits == 16:
        plain = x if order == 1 and not scaled else transform(x, scale, order, 1)
        expected = weight.weight_only(plain, torch.bfloat16)
    else:
        rows = hadamard_quantize(x, scale, order, 1, bits, False, clip_ratio)
        expected = weight.integer(*rows, dtype=torch.bfloat16)
    assert_equal(actual, expected, x)


@pytest.mark.parametrize("bits", [4, 6, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group_size", [32, 64, 128, 256])
def test_whole_linear_in_groups(
    isa: str, bits: int, symmetric: bool, group_size: int
) -> None:
    """Of inputs and weights, for any number of rows and channels."""
    k = 3 * group_size
    weight = draw_weight(41, k, 3, bits, symmetric=symmetric)
    x, scale = torch.randn(9, k).bfloat16(), torch.rand(k) + 0.5
    x[2, 5], x[4], x[5, group_size:] = torch.inf, 0, 0
    for order in (1, 32):
        rest = packed_arguments(weight, bits, symmetric, torch.float32, order)
        form = order, 1, bits, symmetric, 0.9, group_size
        for m in (0, 1, 9):
            with library.force_isa(isa):
                actual = linear_packed(x[:m], scale, *rest, 0.9, group_size)
            rows = hadamard_quantize(x[:m], scale, *form)
            assert rows[1].shape == (m, 3)
            expected = weight.integer(*rows, dtype=torch.float32)
            assert_equal(actual, expected, x[:m])


def test_one_group_is_the_token(isa: str) -> None:
    weight, x = draw_weight(40, 192, 1), torch.randn(7, 192)
    rest = packed_arguments(weight, 4, False, torch.float32, 64)
    with library.force_isa(isa):
        expected = linear_packed(x, None, *rest)
        assert torch.equal(linear_packed(x, None, *rest, 1.0, 192), expected)


@pytest.mark.parametrize("group_size", [32, 96])
def test_groups_that_are_not_the_weights(isa: str, group_size: int) -> None:
    rest = packed_arguments(draw_weight(40, 192, 3), 4, False, torch.float32, 64)
    message = f"group_size {group_size} makes {192 // group_size} groups of 192 columns"
    with library.force_isa(isa), pytest.raises(ValueError, match=message):
        linear_packed(torch.ones(1, 192), None, *rest, 1.0, group_size)


@pytest.mark.parametrize(("bits", "group_size"), [(4, None), (4, 96), (16, None)])
@pytest.mark.parametrize("weight_bits", [3, 4])
def test_rows_are_independent(
    isa: str,
    bits: int,
    group_size: int | None,
    weight_bits: int,
    dtype: torch.dtype,
    assert_rows_independent: Callable[..., None],
) -> None:
    x = (torch.randn(257, 192) * torch.rand(257, 1)).to(dtype)
    weight = draw_weight(80, 192, 2, weight_bits)
    rest = packed_arguments(weight, bits, False, dtype, 64)
    with library.force_isa(isa):
        assert_rows_independent(
            lambda rows: linear_packed(rows, None, *rest, 1.0, group_size), x
        )


def test_no_channels_or_rows(isa: str) -> None:
    weight = draw_weight(0, 24, 3)
    with library.force_isa(isa):
        out = weight.packed_integer(*draw_codes(3, 24, 4, True), dtype=torch.float32)
        assert out.shape == (3, 0)
        weight = draw_weight(5, 24, 3)
        out = weight.packed_weight_only(torch.ones(0, 24), torch.float16)
        assert out.shape == (0, 5)


@pytest.mark.parametrize(("n", "k"), [(1, 1), (16, 4), (17, 5), (40, 63), (50, 64)])
def test_rows_of_an_8_bit_weight(isa: str, n: int, k: int) -> None:
    weight = draw_weight(n, k, bits=8)
    index = torch.randint(n, (9,))
    with library.force_isa(isa):
        fields = weight.packed.weight
    for kind in (torch.int64, torch.int32):
        rows = cpu.unpack_rows(fields, index.to(kind), n, k, 8)
        assert rows.dtype == torch.int8
        assert torch.equal(rows, weight.codes[index])
    assert cpu.unpack_rows(fields, index[:0], n, k, 8).shape == (0, k)


def test_another_weight_is_seen() -> None:
    """What was checked of a weight is kept: its scale may change, move, or be wrong."""
    codes = torch.randint(-8, 8, (16, 24), dtype=torch.int8)
    packed = pack(codes, torch.rand(16, 1) + 0.5, None, 4)
    x, ones = torch.randint(-4, 5, (2, 24)).float(), torch.ones(2, 1)
    zeros = torch.zeros(2, 1, dtype=torch.int32)

    def run(weight: PackedWeight, n: int = 16, code_max: int = 8) -> torch.Tensor:
        return cpu.linear_w4a4(
            x.to(torch.int8), ones, zeros, weight, n, 4, None, torch.float32, code_max
        )

    sums = x @ codes.float().t()
    for _ in range(2):
        assert torch.equal(run(packed), sums * packed.scale)
    other = packed._replace(scale=packed.scale * 2)
    assert torch.equal(run(other), sums * other.scale)
    other.scale.mul_(2)
    assert torch.equal(run(other), sums * other.scale)
    other.scale.data = other.scale * 2
    assert torch.equal(run(other), sums * other.scale)
    for wrong, n, code_max, what in (
        (other, 32, 8, "weight must be"),
        (other, 16, 1 << 28, "int32"),
        (packed._replace(scale=packed.scale.double()), 16, 8, "weight_scale must be"),
        (packed._replace(sum=packed.sum[:, :8]), 16, 8, "weight_sum must be"),
    ):
        with pytest.raises(ValueError, match=what):
            run(wrong, n, code_max)
