# SPDX-License-Identifier: Apache-2.0
"""The grid of KV cache entries: fp16 scale and zero, unsigned codes."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_lowbit.kernels.grid import kv_decode, kv_encode, kv_parameters


def through(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Codes, scale, zero and decoded rows."""
    scale, zero = kv_parameters(x)
    codes = kv_encode(x, scale, zero)
    return codes, scale, zero, kv_decode(codes, scale, zero)


def test_arithmetic_is_the_documented_one(dtype: torch.dtype) -> None:
    x = torch.randn(200, 80) * torch.logspace(-3, 3, 200).unsqueeze(-1)
    x[::3] += 20 * x[::3].abs().amax(-1, keepdim=True)
    x = x.to(dtype)
    codes, scale, zero, decoded = through(x)
    assert (codes.dtype, scale.dtype, zero.dtype, decoded.dtype) == (
        torch.uint8,
        torch.float16,
        torch.float16,
        torch.float64,
    )
    v, f32 = x.float().numpy(), np.float32
    low, high = v.min(-1, keepdims=True), v.max(-1, keepdims=True)
    peak = np.maximum(-low, high)
    expected_scale = np.maximum((high - low) / f32(15), peak / f32(1024))
    expected_scale = np.clip(expected_scale, f32(2.0**-24), f32(65504))
    expected_scale = expected_scale.astype(np.float16)
    inverse = f32(1) / expected_scale.astype(f32)
    expected_zero = np.rint(np.clip(-low * inverse, -1024, 1024) * f32(64)) / f32(64)
    assert expected_zero.dtype == f32
    expected_zero = expected_zero.astype(np.float16)
    steps = v * inverse + expected_zero.astype(f32)
    expected = np.clip(np.rint(steps), 0, 15).astype(np.uint8)
    np.testing.assert_array_equal(scale.numpy(), expected_scale)
    np.testing.assert_array_equal(zero.numpy(), expected_zero)
    np.testing.assert_array_equal(codes.numpy(), expected)
    value = (expected - expected_zero.astype(float)) * expected_scale.astype(float)
    np.testing.assert_array_equal(decoded.numpy(), value)
    # The sample would tell an unrounded scale from the stored one.
    unrounded = np.rint((v - low) / ((high - low) / 15))
    assert (unrounded != expected).any()


def test_ties_round_to_even() -> None:
    x = torch.arange(31) / 2
    codes, scale, zero, _ = through(x)
    assert (scale.item(), zero.item()) == (1.0, 0.0)
    assert codes.tolist() == [round(v) for v in x.tolist()]


@settings(max_examples=200, deadline=None)
@given(
    center=st.floats(-1000, 1000, width=32),
    spread=st.floats(2**-6, 1000, width=32),
    seed=st.integers(0, 1 << 20),
)
def test_error_bound(center: float, spread: float, seed: int) -> None:
    """Half a step, and at the upper end what fp16 takes from scale and zero."""
    random = torch.Generator().manual_seed(seed)
    x = center + spread * torch.rand(64, generator=random)
    codes, scale, zero, decoded = through(x)
    assert int(codes.max()) <= 15
    assert abs(zero.item()) <= 1024
    half_ulp_of_zero = 2.0 ** (np.frexp(max(abs(zero.item()), 2**-14))[1] - 12)
    lost = 15 * 2.0**-11 + max(half_ulp_of_zero, 1 / 128)
    bound = scale.double() * max(0.5, lost) * (1 + 1e-3)
    slack = 4 * 2.0**-24 * x.abs().max()
    assert ((decoded.double() - x).abs() <= bound + slack).all()


