# SPDX-License-Identifier: Apache-2.0
"""Integer grids of weights and activations, every width and kind."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_lowbit.kernels.grid import TINY, IntGrid, decode

WIDTHS = range(2, 9)
GRIDS = [
    IntGrid(bits, symmetric, full_range)
    for bits in WIDTHS
    for symmetric, full_range in ((True, False), (True, True), (False, False))
]


def name(grid: object) -> str:
    if not isinstance(grid, IntGrid):
        return ""
    kind = "full" if grid.full_range else "symmetric" if grid.symmetric else "affine"
    return f"{grid.bits}-{kind}"


every_grid = pytest.mark.parametrize("grid", GRIDS, ids=name)


def samples() -> list[torch.Tensor]:
    """Rows of odd sizes, many magnitudes, offsets and types."""
    random = torch.Generator().manual_seed(1)
    rows = []
    for size in (1, 2, 63, 1000):
        x = torch.randn(40, size, generator=random)
        x *= torch.logspace(-20, 20, 40).unsqueeze(-1)
        x[::4] += 2 * x[::4].abs().amax(-1, keepdim=True)
        x[1::4] -= 3 * x[1::4].abs().amax(-1, keepdim=True)
        rows += [x, x[10:30].bfloat16(), x[18:22].half()]
    return rows


def numpy_quantize(
    x: torch.Tensor, grid: IntGrid
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The documented arithmetic for ordinary rows, one IEEE operation at a time."""
    v = x.float().numpy()
    low, high = v.min(-1, keepdims=True), v.max(-1, keepdims=True)
    one, qmax = np.float32(1), 2 ** (grid.bits - 1) - 1
    qmin = -qmax if grid.symmetric and not grid.full_range else -qmax - 1
    peak = np.maximum(np.abs(low), np.abs(high))
    if grid.symmetric:
        scale = peak / np.float32(qmax)
    else:
        low, high = np.minimum(low, np.float32(0)), np.maximum(high, np.float32(0))
        scale = (high - low) / np.float32(2**grid.bits - 1)
    if v.shape[-1] == 1:
        scale = peak
    assert scale.dtype == np.float32
    inverse = one / scale
    zero_point = np.zeros(scale.shape, np.int32)
    if not grid.symmetric:
        zero_point = qmin - np.rint(low * inverse).astype(np.int32)
    codes = np.clip(np.rint(v * inverse) + zero_point, qmin, qmax)
    return codes.astype(np.int8), scale, zero_point


@pytest.mark.parametrize("bits", WIDTHS)
def test_range_of_codes(bits: int) -> None:
    symmetric, full = IntGrid(bits), IntGrid(bits, full_range=True)
    affine = IntGrid(bits, symmetric=False)
    half = 2 ** (bits - 1)
    assert (symmetric.code_min, symmetric.code_max) == (1 - half, half - 1)
    assert (full.code_min, full.code_max) == (-half, half - 1)
    assert (affine.code_min, affine.code_max) == (-half, half - 1)
    assert [g.max_difference for g in (symmetric, full, affine)] == [
        half - 1,
        half,
        2 * half - 1,
    ]
    for grid in (symmetric, full, affine):
        assert grid.code_min + grid.offset >= 0
        assert grid.code_max + grid.offset == 2**bits - 1


def test_four_bit_ranges_are_those_of_the_design() -> None:
    assert (IntGrid(4).code_min, IntGrid(4).code_max) == (-7, 7)
    assert IntGrid(4, full_range=True).code_min == -8
    affine = IntGrid(4, symmetric=False)
    assert (affine.code_min + affine.offset, affine.code_max + affine.offset) == (0, 15)


@pytest.mark.parametrize("bits", [-1, 0, 1, 9, 16])
def test_width_without_a_grid(bits: int) -> None:
    with pytest.raises(ValueError, match=f"bits must be 2 to 8, got {bits}"):
        IntGrid(bits)


def test_full_range_is_symmetric_only() -> None:
    with pytest.raises(ValueError, match="full_range applies to symmetric grids only"):
        IntGrid(4, symmetric=False, full_range=True)


@every_grid
def test_arithmetic_is_the_documented_one(grid: IntGrid) -> None:
    for x in samples():
        codes, scale, zero_point = grid.quantize(x)
        assert (codes.dtype, scale.dtype) == (torch.int8, torch.float32)
        assert zero_point.dtype == torch.int32
        assert codes.shape == x.shape
        assert scale.shape == zero_point.shape == (*x.shape[:-1], 1)
        expected = numpy_quantize(x, grid)
        np.testing.assert_array_equal(scale.numpy(), expected[1])
        np.testing.assert_array_equal(zero_point.numpy(), expected[2])
        np.testing.assert_array_equal(codes.numpy(), expected[0])


