# SPDX-License-Identifier: Apache-2.0
"""Definition of the orthonormal Hadamard transform, whole and in blocks."""

import torch

from .matrices import matrix


def hadamard(
    x: torch.Tensor, order: int, stride: int = 1, *, transpose: bool = False
) -> torch.Tensor:
    """Multiply every block of the last dimension by ``H / sqrt(order)``.

    The last dimension is read as ``[blocks, order, stride]`` and transformed along
    ``order``: ``stride=1`` is the plain block transform, a larger stride mixes
    elements that far apart (across heads, for ``stride=head_dim``).

    Args:
        x: ``[..., n]`` with n a multiple of ``order * stride``.
        order: Hadamard order, ``K * 2^p``; 1 is the identity.
        stride: elements between neighbours of one transform.
        transpose: apply ``H^T``, the inverse, instead.

    Returns:
        float64 tensor of the shape of x.

    Raises:
        ValueError: for an unknown order or a dimension it does not divide.
    """
    check_blocks(x.shape[-1], order, stride)
    h = matrix(order).to(device=x.device, dtype=torch.float64) / order**0.5
    blocks = x.double().unflatten(-1, (-1, order, stride))
    return torch.einsum("ij,...js->...is", h.T if transpose else h, blocks).flatten(-3)


def check_blocks(size: int, order: int, stride: int) -> None:
    """Raise ValueError unless blocks of ``order * stride`` divide ``size``."""
    if size < 1 or order < 1 or stride < 1 or size % (order * stride):
        raise ValueError(
            f"blocks of order {order} x stride {stride} do not divide a dimension "
            f"of {size}"
        )
