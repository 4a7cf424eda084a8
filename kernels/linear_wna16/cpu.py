# SPDX-License-Identifier: Apache-2.0
"""Weight-only linear by the compiled kernels, bit-equal to ``generic``."""

from ctypes import byref

import torch

from ..cpu import library
from ..cpu.library import matrix_shape, optional_pointer, pointer, type_code
from ..linear_w4a4.cpu import PackedWeight, arguments_of

# Activations are multiplied as signed bytes.
DIGIT_MAX = 128


def linear_wna16(
    x: torch.Tensor,
    weight: PackedWeight,
    n: int,
    bits: int,
    bias: torch.Tensor | None,
    out_dtype: torch.dtype,
) -> torch.Tensor:
    """Float ``x [tokens, k]`` times a weight from ``linear_w4a4.cpu.pack``.

    Raises:
        ValueError: for arguments of another form, or sums that might not fit int32.
    """
    m, k = matrix_shape(x, "x")
    arguments = arguments_of(weight, n, k, bits, DIGIT_MAX)
    if not x.is_contiguous():
        x = x.contiguous()
    out = torch.empty((m, n), dtype=out_dtype, device="cpu")
    bias = None if bias is None else bias.float()
    library.functions().linear_wna16(
        byref(arguments),
        optional_pointer(bias, "bias", torch.float32, (n,)),
        pointer(x, "x", x.dtype, (m, k)),
        type_code(x.dtype, "x"),
        m,
        type_code(out_dtype, "out_dtype"),
        out.data_ptr(),
    )
    return out
