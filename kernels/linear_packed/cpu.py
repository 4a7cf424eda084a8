# SPDX-License-Identifier: Apache-2.0
"""A whole quantized linear on a packed weight, in one operator.

At one token a call of an operator costs as much as the arithmetic of a small layer, so
transform, quantization and product are one.
"""

import torch

from ..hadamard.cpu import transform
from ..hadamard_quantize.cpu import hadamard_quantize
from ..linear_w4a4.cpu import PackedWeight, linear_w4a4
from ..linear_wna16.cpu import linear_wna16


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

    Raises:
        ValueError: for arguments of another form.
    """
    packed = PackedWeight(weight, weight_scale, weight_zero, weight_sum)
    if activation_bits == 16:
        if order > 1 or input_scale is not None:
            x = transform(x, input_scale, order, stride)
        return linear_wna16(x, packed, n, weight_bits, bias, out_dtype)
    quantized = hadamard_quantize(
        x, input_scale, order, stride, activation_bits, symmetric
    )
    return linear_w4a4(*quantized, packed, n, weight_bits, bias, out_dtype)
