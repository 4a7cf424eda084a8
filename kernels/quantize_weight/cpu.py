# SPDX-License-Identifier: Apache-2.0
"""Weight quantization and its clip search by the compiled kernels."""

import torch

from ..cpu import library
from ..grid import IntGrid
from .reference import CLIP_RATIOS, check_group_size


def quantize_weight(
    weight: torch.Tensor, grid: IntGrid, group_size: int | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """As the reference, bit for bit.

    Raises:
        ValueError: when group_size does not divide k, or the grid is full_range.
    """
    if grid.full_range:
        raise ValueError("weights are quantized on a grid without full_range")
    n, k = weight.shape
    size = check_group_size(group_size, k)
    rows = weight.float().contiguous()
    ratios = torch.tensor(CLIP_RATIOS, dtype=torch.float32)
    codes = torch.empty((n, k), dtype=torch.int8)
    scale = torch.empty((n, k // size), dtype=torch.float32)
    zero_point = torch.empty((n, k // size), dtype=torch.int32)
    library.functions().quantize_weight(
        rows.data_ptr(),
        scale.numel(),
        size,
        grid.bits,
        grid.symmetric,
        ratios.data_ptr(),
        len(ratios),
        codes.data_ptr(),
        scale.data_ptr(),
        zero_point.data_ptr(),
    )
    return codes, scale, zero_point
