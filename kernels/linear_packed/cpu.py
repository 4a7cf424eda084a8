# SPDX-License-Identifier: Apache-2.0
"""A whole quantized linear on a packed weight, in one operator.

At one token a call of an operator costs as much as the arithmetic of a small layer, so
transform, quantization and product are one.
"""

import functools
from ctypes import byref

import torch

from ..cpu import library
from ..cpu.library import matrix_shape, optional_pointer, pointer, type_code
from ..grid import IntGrid
from ..hadamard.cpu import arguments as transform_arguments
from ..hadamard.reference import check_blocks
from ..linear_w4a4.cpu import PackedWeight, arguments_of
from ..linear_wna16.cpu import DIGIT_MAX


@functools.lru_cache(maxsize=256)
def _bound_and_groups(
    bits: int, symmetric: bool, clip_ratio: float, group_size: int | None, k: int
) -> tuple[int, int]:
    """Bound on the integers that a weight is multiplied with, and scales of a token."""
    if bits == 16:
        return DIGIT_MAX, 1
    grid = IntGrid(bits, symmetric, clip_ratio=clip_ratio, group_size=group_size)
    return grid.max_difference, grid.groups(k)


def linear_packed(
    x: torch.Tensor,
    input_scale: torch.Tensor | None,
    order: int,
    stride: int,
    activation_bits: int,
    symmetric: bool,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    weight_zero: torch.Tensor | None,
    weight_sum: torch.Tensor,
    bias: torch.Tensor | None,
    n: int,
    weight_bits: int,
    out_dtype: torch.dtype,
    clip_ratio: float = 1.0,
    group_size: int | None = None,
) -> torch.Tensor:
    """Transform x, quantize it unless activation_bits is 16, and multiply.

    Args:
        x: ``[tokens, k]``, float32, bfloat16 or float16.
        input_scale: float32 ``[k]`` or None, as for ``hadamard_quantize``.
        order: Hadamard order of a block, 1 for no transform.
        stride: elements between neighbours of one transform.
        activation_bits: 2 to 8, or 16 for a weight-only linear.
        symmetric: grid of the activations.
        weight, weight_scale, weight_zero, weight_sum: a PackedWeight.
        bias: ``[n]`` or None.
        n: output channels.
        weight_bits: of the weight.
        out_dtype: of the result ``[tokens, n]``.
        clip_ratio: of the activations' grid.
        group_size: of the activations' grid; that of the weight, or None for one scale
            a token.

    Raises:
        ValueError: for arguments of another form, groups that are not the weight's, or
            sums that might not fit int32.
    """
    m, k = matrix_shape(x, "x")
    check_blocks(k, order, stride)
    form = activation_bits, symmetric, clip_ratio, group_size
    code_max, groups = _bound_and_groups(*form, k)
    packed = PackedWeight(weight, weight_scale, weight_zero, weight_sum)
    arguments = arguments_of(packed, n, k, weight_bits, code_max)
    if groups not in (1, arguments.groups):
        raise ValueError(
            f"group_size {group_size} makes {groups} groups of {k} columns, the weight "
            f"has {arguments.groups}"
        )
    if not x.is_contiguous():
        x = x.contiguous()
    bias = None if bias is None else bias.float()
    out = torch.empty((m, n), dtype=out_dtype, device="cpu")
    library.functions().linear_packed(
        byref(transform_arguments(order, stride, False)),
        optional_pointer(input_scale, "input_scale", torch.float32, (k,)),
        byref(arguments),
        optional_pointer(bias, "bias", torch.float32, (n,)),
        pointer(x, "x", x.dtype, (m, k)),
        type_code(x.dtype, "x"),
        m,
        activation_bits,
        symmetric,
        clip_ratio,
        groups,
        type_code(out_dtype, "out_dtype"),
        out.data_ptr(),
    )
    return out
