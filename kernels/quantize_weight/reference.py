# SPDX-License-Identifier: Apache-2.0
"""Round-to-nearest weight quantization with an MSE clip search."""

import torch

from ..grid import IntGrid, decode

# Fractions of the range that are tried, largest first; a tie keeps the larger.
CLIP_RATIOS = tuple(1 - step / 32 for step in range(16))
_BLOCK_ELEMENTS = 1 << 18


def quantize_weight(
    weight: torch.Tensor, grid: IntGrid, group_size: int | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Quantize a weight; each channel or group keeps its best range.

    Of CLIP_RATIOS, every row takes the one with the smallest squared error.

    Args:
        weight: ``[n, k]``, any float dtype.
        grid: the codes to use.
        group_size: elements of k that share a scale; None for whole rows.

    Returns:
        codes int8 ``[n, k]``, scale float32 and zero_point int32 ``[n, groups]``.

    Raises:
        ValueError: when group_size does not divide k.
    """
    n, k = weight.shape
    size = check_group_size(group_size, k)
    rows = weight.reshape(-1, size)
    codes = torch.empty_like(rows, dtype=torch.int8)
    scale = rows.new_empty(rows.shape[0], 1, dtype=torch.float32)
    zero_point = rows.new_empty(rows.shape[0], 1, dtype=torch.int32)
    step = max(1, _BLOCK_ELEMENTS // size)
    for start in range(0, rows.shape[0], step):
        part = slice(start, start + step)
        scale[part], zero_point[part] = best_clip(rows[part], grid)
        codes[part] = grid.encode(rows[part], scale[part], zero_point[part])
    shape = (n, k // size)
    return codes.view(n, k), scale.view(shape), zero_point.view(shape)


def check_group_size(group_size: int | None, columns: int) -> int:
    """Elements that share a scale: group_size, or whole rows when it is None.

    Raises:
        ValueError: when group_size does not divide the columns.
    """
    size = columns if group_size is None else group_size
    if size < 1 or columns % size:
        raise ValueError(
            f"group_size {group_size} does not divide {columns} input columns"
        )
    return size


def best_clip(rows: torch.Tensor, grid: IntGrid) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and zero point with which each row has the smallest squared error.

    Args:
        rows: ``[rows, n]``, any float dtype.
        grid: the codes to use.

    Returns:
        scale float32 and zero_point int32, ``[rows, 1]``.
    """
    step = max(1, _BLOCK_ELEMENTS // rows.shape[1])
    parts = [_best_clip(part, grid) for part in rows.split(step)]
    if len(parts) == 1:
        return parts[0]
    scales, zero_points = zip(*parts, strict=True)
    return torch.cat(scales), torch.cat(zero_points)


def _best_clip(rows: torch.Tensor, grid: IntGrid) -> tuple[torch.Tensor, torch.Tensor]:
    rows = rows.float()
    best_error = torch.full_like(rows[:, :1], torch.inf, dtype=torch.float64)
    best_ratio = torch.ones_like(rows[:, :1])
    for ratio in CLIP_RATIOS:
        scale, zero_point = grid.parameters(rows, ratio)
        error = decode(grid.encode(rows, scale, zero_point), scale, zero_point) - rows
        # In float64 no order of additions decides which ratio wins.
        error = error.double().square().sum(dim=-1, keepdim=True)
        better = error < best_error
        best_error = torch.where(better, error, best_error)
        best_ratio = torch.where(better, ratio, best_ratio)
    return grid.parameters(rows, best_ratio)
