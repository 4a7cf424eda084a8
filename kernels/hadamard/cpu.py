# SPDX-License-Identifier: Apache-2.0
"""Hadamard transform by the compiled kernels, bit-equal to ``generic``."""

import functools
from ctypes import byref

import torch

from ..cpu import library
from ..cpu.library import TransformArguments, optional_pointer, pointer, type_code
from .matrices import core_matrix, factor
from .reference import check_blocks


@functools.lru_cache(maxsize=256)
def arguments(order: int, stride: int, transpose: bool) -> TransformArguments:
    """What the kernels take to describe a transform.

    Raises:
        ValueError: for an unknown order.
    """
    core, _ = factor(order)
    # core_matrix caches its result: it outlives the pointer.
    table = (
        None
        if core == 1
        else pointer(core_matrix(core), "table", torch.int8, (core, core))
    )
    return TransformArguments(order, stride, core, table, transpose, order**-0.5)


def transform(
    x: torch.Tensor,
    input_scale: torch.Tensor | None,
    order: int,
    stride: int,
    transpose: bool = False,
) -> torch.Tensor:
    """As in ``hadamard_quantize/reference.py``; x is ``[..., n]``.

    Raises:
        ValueError: for blocks that do not divide n, or arguments of another form.
    """
    if x.dim() == 0:
        raise ValueError("x must have a dimension")
    n = x.shape[-1]
    check_blocks(n, order, stride)
    rows = x.reshape(-1, n)
    if not rows.is_contiguous():
        rows = rows.contiguous()
    y = torch.empty(rows.shape, dtype=torch.float32, device="cpu")
    library.functions().hadamard(
        byref(arguments(order, stride, transpose)),
        pointer(rows, "x", x.dtype, rows.shape),
        type_code(x.dtype, "x"),
        optional_pointer(input_scale, "input_scale", torch.float32, (n,)),
        rows.shape[0],
        n,
        y.data_ptr(),
    )
    return y.view(x.shape)