@every_grid
def test_ties_round_to_even(grid: IntGrid) -> None:
    """With a scale of 1, k + 1/2 goes to the even neighbour."""
    top = grid.code_max if grid.symmetric else 2**grid.bits - 1
    halves = torch.arange(0, top) + 0.5
    low = -halves if grid.symmetric else halves
    x = torch.cat((torch.tensor([float(top), 0.0]), halves, low))
    codes, scale, zero_point = grid.quantize(x)
    assert scale.item() == 1.0
    steps = (codes.int() - zero_point)[2 : 2 + len(halves)]
    even = [k if k % 2 == 0 else k + 1 for k in range(top)]
    assert steps.tolist() == even
    if grid.symmetric:
        below = (codes.int() - zero_point)[2 + len(halves) :]
        assert below.tolist() == [-k for k in even]


@pytest.mark.parametrize("bits", range(3, 9))
def test_codes_use_the_rounded_scale(bits: int) -> None:
    """Half of the peak is a tie for the exact scale, but not for the rounded one."""
    peak = torch.arange(1, 1000, dtype=torch.float32).unsqueeze(-1)
    x = torch.cat((peak, peak / 2), dim=-1)
    codes, scale, _ = IntGrid(bits).quantize(x)
    inverse = np.float32(1) / scale.numpy()
    expected = np.rint(x.numpy() * inverse).astype(np.int8)
    np.testing.assert_array_equal(codes.numpy(), expected)
    top = 2 ** (bits - 1) - 1
    tie = top // 2 if top // 2 % 2 == 0 else top // 2 + 1
    assert (expected[:, 1] != tie).any(), "the sample tells nothing"


@every_grid
def test_error_is_at_most_half_a_step(grid: IntGrid) -> None:
    for x in samples():
        codes, scale, zero_point = grid.quantize(x)
        error = (decode(codes, scale, zero_point).double() - x.double()).abs()
        # Slack: three float32 roundings of a value of up to 2^bits steps.
        assert (error <= scale * (0.5 + 3 * 2.0 ** (grid.bits - 24))).all()


@every_grid
def test_zero_is_a_code_and_decodes_to_zero(grid: IntGrid) -> None:
    for x in samples():
        x = torch.cat((x.float(), torch.zeros(len(x), 1)), dim=-1)
        codes, scale, zero_point = grid.quantize(x)
        assert ((zero_point >= grid.code_min) & (zero_point <= grid.code_max)).all()
        assert (decode(codes, scale, zero_point)[:, -1] == 0).all()


@settings(max_examples=150, deadline=None)
@given(
    grid=st.sampled_from(GRIDS),
    row=st.lists(st.floats(-(2.0**100), 2.0**100, width=32), min_size=1, max_size=20),
    ratio=st.floats(0.5, 1.0),
)
def test_codes_and_differences_stay_in_bounds(
    grid: IntGrid, row: list[float], ratio: float
) -> None:
    x = torch.tensor(row)
    scale, zero_point = grid.parameters(x, ratio)
    codes = grid.encode(x, scale, zero_point).int()
    assert grid.code_min <= int(codes.min()) <= int(codes.max()) <= grid.code_max
    assert grid.code_min <= int(zero_point) <= grid.code_max
    assert int((codes - zero_point).abs().max()) <= grid.max_difference
    assert torch.isfinite(scale).all() and float(scale) > 0


@every_grid
def test_max_difference_is_reached(grid: IntGrid) -> None:
    x = torch.tensor([0.0, 1.0])
    if grid.full_range:  # Only a clipped range reaches the extra code.
        scale, zero_point = grid.parameters(-x, 0.5)
        codes = grid.encode(-x, scale, zero_point)
    else:
        codes, scale, zero_point = grid.quantize(x)
    assert int((codes.int() - zero_point).abs().max()) == grid.max_difference


@every_grid
def test_clip_ratio_per_row(grid: IntGrid) -> None:
    x = torch.randn(5, 33)
    ratios = torch.tensor([1.0, 0.9, 0.75, 0.5, 0.8]).unsqueeze(-1)
    scale, zero_point = grid.parameters(x, ratios)
    for i, ratio in enumerate(ratios.flatten()):
        alone = grid.parameters(x[i], ratio.item())
        assert torch.equal(alone[0], scale[i])
        assert torch.equal(alone[1], zero_point[i])
    whole, _ = grid.parameters(x)
    torch.testing.assert_close(scale, whole * ratios, rtol=1e-6, atol=0)


