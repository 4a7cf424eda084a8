# SPDX-License-Identifier: Apache-2.0
"""Integer linear: int32 sums and outputs equal to the reference's."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import product
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_lowbit.kernels.gpu import configs
from vllm_lowbit.kernels.gpu.configs import LinearConfig, Weight
from vllm_lowbit.kernels.gpu.weights import pack
from vllm_lowbit.kernels.linear_w4a4 import reference, triton
from vllm_lowbit.kernels.linear_w4a4.triton import linear_w4a4

TILES = {
    "swapped": LinearConfig(16, 32, 4, 2, True),
    "natural": LinearConfig(32, 16, 4, 2, False),
}
SPLIT = LinearConfig(16, 128, 4, 2, True, split_k=3)


@dataclass(frozen=True)
class Problem:
    """Random operands of a linear, with every extreme code in them."""

    codes: torch.Tensor
    scale: torch.Tensor
    zero_point: torch.Tensor | None
    weight: torch.Tensor
    weight_scale: torch.Tensor
    weight_zero: torch.Tensor | None
    bias: torch.Tensor | None
    bits: int
    activation_bits: int

    def run(self, config: LinearConfig, dtype: torch.dtype) -> torch.Tensor:
        packed = pack(
            self.weight, self.weight_scale, self.weight_zero, self.bits, widen=True
        )
        return linear_w4a4(
            *(self.codes, self.scale, self.zero_point, *packed, self.bias),
            *(self.activation_bits, dtype, config),
        )

    def expected(self, dtype: torch.dtype) -> torch.Tensor:
        zero = self.zero_point
        if zero is None:
            zero = torch.zeros(self.scale.shape, dtype=torch.int32)
        return reference.linear_w4a4(
            self.codes,
            self.scale,
            zero,
            self.weight,
            self.weight_scale,
            self.weight_zero,
            self.bias,
            dtype,
        )


def problem(
    m: int,
    n: int,
    k: int,
    group_size: int = 0,
    *,
    bits: int = 4,
    activation_bits: int = 4,
    asymmetric: bool = False,
    weight_zeros: bool = False,
    bias: bool = True,
    of_groups: bool = False,
) -> Problem:
    half, ahalf = 1 << bits - 1, 1 << activation_bits - 1
    groups = k // group_size if group_size else 1
    weight = torch.randint(-half, half, (n, k), dtype=torch.int8)
    codes = torch.randint(-ahalf, ahalf, (m, k), dtype=torch.int8)
    weight[0], weight[-1] = half - 1, -half
    codes[0], codes[-1] = ahalf - 1, -ahalf
    of_token = m, groups if of_groups else 1
    zeros = torch.randint(-ahalf, ahalf, of_token, dtype=torch.int32)
    return Problem(
        codes,
        torch.rand(of_token) + 0.01,
        zeros if asymmetric else None,
        weight,
        torch.rand(n, groups) + 0.01,
        torch.randint(-half, half, (n, groups)) if weight_zeros else None,
        torch.randn(n) if bias else None,
        bits,
        activation_bits,
    )


def columns_of(group_size: int) -> int:
    """A few groups, the last of which does not fill a block where it can."""
    return 512 if group_size == 256 else 3 * group_size or 200


@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("group_size", [0, 32, 64, 128, 256])
def test_equals_the_reference(tile: str, bits: int, group_size: int) -> None:
    check_equality(tile, bits, group_size)


@pytest.mark.parametrize(
    ("bits", "group_size"), [(2, 32), (3, 0), (3, 128), (6, 0), (6, 64)]
)
def test_codes_that_are_stored_wider(bits: int, group_size: int) -> None:
    """2 and 3 bits in nibbles, 6 in bytes: the kernels of 4 and 8."""
    check_equality("swapped", bits, group_size)


@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize(("bits", "activation_bits"), [(4, 4), (8, 6), (2, 8)])
@pytest.mark.parametrize("group_size", [32, 64, 128, 256])
def test_groups_of_tokens(
    tile: str, bits: int, activation_bits: int, group_size: int
) -> None:
    check_equality(tile, bits, group_size, activation_bits, of_groups=True)


def tiles_with_groups_of_tokens() -> list[tuple[int, int, bool, bool]]:
    """Rows and columns, swapped or not, e4m3 or not, of the tables of all chips."""
    found = set()
    weights = [
        Weight(*form, token_groups=True)
        for form in product((4, 8), (32, 64, 128, 256), (False, True))
    ]
    for chip in (*configs.architectures(), configs.FALLBACK):
        for table in (
            configs.table(chip)["linear_w4a4"]["group"],
            configs.rows_for_experts(chip, "linear_w4a4", "group"),
        ):
            for row in (row for w in weights for row in configs.rows_of(table, w)):
                c = row.config
                found.add((c.block_m, c.block_n, c.swap, c.e4m3))
    return sorted(found)


@pytest.mark.parametrize("tile", tiles_with_groups_of_tokens(), ids=str)
def test_tiles_of_the_tables_with_groups_of_tokens(
    tile: tuple[int, int, bool, bool],
) -> None:
    """Not filled: by 70 tokens, 150 channels and three groups of 64."""
    block_m, block_n, swap, e4m3 = tile
    config = LinearConfig(block_m, block_n, 4, 2, swap, e4m3=e4m3)
    for group_size in (64, 128):
        options = {"asymmetric": True, "weight_zeros": True, "of_groups": True}
        p = problem(70, 150, 3 * group_size, group_size, **options)
        assert torch.equal(p.run(config, torch.float32), p.expected(torch.float32))


def check_equality(
    tile: str,
    bits: int,
    group_size: int,
    activation_bits: int = 0,
    of_groups: bool = False,
) -> None:
    k = columns_of(group_size)
    for asymmetric in (False, True):
        p = problem(
            19,
            37,
            k,
            group_size,
            bits=bits,
            activation_bits=activation_bits or (4 if bits == 4 else 8),
            asymmetric=asymmetric,
            weight_zeros=asymmetric,
            of_groups=of_groups,
        )
        assert torch.equal(p.run(TILES[tile], torch.float32), p.expected(torch.float32))


@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize("group_size", [0, 32, 64, 128, 256])
def test_e4m3_has_the_sums_of_int8(tile: str, group_size: int) -> None:
    config, zeros = replace(TILES[tile], e4m3=True), tile == "natural"
    k = columns_of(group_size)
    for of_groups in {False, group_size != 0}:
        options = {"weight_zeros": zeros, "of_groups": of_groups}
        p = problem(19, 37, k, group_size, asymmetric=zeros, **options)
        assert torch.equal(p.run(config, torch.float32), p.expected(torch.float32))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("bias", [False, True])
def test_output_types(dtype: torch.dtype, bias: bool) -> None:
    p = problem(5, 20, 128, bias=bias)
    assert torch.equal(p.run(TILES["swapped"], dtype), p.expected(dtype))


def test_bfloat16_output() -> None:
    """The interpreter cuts off where a GPU rounds: one step apart at most."""
    p = problem(5, 20, 128)
    actual = p.run(TILES["swapped"], torch.bfloat16).view(torch.int16).int()
    expected = p.expected(torch.bfloat16).view(torch.int16).int()
    assert actual.sub(expected).abs().max() <= 1


@pytest.mark.parametrize("m", [1, 15, 16, 17, 130])
@pytest.mark.parametrize("n", [1, 33])
def test_ragged_tiles(m: int, n: int) -> None:
    p = problem(m, n, 128)
    for config in TILES.values():
        assert torch.equal(p.run(config, torch.float32), p.expected(torch.float32))


@pytest.mark.parametrize(("bits", "e4m3"), [(4, False), (4, True), (8, False)])
@pytest.mark.parametrize("asymmetric", [False, True])
def test_split_k_is_exact(
    bits: int, e4m3: bool, asymmetric: bool, many_processors: Callable[[str], None]
) -> None:
    many_processors("linear_w4a4")
    p = problem(5, 600, 800, bits=bits, asymmetric=asymmetric, weight_zeros=asymmetric)
    config = replace(SPLIT, e4m3=e4m3)
    assert torch.equal(p.run(config, torch.float32), p.expected(torch.float32))


@pytest.mark.parametrize("group_size", [32, 128, 256])
def test_split_k_with_groups(
    group_size: int, many_processors: Callable[[str], None]
) -> None:
    """Parts are added in another order than the reference's groups: rounding only."""
    many_processors("linear_w4a4")
    k = 6 * max(group_size, 128)
    for of_groups in (False, True):
        options = {"weight_zeros": True, "of_groups": of_groups}
        p = problem(7, 40, k, group_size, asymmetric=True, **options)
        assert_near(p.run(SPLIT, torch.float32), p.expected(torch.float32))


