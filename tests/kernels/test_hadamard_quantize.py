# SPDX-License-Identifier: Apache-2.0
"""The online transform of activations and their per-token grid, as one operator."""

from collections.abc import Callable

import pytest
import torch

from vllm_lowbit.kernels.grid import IntGrid, decode
from vllm_lowbit.kernels.hadamard import reference as float64_hadamard
from vllm_lowbit.kernels.hadamard_quantize.reference import (
    hadamard_quantize,
    rms_norm_hadamard_quantize,
    swiglu_hadamard_quantize,
    transform,
)

WIDTHS = range(2, 9)
TRANSFORMS = [(1, 1), (64, 1), (448, 1), (28, 16), (112, 4)]


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "affine"])
def test_against_float64(bits: int, symmetric: bool, dtype: torch.dtype) -> None:
    """Scales as from a float64 transform; codes equal except where it is a tie."""
    x = torch.randn(6, 448).to(dtype)
    input_scale = torch.exp2(torch.randint(-3, 4, (448,)).float())
    grid = IntGrid(bits, symmetric)
    for order, stride in TRANSFORMS:
        codes, scale, zero_point = hadamard_quantize(
            x, input_scale, order, stride, bits, symmetric
        )
        assert (codes.dtype, scale.dtype) == (torch.int8, torch.float32)
        assert zero_point.dtype == torch.int32
        assert codes.shape == x.shape and scale.shape == zero_point.shape == (6, 1)
        exact = float64_hadamard.hadamard(x.double() * input_scale, order, stride)
        expected_scale, _ = grid.parameters(exact)
        torch.testing.assert_close(scale, expected_scale, rtol=1e-5, atol=0)
        steps = exact / scale.double()
        if symmetric:
            assert (zero_point == 0).all()
            ideal = steps.round().clamp(grid.code_min, grid.code_max)
        else:
            zero = grid.code_min - (exact.amin(-1, keepdim=True) / scale).round()
            # The zero point itself may sit on a tie.
            assert (zero_point - zero).abs().max() <= 1
            ideal = (steps.round() + zero_point).clamp(grid.code_min, grid.code_max)
        differs = codes.double() != ideal
        tie = (steps - steps.floor() - 0.5).abs() < 1e-3
        assert not (differs & ~tie).any()


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("symmetric", [True, False])
def test_without_transform_it_is_the_grid(
    bits: int, symmetric: bool, dtype: torch.dtype, assert_same_bits: Callable
) -> None:
    x = torch.randn(5, 63).to(dtype)
    input_scale = torch.rand(63) + 0.5
    for scale in (None, input_scale):
        scaled = x.float() if scale is None else x.float() * scale
        expected = IntGrid(bits, symmetric).quantize(scaled)
        actual = hadamard_quantize(x, scale, 1, 1, bits, symmetric)
        for a, b in zip(actual, expected, strict=True):
            assert_same_bits(a, b)


@pytest.mark.parametrize("symmetric", [True, False])
def test_a_clipped_range_ends_in_the_outermost_codes(symmetric: bool) -> None:
    x, grid = torch.randn(50, 448), IntGrid(4, symmetric)
    codes, scale, zero_point = hadamard_quantize(x, None, 1, 1, 4, symmetric, 0.8)
    low, high = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
    spread = torch.maximum(high, -low) / 7 if symmetric else (high - low) / 15
    torch.testing.assert_close(scale, 0.8 * spread)
    least = (grid.code_min - zero_point) * scale
    most = (grid.code_max - zero_point) * scale
    nearest = x.clamp(least, most)
    values = decode(codes, scale, zero_point)
    assert ((values - nearest).abs() <= 0.501 * scale).all()
    # A little clipping is a smaller error than none.
    whole = decode(*hadamard_quantize(x, None, 1, 1, 4, symmetric))
    assert (values - x).square().mean() < (whole - x).square().mean()


