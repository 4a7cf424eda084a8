# SPDX-License-Identifier: Apache-2.0
"""Definition of the online transform and per-token quantization of activations."""

import torch

from ..grid import IntGrid
from ..hadamard.generic import hadamard


def hadamard_quantize(
    x: torch.Tensor, order: int, stride: int, bits: int, symmetric: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Transform each token, then quantize it on its own dynamic grid.

    The float32 transform of ``hadamard/generic.py`` is part of the definition: its
    order of additions decides on which side of a tie a code falls.

    Args:
        x: ``[tokens, n]``, float32, bfloat16 or float16.
        order: Hadamard order of a block, 1 for no transform.
        stride: elements between neighbours of one transform.
        bits: code width, 2 to 8.
        symmetric: codes around zero, or affine (see ``grid.py``).

    Returns:
        codes int8 ``[tokens, n]``, scale float32 ``[tokens, 1]`` and zero_point
        int32 ``[tokens, 1]``.

    Raises:
        ValueError: for an unsupported width or order.
    """
    rotated = x.float() if order == 1 else hadamard(x, order, stride)
    return IntGrid(bits, symmetric).quantize(rotated)
