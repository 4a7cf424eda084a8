# SPDX-License-Identifier: Apache-2.0
"""16-bit linear by the compiled kernels, each row independent of the others."""

import torch

from ..cpu import library
from ..cpu.library import matrix_shape, optional_pointer, pointer, type_code


def linear_tiled(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """As ``generic``: ``x [tokens, k]`` times ``weight [n, k]``, of one dtype.

    Raises:
        ValueError: for arguments of another form.
    """
    m, k = matrix_shape(x, "x")
    n, _ = matrix_shape(weight, "weight")
    code = type_code(x.dtype, "x")
    if not x.is_contiguous():
        x = x.contiguous()
    bias = None if bias is None else bias.float()
    out = torch.empty((m, n), dtype=x.dtype, device="cpu")
    library.functions().linear_tiled(
        pointer(x, "x", x.dtype, (m, k)),
        pointer(weight, "weight", x.dtype, (n, k)),
        optional_pointer(bias, "bias", torch.float32, (n,)),
        m,
        n,
        k,
        code,
        out.data_ptr(),
    )
    return out
