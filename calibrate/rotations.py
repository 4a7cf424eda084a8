# SPDX-License-Identifier: Apache-2.0
"""Orthogonal matrices that are folded into weights, or applied to activations."""

import functools
from dataclasses import dataclass
from typing import Protocol

import torch

from ..architecture import ModelShape
from ..kernels.hadamard.generic import kronecker
from ..kernels.hadamard.matrices import matrix

# Up to here one large GEMM is faster than many small ones.
DENSE_ORDER = 1024


class Orthogonal(Protocol):
    """An orthogonal matrix R of the size of the last dimension it is applied to."""

    def right(self, x: torch.Tensor) -> torch.Tensor:
        """``x R``, over the last dimension."""

    def repeat(self, group: int) -> "Orthogonal":
        """Every diagonal block ``group`` times in a row: from KV heads to heads."""


@dataclass(frozen=True)
class SignedHadamard:
    """``x -> H (signs * x)`` in blocks, H normalised.

    Attributes:
        order: of H; blocks of this size lie side by side.
        signs: ``[n]`` of +1 and -1, or None for all +1.
    """

    order: int
    signs: torch.Tensor | None = None

    def right(self, x: torch.Tensor) -> torch.Tensor:
        if self.signs is not None:
            x = x * self.signs.to(x)
        if self.order <= DENSE_ORDER:
            blocks = x.unflatten(-1, (-1, self.order))
            return (blocks @ _transposed(self.order, x.dtype, x.device)).view(x.shape)
        left, right = (m.to(x.dtype) for m in kronecker(self.order, False, x.device))
        blocks = x.unflatten(-1, (-1, left.shape[0], right.shape[0]))
        return ((left @ (blocks @ right)) * self.order**-0.5).reshape(x.shape)

    def repeat(self, group: int) -> "SignedHadamard":
        if self.signs is None:
            return self
        signs = self.signs.view(-1, self.order).repeat_interleave(group, dim=0)
        return SignedHadamard(self.order, signs.flatten())


@functools.lru_cache(maxsize=8)
def _transposed(order: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Normalised ``H^T``."""
    h = matrix(order).to(device, torch.float64) * order**-0.5
    return h.t().contiguous().to(dtype)


@dataclass(frozen=True)
class Dense:
    """Orthogonal blocks along the diagonal, ``[blocks, d, d]``."""

    blocks: torch.Tensor

    def right(self, x: torch.Tensor) -> torch.Tensor:
        split = x.unflatten(-1, self.blocks.shape[:2])
        return torch.einsum("...bi,bij->...bj", split, self.blocks.to(x)).flatten(-2)

    def repeat(self, group: int) -> "Dense":
        return Dense(self.blocks.repeat_interleave(group, dim=0))


@dataclass(frozen=True)
class MeanKeeping:
    """An orthogonal matrix R, turned until it takes the vector of ones to itself.

    The mean of a row then stays what it is and LayerNorm, without weight and bias,
    commutes with the rotation, as RMSNorm does with any. With u the ones at length 1,
    ``x R`` is followed by the rotation in the plane of u and ``u R`` that takes
    ``u R`` to u; where the two are more than a right angle apart, -R is taken for R.
    """

    inner: Orthogonal

    def right(self, x: torch.Tensor) -> torch.Tensor:
        size = x.shape[-1]
        ones = torch.full((size,), size**-0.5, dtype=x.dtype, device=x.device)
        x, image = self.inner.right(x), self.inner.right(ones)
        if float((image @ ones).detach()) < 0:
            x, image = -x, -image
        both = image + ones
        across = (x @ both / (1 + image @ ones)).unsqueeze(-1) * both
        return x - across + 2 * (x @ image).unsqueeze(-1) * ones

    def repeat(self, group: int) -> "MeanKeeping":
        raise TypeError("a rotation of the residual stream has no heads")


def of_stream(rotation: Orthogonal | None, shape: ModelShape) -> Orthogonal | None:
    """A rotation as the norms of a model let it pass through the residual stream."""
    layer_norm = shape.architecture.layer_norm
    return MeanKeeping(rotation) if layer_norm and rotation is not None else rotation