@pytest.mark.parametrize("bits", [4, 6, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group_size", [32, 64, 128, 256])
def test_groups_after_the_transform(
    bits: int,
    symmetric: bool,
    group_size: int,
    dtype: torch.dtype,
    assert_same_bits: Callable,
) -> None:
    """Each group of the transformed token as a row of its own."""
    x, input_scale = torch.randn(5, 768).to(dtype), torch.rand(768) + 0.5
    for order, stride in ((1, 1), (768, 1), (192, 1), (12, 64)):
        codes, scale, zero_point = hadamard_quantize(
            x, input_scale, order, stride, bits, symmetric, 0.9, group_size
        )
        groups = 768 // group_size
        assert codes.shape == x.shape
        assert scale.shape == zero_point.shape == (5, groups)
        rows = transform(x, input_scale, order, stride).view(-1, group_size)
        expected = hadamard_quantize(rows, None, 1, 1, bits, symmetric, 0.9)
        for actual, part in zip((codes, scale, zero_point), expected, strict=True):
            assert_same_bits(actual.reshape(part.shape), part)


def test_one_group_is_the_token(assert_same_bits: Callable) -> None:
    x = torch.randn(5, 256)
    for symmetric in (True, False):
        form = 256, 1, 4, symmetric, 0.9
        expected = hadamard_quantize(x, None, *form)
        for a, b in zip(hadamard_quantize(x, None, *form, 256), expected, strict=True):
            assert_same_bits(a, b)


def test_groups_are_closer_to_an_input_of_many_magnitudes() -> None:
    x = torch.randn(20, 512) * torch.logspace(-2, 1, 512)
    codes, scale, zero_point = hadamard_quantize(x, None, 1, 1, 4, False, 1.0, 64)
    parts = codes.unflatten(-1, (8, 64))
    grouped = decode(parts, scale.unsqueeze(-1), zero_point.unsqueeze(-1)).flatten(-2)
    whole = decode(*hadamard_quantize(x, None, 1, 1, 4, False))
    errors = [(values - x)[:, :256].square().mean() for values in (grouped, whole)]
    assert errors[0] < errors[1] / 10
    assert (grouped - x).square().mean() < (whole - x).square().mean()


@pytest.mark.parametrize("order", [1, 128])
def test_groups_of_the_fused_prologues(order: int, assert_same_bits: Callable) -> None:
    x, weight = torch.randn(4, 256), torch.rand(128) + 0.5
    rest = None, order, 1, 4, False, 0.9, 32
    v = x[:, :128]
    normed = v * torch.rsqrt(v.square().mean(-1, keepdim=True) + 1e-5) * weight
    gated = torch.nn.functional.silu(v) * x[:, 128:]
    for actual, values in (
        (rms_norm_hadamard_quantize(v, weight, 1e-5, *rest), normed),
        (swiglu_hadamard_quantize(x, *rest), gated),
    ):
        for a, b in zip(actual, hadamard_quantize(values, *rest), strict=True):
            assert_same_bits(a, b)


@pytest.mark.parametrize("clip_ratio", [0.0, -1.0, 1.5, float("nan")])
def test_clip_ratios_that_do_not_exist(clip_ratio: float) -> None:
    with pytest.raises(ValueError, match="clip_ratio must be above 0 and at most 1"):
        hadamard_quantize(torch.ones(1, 4), None, 1, 1, 4, True, clip_ratio)


def test_input_scale_comes_before_the_transform() -> None:
    x, input_scale = torch.randn(3, 80), torch.rand(80) + 0.5
    before = float64_hadamard.hadamard(x.double() * input_scale, 80)
    after = float64_hadamard.hadamard(x.double(), 80) * input_scale
    actual = transform(x, input_scale, 80, 1)
    torch.testing.assert_close(actual.double(), before, rtol=0, atol=1e-5)
    assert (actual - after).abs().max() > 0.1


def test_direction_is_h_and_not_its_transpose() -> None:
    x = torch.randn(2, 28)
    h = float64_hadamard.hadamard(x, 28)
    ht = float64_hadamard.hadamard(x, 28, transpose=True)
    actual = transform(x, None, 28, 1).double()
    torch.testing.assert_close(actual, h, rtol=0, atol=1e-5)
    assert (actual - ht).abs().max() > 0.1
    back = transform(x, None, 28, 1, transpose=True).double()
    torch.testing.assert_close(back, ht, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("order", "stride"), [(192, 1), (384, 1), (12, 16), (1, 1)])
def test_transpose_is_the_inverse(order: int, stride: int) -> None:
    x = torch.randn(3, 384)
    there = transform(x, None, order, stride)
    back = transform(there, None, order, stride, transpose=True)
    torch.testing.assert_close(back, x, rtol=0, atol=1e-5)
    if order > 1:
        wrong = transform(there, None, order, stride)
        assert (wrong - x).abs().max() > 0.1


def test_input_scale_comes_before_the_transpose_too() -> None:
    x, input_scale = torch.randn(3, 24), torch.rand(24) + 0.5
    before = float64_hadamard.hadamard(x.double() * input_scale, 24, transpose=True)
    actual = transform(x, input_scale, 24, 1, transpose=True)
    torch.testing.assert_close(actual.double(), before, rtol=0, atol=1e-5)


def test_an_outlier_is_spread() -> None:
    """What the transform is for: one large channel no longer sets everyone's step."""
    x = torch.randn(4, 256)
    x[:, 7] = 100.0
    plain = hadamard_quantize(x, None, 1, 1, 4, True)
    spread = hadamard_quantize(x, None, 256, 1, 4, True)
    assert (spread[1] < plain[1] / 5).all()
    back = float64_hadamard.hadamard(decode(*spread), 256, transpose=True)
    error = (back - x).square().mean()
    assert error < (decode(*plain) - x).square().mean() / 2


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group_size", [None, 56])
def test_rows_are_independent(
    assert_rows_independent: Callable[..., None],
    dtype: torch.dtype,
    symmetric: bool,
    group_size: int | None,
) -> None:
    x = (torch.randn(257, 224) * torch.rand(257, 1) * 10).to(dtype)
    input_scale = torch.exp2(torch.randint(-2, 3, (224,)).float())
    for order, stride in ((224, 1), (28, 8)):
        assert_rows_independent(
            lambda rows, o=order, s=stride: hadamard_quantize(
                rows, input_scale, o, s, 4, symmetric, 1.0, group_size
            ),
            x,
        )


@pytest.mark.parametrize("bad", [torch.inf, -torch.inf, torch.nan])
@pytest.mark.parametrize("order", [1, 80])
def test_non_finite_stays_in_its_row(bad: float, order: int) -> None:
    x = torch.randn(3, 80)
    clean = hadamard_quantize(x, None, order, 1, 4, False)
    x[1, 5] = bad
    codes, scale, zero_point = hadamard_quantize(x, None, order, 1, 4, False)
    assert torch.isnan(scale[1]).all() and (codes[1] == 0).all()
    for a, b in zip((codes, scale, zero_point), clean, strict=True):
        assert torch.equal(a[[0, 2]], b[[0, 2]])


def test_zero_rows_and_no_rows() -> None:
    codes, scale, _ = hadamard_quantize(torch.zeros(2, 80), None, 80, 1, 4, True)
    assert (codes == 0).all() and (scale == 1).all()
    codes, scale, zero_point = hadamard_quantize(
        torch.empty(0, 80), None, 80, 1, 4, True
    )
    assert codes.shape == (0, 80)
    assert scale.shape == zero_point.shape == (0, 1)


def test_input_is_not_changed(dtype: torch.dtype) -> None:
    x = torch.randn(3, 64).to(dtype)
    before = x.clone()
    for order in (1, 64):
        hadamard_quantize(x, torch.full((64,), 2.0), order, 1, 4, False)
        hadamard_quantize(x, None, order, 1, 4, True)
    assert torch.equal(x, before)


@pytest.mark.parametrize(
    ("order", "stride", "bits", "message"),
    [
        (64, 1, 9, "bits must be 2 to 8, got 9"),
        (64, 1, 1, "bits must be 2 to 8, got 1"),
        (6, 1, 4, "no Hadamard matrix of order 6"),
        (128, 1, 4, "order 128 x stride 1 do not divide a dimension of 192"),
        (64, 2, 4, "order 64 x stride 2 do not divide a dimension of 192"),
    ],
)
def test_errors(order: int, stride: int, bits: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        hadamard_quantize(torch.ones(2, 192), None, order, stride, bits, True)
