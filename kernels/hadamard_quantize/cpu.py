# SPDX-License-Identifier: Apache-2.0
"""Transform and quantization of activations by the compiled kernels."""

from ctypes import byref

import torch

from ..cpu import library
from ..cpu.library import matrix_shape, optional_pointer, pointer, type_code
from ..grid import IntGrid
from ..hadamard.cpu import arguments
from ..hadamard.reference import check_blocks


def hadamard_quantize(
    x: torch.Tensor,
    input_scale: torch.Tensor | None,
    order: int,
    stride: int,
    bits: int,
    symmetric: bool,
    clip_ratio: float = 1.0,
    group_size: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """As the reference, bit for bit.

    Raises:
        ValueError: as the reference, or for arguments of another form.
    """
    grid = IntGrid(bits, symmetric, clip_ratio=clip_ratio, group_size=group_size)
    m, n = matrix_shape(x, "x")
    check_blocks(n, order, stride)
    groups = grid.groups(n)
    if not x.is_contiguous():
        x = x.contiguous()
    codes = torch.empty((m, n), dtype=torch.int8, device="cpu")
    scale = torch.empty((m, groups), dtype=torch.float32, device="cpu")
    zero_point = torch.empty((m, groups), dtype=torch.int32, device="cpu")
    library.functions().hadamard_quantize(
        byref(arguments(order, stride, False)),
        pointer(x, "x", x.dtype, (m, n)),
        type_code(x.dtype, "x"),
        optional_pointer(input_scale, "input_scale", torch.float32, (n,)),
        m,
        n,
        bits,
        symmetric,
        clip_ratio,
        groups,
        codes.data_ptr(),
        scale.data_ptr(),
        zero_point.data_ptr(),
    )
    return codes, scale, zero_point
