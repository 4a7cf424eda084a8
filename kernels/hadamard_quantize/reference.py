# SPDX-License-Identifier: Apache-2.0
"""Definition of the online transform and the quantization of activations."""

import torch

from ..grid import IntGrid
from ..hadamard.generic import hadamard


def transform(
    x: torch.Tensor,
    input_scale: torch.Tensor | None,
    order: int,
    stride: int,
    transpose: bool = False,
) -> torch.Tensor:
    """``H (input_scale * x)`` in float32; arguments as in :func:`hadamard_quantize`.

    Args:
        transpose: ``H^T``, the inverse, in place of H.
    """
    scaled = x.float() if input_scale is None else x.float() * input_scale
    if order > 1:
        return hadamard(scaled, order, stride, transpose=transpose)
    # Never the input itself: an op's result must not alias its argument.
    return scaled.clone() if scaled is x else scaled.contiguous()


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
    """Scale and transform each token, then quantize it on its own dynamic grid.

    The float32 transform of ``hadamard/generic.py`` is part of the definition: its
    order of additions decides on which side of a tie a code falls.

    Args:
        x: ``[tokens, n]``, float32, bfloat16 or float16.
        input_scale: float32 ``[n]``, multiplied into x first; None for none.
        order: Hadamard order of a block, 1 for no transform.
        stride: elements between neighbours of one transform.
        bits: code width, 2 to 8.
        symmetric: codes around zero, or affine (see ``grid.py``).
        clip_ratio: fraction of each range that is kept.
        group_size: neighbouring elements, transformed, that share a range; None for
            all of a token's.

    Returns:
        codes int8 ``[tokens, n]``, scale float32 ``[tokens, groups]`` and zero_point
        int32 ``[tokens, groups]``, with one group where group_size is None.

    Raises:
        ValueError: for an unsupported width, order, clip_ratio or group_size.
    """
    grid = IntGrid(bits, symmetric, clip_ratio=clip_ratio, group_size=group_size)
    return grid.quantize(transform(x, input_scale, order, stride))


def rms_norm_hadamard_quantize(
    x: torch.Tensor,
    weight: torch.Tensor,
    epsilon: float,
    input_scale: torch.Tensor | None,
    order: int,
    stride: int,
    bits: int,
    symmetric: bool,
    clip_ratio: float = 1.0,
    group_size: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """:func:`hadamard_quantize` of the RMS-normalised x, which stays in float32.

    Args:
        x: ``[tokens, n]``.
        weight: float ``[n]``, of the norm (Zhang and Sennrich, Root Mean Square Layer
            Normalization, 2019).
        epsilon: added to the mean of squares.
        input_scale, order, stride, bits, symmetric, clip_ratio, group_size: as in
            hadamard_quantize.
    """
    values = x.float()
    factor = torch.rsqrt(values.square().mean(-1, keepdim=True) + epsilon)
    normed = values * factor * weight.float()
    return hadamard_quantize(
        normed, input_scale, order, stride, bits, symmetric, clip_ratio, group_size
    )


def swiglu_hadamard_quantize(
    x: torch.Tensor,
    input_scale: torch.Tensor | None,
    order: int,
    stride: int,
    bits: int,
    symmetric: bool,
    clip_ratio: float = 1.0,
    group_size: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """:func:`hadamard_quantize` of ``silu(gate) * up``, which stays in float32.

    Args:
        x: ``[tokens, 2 n]``: gate, then up (Shazeer, GLU Variants Improve
            Transformer, 2020).
        input_scale, order, stride, bits, symmetric, clip_ratio, group_size: as in
            hadamard_quantize.
    """
    gate, up = x.float().chunk(2, dim=-1)
    gated = torch.nn.functional.silu(gate) * up
    return hadamard_quantize(
        gated, input_scale, order, stride, bits, symmetric, clip_ratio, group_size
    )
