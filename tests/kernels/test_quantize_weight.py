# SPDX-License-Identifier: Apache-2.0
"""Weight quantization: each channel or group gets the best of the listed ranges."""

import pytest
import torch

from vllm_lowbit.kernels.grid import IntGrid, decode
from vllm_lowbit.kernels.quantize_weight import reference
from vllm_lowbit.kernels.quantize_weight.reference import CLIP_RATIOS, quantize_weight

GRIDS = [
    IntGrid(2),
    IntGrid(3, False),
    IntGrid(4),
    IntGrid(4, full_range=True),
    IntGrid(4, False),
    IntGrid(6),
    IntGrid(8, False),
]
every_grid = pytest.mark.parametrize("grid", GRIDS, ids=repr)


def heavy_tailed(n: int, k: int) -> torch.Tensor:
    """Weights whose best range is often narrower than their extremes."""
    weight = torch.randn(n, k)
    weight[torch.rand(n, k) < 0.01] *= 8
    return weight * torch.logspace(-6, 3, n).unsqueeze(-1)


def squared_error(
    weight: torch.Tensor,
    codes: torch.Tensor,
    scale: torch.Tensor,
    zero_point: torch.Tensor,
) -> torch.Tensor:
    """Of every group, float64 ``[n, groups]``."""
    groups = scale.shape[1]
    parts = codes.unflatten(-1, (groups, -1))
    values = decode(parts, scale.unsqueeze(-1), zero_point.unsqueeze(-1)).double()
    return (values - weight.double().unflatten(-1, (groups, -1))).square().sum(-1)


def test_ratios() -> None:
    assert CLIP_RATIOS[0] == 1.0
    assert list(CLIP_RATIOS) == sorted(CLIP_RATIOS, reverse=True)
    assert CLIP_RATIOS[-1] > 0.5


@every_grid
@pytest.mark.parametrize("group_size", [None, 128, 64])
def test_range_is_the_best_listed(grid: IntGrid, group_size: int | None) -> None:
    weight = heavy_tailed(24, 384)
    size = group_size or 384
    codes, scale, zero_point = quantize_weight(weight, grid, group_size)
    assert (codes.dtype, scale.dtype) == (torch.int8, torch.float32)
    assert zero_point.dtype == torch.int32
    assert codes.shape == weight.shape
    assert scale.shape == zero_point.shape == (24, 384 // size)
    error = squared_error(weight, codes, scale, zero_point)
    rows = weight.reshape(-1, size)
    listed = []
    for ratio in CLIP_RATIOS:
        s, z = grid.parameters(rows, ratio)
        listed.append(squared_error(rows, grid.encode(rows, s, z), s, z).view_as(error))
    errors = torch.stack(listed)
    # Equal up to the order of additions in float64.
    assert (error <= errors.amin(0) * (1 + 1e-12)).all()
    assert (error <= errors[0] * (1 + 1e-12)).all()
    chosen = (errors / error.clamp(min=1e-300) - 1).abs().argmin(0)
    if grid.bits <= 4:
        assert chosen.unique().numel() > 1, "the sample never clips"
        assert error.sum() < errors[0].sum()
    # The scale is that of a listed ratio.
    scales = torch.stack([grid.parameters(rows, r)[0] for r in CLIP_RATIOS])
    assert (scales == scale.reshape(1, -1, 1)).any(0).all()


@every_grid
def test_codes_follow_from_the_parameters(grid: IntGrid) -> None:
    weight = heavy_tailed(8, 128)
    codes, scale, zero_point = quantize_weight(weight, grid, None)
    assert torch.equal(codes, grid.encode(weight, scale, zero_point))
    assert int((codes.int() - zero_point).abs().max()) <= grid.max_difference
    if grid.symmetric:
        assert (zero_point == 0).all()


def test_rows_on_the_grid_are_kept_exactly() -> None:
    weight = torch.randint(-7, 8, (6, 64)).float() / 4
    weight[:, 0] = 7 / 4
    codes, scale, _ = quantize_weight(weight, IntGrid(4), None)
    assert (scale == 0.25).all()
    assert torch.equal(codes.float() / 4, weight)


@pytest.mark.parametrize("group_size", [None, 32])
def test_groups_are_rows_of_their_own(group_size: int | None) -> None:
    weight = heavy_tailed(5, 96)
    whole = quantize_weight(weight, IntGrid(4, False), group_size)
    size = group_size or 96
    for start in range(0, 96, size):
        part = quantize_weight(weight[:, start : start + size], IntGrid(4, False), None)
        group = start // size
        assert torch.equal(part[0], whole[0][:, start : start + size])
        assert torch.equal(part[1], whole[1][:, group : group + 1])
        assert torch.equal(part[2], whole[2][:, group : group + 1])


def test_deterministic(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same for every thread count, block of rows and stride."""
    weight = heavy_tailed(33, 256)
    expected = quantize_weight(weight, IntGrid(4), 64)
    turned = weight.t().contiguous().t()
    before = weight.clone()
    for threads in (1, 2):
        torch.set_num_threads(threads)
        for elements in (64, 1000, 1 << 18) if threads == 1 else (1000,):
            monkeypatch.setattr(reference, "_BLOCK_ELEMENTS", elements)
            for source in (weight, turned):
                actual = quantize_weight(source, IntGrid(4), 64)
                for a, b in zip(actual, expected, strict=True):
                    assert torch.equal(a, b)
    assert torch.equal(weight, before)


def test_float_types(dtype: torch.dtype) -> None:
    weight = torch.randn(6, 64).to(dtype)
    actual = quantize_weight(weight, IntGrid(4), None)
    expected = quantize_weight(weight.float(), IntGrid(4), None)
    for a, b in zip(actual, expected, strict=True):
        assert torch.equal(a, b)


@every_grid
def test_degenerate_rows(grid: IntGrid) -> None:
    weight = torch.randn(6, 64)
    weight[0] = 0
    weight[1], weight[2] = 0.3, -0.3
    weight[3, 7] = torch.nan
    weight[4] = weight[5] * 2.0**80  # Its square does not fit float32.
    codes, scale, zero_point = quantize_weight(weight, grid, None)
    values = decode(codes, scale, zero_point)
    assert scale[0] == 1 and (values[0] == 0).all()
    assert torch.equal(values[1:3], weight[1:3])
    assert torch.isnan(scale[3]).all() and (codes[3] == 0).all()
    assert torch.equal(codes[4], codes[5]) and scale[4] == scale[5] * 2.0**80
    alone = quantize_weight(weight[5:], grid, None)
    assert torch.equal(codes[5:], alone[0]) and torch.equal(scale[5:], alone[1])


@pytest.mark.parametrize("group_size", [0, -1, 48, 65, 128])
def test_group_size_that_does_not_divide(group_size: int) -> None:
    message = f"group_size {group_size} does not divide 64 input columns"
    with pytest.raises(ValueError, match=message):
        quantize_weight(torch.randn(2, 64), IntGrid(4), group_size)