def assert_near(actual: torch.Tensor, expected: torch.Tensor) -> None:
    assert (actual - expected).abs().max() <= 2e-6 * expected.abs().max()


def test_largest_sums() -> None:
    """All codes at their extremes, over a long K."""
    p = problem(2, 2, 8192, bits=8, activation_bits=8, bias=False)
    assert torch.equal(
        p.run(TILES["natural"], torch.float32), p.expected(torch.float32)
    )


def test_nothing_to_do() -> None:
    p = problem(1, 20, 128)
    empty = Problem(**{**vars(p), "codes": p.codes[:0], "scale": p.scale[:0]})
    assert empty.run(TILES["swapped"], torch.float32).shape == (0, 20)


@pytest.mark.parametrize("of_groups", [False, True])
def test_a_row_does_not_depend_on_the_batch(of_groups: bool) -> None:
    p = problem(33, 40, 256, 128, asymmetric=True, of_groups=of_groups)
    whole = p.run(TILES["swapped"], torch.float32)
    one = Problem(
        **{
            **vars(p),
            "codes": p.codes[20:21],
            "scale": p.scale[20:21],
            "zero_point": p.zero_point[20:21] if p.zero_point is not None else None,
        }
    )
    assert torch.equal(one.run(TILES["natural"], torch.float32), whole[20:21])