class TestDegenerateRows:
    @every_grid
    @pytest.mark.parametrize("value", [0.0, -0.0, 1e-38, -(2.0**-101), 1e-45])
    def test_zero_and_tiny(self, grid: IntGrid, value: float) -> None:
        x = torch.full((1, 9), value)
        x[0, 3] = 0.0
        codes, scale, zero_point = grid.quantize(x)
        assert scale.item() == 1.0
        assert (codes == zero_point).all()
        assert (decode(codes, scale, zero_point) == 0).all()

    def test_smallest_magnitude_that_is_kept(self) -> None:
        grid = IntGrid(4)
        x = torch.tensor([[TINY, 0.0], [TINY * (1 - 2.0**-24), 0.0]])
        codes, scale, _ = grid.quantize(x)
        assert codes.tolist() == [[7, 0], [0, 0]]
        assert scale[0].item() < TINY and scale[1].item() == 1.0

    @every_grid
    def test_constant_rows_are_exact(self, grid: IntGrid) -> None:
        values = torch.tensor([1.0, 0.1, 7.0, 1 / 3, 1e-25, 3e38, 65504.0])
        values = torch.cat((values, -values)).unsqueeze(-1)
        for size in (1, 2, 64):
            x = values.expand(-1, size)
            codes, scale, zero_point = grid.quantize(x)
            assert torch.equal(scale, values.abs())
            assert torch.equal(decode(codes, scale, zero_point), x)

    @every_grid
    @pytest.mark.parametrize("bad", [np.inf, -np.inf, np.nan])
    def test_non_finite_stays_visible_in_its_row(
        self, grid: IntGrid, bad: float
    ) -> None:
        x = torch.randn(4, 31)
        good = grid.quantize(x)
        for column in (0, 17, 30):
            y = x.clone()
            y[2, column] = bad
            codes, scale, zero_point = grid.quantize(y)
            assert torch.isnan(scale[2]).all()
            assert (codes[2] == 0).all()
            assert torch.isnan(decode(codes, scale, zero_point)[2]).all()
            others = [0, 1, 3]
            for actual, expected in zip((codes, scale, zero_point), good, strict=True):
                assert torch.equal(actual[others], expected[others])
        assert torch.isnan(grid.quantize(torch.full((1, 5), bad))[1]).all()

    def test_range_beyond_float32(self) -> None:
        """Only a row with an Inf or NaN may lose its scale."""
        codes, scale, zero_point = IntGrid(4, symmetric=False).quantize(
            torch.tensor([3e38, -3e38, 0.0])
        )
        assert torch.isfinite(scale).all()
        assert (codes != 0).any()

    def test_no_rows(self) -> None:
        codes, scale, zero_point = IntGrid(4).quantize(torch.empty(0, 8))
        assert codes.shape == (0, 8)
        assert scale.shape == zero_point.shape == (0, 1)


@pytest.mark.parametrize("group_size", [1, 32, 63, 64, 4032])
@pytest.mark.parametrize("grid", [IntGrid(4), IntGrid(8, False)], ids=name)
def test_a_group_is_a_row(grid: IntGrid, group_size: int) -> None:
    n = 4032
    x = torch.randn(3, n) * torch.logspace(-3, 3, n)
    x[0, :group_size], x[1, -1] = 0, torch.nan
    grouped = replace(grid, group_size=group_size)
    groups = n // group_size
    assert grouped.groups(n) == groups
    codes, scale, zero_point = grouped.quantize(x)
    assert codes.shape == x.shape and codes.dtype == torch.int8
    assert scale.shape == zero_point.shape == (3, groups)
    rows = x.reshape(3 * groups, group_size)
    assert torch.equal(
        grouped.rows(x).reshape(rows.shape).nan_to_num(), rows.nan_to_num()
    )
    expected = grid.quantize(rows)
    for actual, part in zip((codes, scale, zero_point), expected, strict=True):
        assert torch.equal(actual.flatten().nan_to_num(), part.flatten().nan_to_num())
    # What is not finite stays in its group.
    assert int(scale.isnan().sum()) == 1 and scale[1, -1].isnan()


@pytest.mark.parametrize(
    ("group_size", "n", "message"),
    [
        (0, 64, "group_size must be at least 1, got 0"),
        (-32, 64, "group_size must be at least 1, got -32"),
        (48, 64, "group_size 48 does not divide 64"),
        (128, 64, "group_size 128 does not divide 64"),
        (32, 0, "group_size 32 does not divide 0"),
    ],
)
def test_groups_that_do_not_exist(group_size: int, n: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        IntGrid(4, group_size=group_size).quantize(torch.ones(2, n))