def test_zero_makes_sums_exact() -> None:
    """``u - zero`` is a multiple of 1/64 of at most 17 bits, for any finite row."""
    x = torch.randn(500, 64) * torch.logspace(-9, 6, 500).unsqueeze(-1)
    x[::2] += 3000 * x[::2].abs().amax(-1, keepdim=True)
    x[1::8] -= 100 * x[1::8].abs().amax(-1, keepdim=True)
    codes, _, zero, _ = through(x)
    steps = (codes.double() - zero.double()) * 64
    assert torch.equal(steps, steps.round())
    assert steps.abs().max() <= (1024 + 15) * 64 < 1 << 17
    assert zero.abs().max() == 1024 and (zero % 1 != 0).any()


def test_large_offset_widens_the_step() -> None:
    """A narrow row far from zero keeps |zero| where fp16 resolves half a code."""
    for center in (100.0, -3000.0, 60000.0):
        x = center + torch.linspace(-0.5, 0.5, 64)
        _, scale, zero, decoded = through(x)
        torch.testing.assert_close(
            scale.float(), torch.tensor([abs(center) / 1024]), rtol=1e-2, atol=0
        )
        assert 1000 <= abs(zero.item()) <= 1024
        assert (decoded - x).abs().max() <= scale.float() * 1.001


def test_scale_clamp() -> None:
    wide, narrow = torch.tensor([0.0, 3e6, 1e5]), torch.tensor([0.0, 1e-8, 2e-8])
    codes, scale, _, decoded = through(wide)
    assert scale.item() == 65504
    assert codes.tolist() == [0, 15, 2]
    assert decoded.tolist() == [0, 15 * 65504, 2 * 65504]
    codes, scale, _, decoded = through(narrow)
    assert scale.item() == 2.0**-24
    assert (decoded - narrow).abs().max() <= 2.0**-25


@pytest.mark.parametrize("value", [1e30, -1e30, 3e38])
def test_huge_values_are_clipped(value: float) -> None:
    _, scale, zero, decoded = through(torch.tensor([value, 0.0]))
    assert scale.item() == 65504
    assert torch.isfinite(zero).all() and torch.isfinite(decoded).all()
    assert np.sign(decoded[0].item()) == np.sign(value)


def test_range_beyond_float32_is_clipped() -> None:
    _, scale, zero, decoded = through(torch.tensor([3e38, -3e38]))
    assert scale.item() == 65504
    assert torch.isfinite(zero).all() and torch.isfinite(decoded).all()


def test_constant_rows_are_exact_to_fp16() -> None:
    magnitudes = torch.logspace(-6, 4.8, 300)
    values = torch.cat((magnitudes, -magnitudes)).unsqueeze(-1)
    *_, decoded = through(values.expand(-1, 64))
    # fp16 rounds to 2^-11 relative where it is normal.
    normal = values.abs() >= 2.0**-14
    error = (decoded - values).abs() / values.abs()
    assert (error[normal.expand(-1, 64)] <= 2.0**-11).all()
    stored = values.half().float()
    *_, decoded = through(stored.expand(-1, 64))
    assert torch.equal(decoded, stored.double().expand(-1, 64))


@pytest.mark.parametrize("value", [0.0, -0.0, 1e-38, -1e-45])
def test_zero_and_tiny_rows(value: float) -> None:
    codes, scale, zero, decoded = through(torch.full((2, 64), value))
    assert (scale == 1).all() and (zero == 0).all() and (codes == 0).all()
    assert (decoded == 0).all()


@pytest.mark.parametrize("bad", [np.inf, -np.inf, np.nan])
def test_non_finite_rows_stay_nan(bad: float) -> None:
    x = torch.randn(3, 64)
    good = through(x)
    y = x.clone()
    y[1, 40] = bad
    codes, scale, zero, decoded = through(y)
    assert torch.isnan(scale[1]).all() and torch.isnan(zero[1]).all()
    assert (codes[1] == 0).all() and torch.isnan(decoded[1]).all()
    for actual, expected in zip((codes, scale, zero, decoded), good, strict=True):
        assert torch.equal(actual[[0, 2]], expected[[0, 2]])
