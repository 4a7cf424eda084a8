# SPDX-License-Identifier: Apache-2.0
"""Weight-only linear against its float64 reference."""

from collections.abc import Callable
from dataclasses import replace
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_lowbit.kernels.gpu.configs import LinearConfig
from vllm_lowbit.kernels.gpu.weights import pack
from vllm_lowbit.kernels.linear_wna16 import reference, triton
from vllm_lowbit.kernels.linear_wna16.triton import linear_wna16

SWAPPED = LinearConfig(16, 32, 4, 2, True)
NATURAL = LinearConfig(32, 16, 4, 2, False)
SPLIT = LinearConfig(16, 64, 4, 2, True, split_k=3)
BF16, FP16 = torch.bfloat16, torch.float16


def check(
    m: int,
    n: int,
    k: int,
    group_size: int,
    bits: int,
    config: LinearConfig,
    dtype: torch.dtype = BF16,
    zeros: bool = False,
    bias: bool = True,
) -> None:
    """Within float32 rounding of sums of products as large as they can be."""
    half, groups = 1 << bits - 1, k // group_size if group_size else 1
    weight = torch.randint(-half, half, (n, k), dtype=torch.int8)
    weight[0], weight[-1] = half - 1, -half
    scale = torch.rand(n, groups) + 0.01
    zero = torch.randint(-half, half, (n, groups)) if zeros else None
    x = torch.randn(m, k).to(dtype)
    offset = torch.randn(n) if bias else None
    packed = pack(weight, scale, zero, bits, widen=False)
    actual = linear_wna16(
        x, packed.weight, packed.scale, packed.zero, offset, bits, torch.float32, config
    )
    arguments = (weight, scale, zero, offset, torch.float64)
    expected = reference.linear_wna16(x, *arguments)
    sizes = reference.linear_wna16(
        x.abs(),
        weight.short().abs(),
        scale,
        None if zero is None else -zero.abs(),
        None if offset is None else offset.abs(),
        torch.float64,
    )
    assert actual.shape == (m, n)
    assert bool(((actual - expected).abs() <= 2e-6 * sizes + 1e-9).all())


def check_both(dtype: torch.dtype, bits: int, group_size: int) -> None:
    k = 512 if group_size == 256 else 3 * group_size or 200
    for zeros, config in ((False, SWAPPED), (True, NATURAL)):
        check(19, 37, k, group_size, bits, config, dtype, zeros)


BITS, GROUP_SIZES = (2, 3, 4, 8), (0, 32, 64, 128, 256)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("group_size", GROUP_SIZES)
def test_close_to_the_reference(bits: int, group_size: int) -> None:
    """Both types at every width and at every size of groups; 6 bits are held as 8."""
    place = BITS.index(bits) + GROUP_SIZES.index(group_size)
    check_both((BF16, FP16)[place % 2], bits, group_size)
    if (bits, group_size) == (8, 64):
        check_both(FP16, 6, group_size)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
@pytest.mark.parametrize("bits", [*BITS, 6])
@pytest.mark.parametrize("group_size", GROUP_SIZES)
def test_every_type(dtype: torch.dtype, bits: int, group_size: int) -> None:
    check_both(dtype, bits, group_size)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("group_size", [0, 128])
def test_split_k(
    bits: int, group_size: int, many_processors: Callable[[str], None]
) -> None:
    many_processors("linear_wna16")
    check(5, 40, 1536, group_size, bits, SPLIT, zeros=True)


@pytest.mark.parametrize("m", [1, 15, 17, 70])
def test_ragged_tiles(m: int) -> None:
    for config in (SWAPPED, NATURAL):
        check(m, 33, 128, 0, 4, config)


def test_nothing_to_do() -> None:
    check(0, 20, 128, 0, 4, SWAPPED)


@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
@pytest.mark.parametrize("field", range(16))
def test_numbers_of_fields(dtype: torch.dtype, field: int) -> None:
    """The trick by which a GPU makes numbers of fields, which bfloat16 hides here."""
    bits, base = (0x4300, 128) if dtype == BF16 else (0x6400, 1024)
    number = torch.tensor(bits | field, dtype=torch.int16).view(dtype)
    for zero in range(24):
        shift = torch.tensor(base + zero, dtype=torch.float32).to(dtype)
        assert (number - shift).item() == field - zero


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
    group_size = data.draw(st.sampled_from(GROUP_SIZES))
    config = data.draw(st.sampled_from((SWAPPED, NATURAL)))
    arguments = (
        data.draw(st.integers(1, 40)),
        data.draw(st.integers(1, 70)),
        data.draw(st.integers(1, 6)) * (group_size or 110),
        group_size,
        data.draw(st.sampled_from((*BITS, 6))),
        replace(config, split_k=data.draw(st.integers(1, 4))),
        data.draw(st.sampled_from((BF16, FP16))),
        data.draw(st.booleans()),
        data.draw(st.booleans()),
    )
    with mock.patch.object(triton, "processors", lambda device: 1 << 20):
        check(*arguments)


@pytest.mark.slow
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_layer_of_a_model(bits: int) -> None:
    check(64, 1024, 4096, 128, bits, LinearConfig(64, 128, 8, 3, True), zeros=True)
