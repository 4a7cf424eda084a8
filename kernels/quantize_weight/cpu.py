# SPDX-License-Identifier: Apache-2.0
"""Weight quantization and its clip search by the compiled kernels."""

from ctypes import c_float

import torch

from ..cpu import library
from ..cpu.library import matrix_shape, pointer
from ..grid import IntGrid
from .reference import CLIP_RATIOS, check_group_size

_RATIOS = (c_float * len(CLIP_RATIOS))(*CLIP_RATIOS)


def quantize_weight(
    weight: torch.Tensor, grid: IntGrid, group_size: int | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """As the reference, bit for bit.

    Raises:
        ValueError: when group_size does not divide k, the grid is full_range, or the
            weight is no matrix on the CPU.
    """
    if grid.full_range:
        raise ValueError("weights are quantized on a grid without full_range")
    n, k = matrix_shape(weight, "weight")
    size = check_group_size(group_size, k)
    rows = weight.float().contiguous()
    codes = torch.empty((n, k), dtype=torch.int8, device="cpu")
    scale = torch.empty((n, k // size), dtype=torch.float32, device="cpu")
    zero_point = torch.empty((n, k // size), dtype=torch.int32, device="cpu")
    library.functions().quantize_weight(
        pointer(rows, "weight", torch.float32, (n, k)),
        scale.numel(),
        size,
        grid.bits,
        grid.symmetric,
        _RATIOS,
        len(_RATIOS),
        codes.data_ptr(),
        scale.data_ptr(),
        zero_point.data_ptr(),
    )
    return codes, scale, zero_point