@settings(max_examples=20)
@given(data=st.data())
def test_any_shape(data: st.DataObject) -> None:
    check_any_shape(data)


@pytest.mark.slow
@settings(max_examples=300)
@given(data=st.data())
def test_many_shapes(data: st.DataObject) -> None:
    check_any_shape(data)


def check_any_shape(data: st.DataObject) -> None:
    """Also cut along K into up to as many parts as there are."""
    group_size = data.draw(st.sampled_from((0, 32, 64, 128, 256)))
    bits = data.draw(st.sampled_from((2, 3, 4, 6, 8)))
    asymmetric, weight_zeros, bias, narrow, of_groups = (
        data.draw(st.booleans()) for _ in range(5)
    )
    p = problem(
        data.draw(st.integers(1, 40)),
        data.draw(st.integers(1, 70)),
        data.draw(st.integers(1, 6)) * (group_size or 110),
        group_size,
        bits=bits,
        activation_bits=4 if narrow else 8,
        asymmetric=asymmetric,
        weight_zeros=weight_zeros,
        bias=bias,
        of_groups=of_groups,
    )
    config = replace(
        TILES[data.draw(st.sampled_from(tuple(TILES)))],
        split_k=data.draw(st.integers(1, 4)),
        e4m3=narrow and bits <= 4,
    )
    with mock.patch.object(triton, "processors", lambda device: 1 << 20):
        actual, expected = p.run(config, torch.float32), p.expected(torch.float32)
    if group_size == 0 or config.split_k == 1:
        assert torch.equal(actual, expected)
    else:
        assert_near(actual, expected)


@pytest.mark.slow
@pytest.mark.parametrize("group_size", [0, 128])
@pytest.mark.parametrize("e4m3", [False, True])
def test_layer_of_a_model(group_size: int, e4m3: bool) -> None:
    p = problem(64, 1024, 4096, group_size, asymmetric=True)
    config = LinearConfig(64, 128, 8, 3, True, e4m3=e4m3)
    assert torch.equal(p.run(config, torch.float32), p.expected(torch.float32))
