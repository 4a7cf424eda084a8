# SPDX-License-Identifier: Apache-2.0
"""One quantized matrix: making it, decoding it, and the tensors that hold it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from ..kernels.grid import IntGrid, decode
from ..kernels.packing import pack
from ..kernels.quantize_weight.reference import quantize_weight
from ..schema import Weights

Add = Callable[[str, torch.Tensor], None]
# Scale, float32, and zero point, int32, of every group of a matrix: ``[n, groups]``.
Ranges = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class QuantizedMatrix:
    """A matrix on its grid, as a checkpoint stores it.

    Attributes:
        grid: of the codes.
        codes: int8 ``[n, k]``.
        scale: float32 ``[n, groups]``.
        zero_point: int32 ``[n, groups]``.
    """

    grid: IntGrid
    codes: torch.Tensor
    scale: torch.Tensor
    zero_point: torch.Tensor

    @classmethod
    def stacked(cls, parts: Sequence["QuantizedMatrix"]) -> "QuantizedMatrix":
        """Parts one below another, of one grid."""
        return cls(
            parts[0].grid,
            torch.cat([part.codes for part in parts]),
            torch.cat([part.scale for part in parts]),
            torch.cat([part.zero_point for part in parts]),
        )

    def decoded(self) -> torch.Tensor:
        """The matrix as it will be served, float32 ``[n, k]``."""
        grouped = self.codes.unflatten(-1, (self.scale.shape[1], -1))
        scale, zero_point = self.scale.unsqueeze(-1), self.zero_point.unsqueeze(-1)
        return decode(grouped, scale, zero_point).flatten(-2)

    def write(self, add: Add, name: str) -> None:
        """Hand over the tensors that are stored.

        Args:
            add: takes each tensor, by name.
            name: of the module, without ``.weight``.
        """
        add(f"{name}.weight_packed", pack(self.codes, self.grid.bits))
        add(f"{name}.weight_scale", self.scale)
        if not self.grid.symmetric:
            add(f"{name}.weight_zero_point", self.zero_point.to(torch.int8))


def round_to_nearest(
    weight: torch.Tensor, weights: Weights, ranges: Ranges | None = None
) -> QuantizedMatrix:
    """A matrix ``[n, k]`` rounded on its own.

    Args:
        weight: the matrix.
        weights: its grid.
        ranges: of the groups; None clips them for least squared error.
    """
    grid = IntGrid(weights.bits, weights.symmetric)
    if ranges is None:
        done = quantize_weight(weight.float(), grid, weights.group_size)
        return QuantizedMatrix(grid, *done)
    scale, zero_point = ranges
    rows = weight.float().unflatten(-1, (scale.shape[1], -1))
    codes = grid.encode(rows, scale.unsqueeze(-1), zero_point.unsqueeze(-1))
    return QuantizedMatrix(grid, codes.flatten(-2), scale, zero_point)
