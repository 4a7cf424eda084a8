# SPDX-License-Identifier: Apache-2.0
"""Online transform and quantization of activations on a GPU.

One kernel does both, unless groups have ranges of their own: then transformed values
are written, and quantized by a second one.

Rows that fit a tile (see ``hadamard/triton.py``: by chip 8192 or 16384 elements with a
transform across them, 16384 with blocks up to 128) are read once and written as codes.
Others, and rows of several larger blocks, are taken in tiles (``triton_blocks.py``):
read once too, by chip up to 16384 or 32768 elements with padding, else twice.

Against the reference, whose transform is exact to 2^-31 of a block: without transform
and prologue, everything is equal bit for bit. Otherwise a value is off by at most
TRANSFORM_ERROR (e) of the largest of its row. So scales are within 2 e of the
reference's, relatively, and a zero point or code differs by one, only where the
reference's, before it is rounded, lies within 3 e times the number of steps of the grid
of halfway between two. A row is taken for constant (see ``grid.py``) when its float32
transform is. In groups, all of this holds of the values that the second kernel reads:
they are off by at most e of the largest of their row.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
import triton

from ..gpu.checks import FLOATS, check_optional, check_tensor
from ..gpu.target import architecture
from ..grid import IntGrid
from ..hadamard.reference import check_blocks
from ..hadamard.triton import DOT, Blocks, Tile, blocks_of, scaling, tile_of
from .triton_blocks import blocks_kernel
from .triton_kernel import groups_kernel, row_kernel, tile_kernel

TRANSFORM_ERROR = 2.0**-13
PLAIN, RMS_NORM, SWIGLU = 0, 1, 2
_PARTS = {torch.bfloat16: 1, torch.float16: 2, torch.float32: 3}
ROW_BLOCK = 2048
BLOCKS_STAGES = 1

_Operands = tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]
_Result = tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]


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
    """As the reference, within the bounds above.

    Raises:
        ValueError: as the reference, or for arguments of another form.
    """
    grid = IntGrid(bits, symmetric, clip_ratio=clip_ratio, group_size=group_size)
    call = _Call(order, stride, False, grid)
    return _quantized(call.run(x, input_scale))


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
    """As the reference of this name, within the bounds above.

    Raises:
        ValueError: as the reference, or for arguments of another form.
    """
    grid = IntGrid(bits, symmetric, clip_ratio=clip_ratio, group_size=group_size)
    call = _Call(order, stride, False, grid, RMS_NORM)
    return _quantized(call.run(x, input_scale, weight, epsilon))


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
    """As the reference of this name, within the bounds above.

    Raises:
        ValueError: as the reference, or for arguments of another form.
    """
    grid = IntGrid(bits, symmetric, clip_ratio=clip_ratio, group_size=group_size)
    call = _Call(order, stride, False, grid, SWIGLU)
    return _quantized(call.run(x, input_scale))


def transform(
    x: torch.Tensor,
    input_scale: torch.Tensor | None,
    order: int,
    stride: int,
    transpose: bool = False,
) -> torch.Tensor:
    """``H (input_scale * x)`` in float32; x is ``[..., n]``.

    Raises:
        ValueError: for blocks that do not divide n, or arguments of another form.
    """
    if x.dim() == 0:
        raise ValueError("x must have a dimension")
    rows = x.reshape(-1, x.shape[-1])
    out, _, _ = _Call(order, stride, transpose, None).run(rows, input_scale)
    return out.view(x.shape)


def _quantized(
    result: tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    codes, scale, zero_point = result
    assert scale is not None and zero_point is not None
    return codes, scale, zero_point


@dataclass(frozen=True)
class _Call:
    """What is done to each row; values are written when there is no grid."""

    order: int
    stride: int
    transpose: bool
    grid: IntGrid | None
    prologue: int = PLAIN

    def run(
        self,
        x: torch.Tensor,
        input_scale: torch.Tensor | None,
        weight: torch.Tensor | None = None,
        epsilon: float = 0.0,
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """Codes (or values), scale and zero point of the rows of x."""
        grouped = self.grid is not None and self.grid.group_size is not None
        if grouped and self.order > 1:
            values, _, _ = replace(self, grid=None).run(x, input_scale, weight, epsilon)
            return replace(self, order=1, stride=1, prologue=PLAIN).run(values, None)
        if x.dim() == 2 and x.stride(1) != 1:
            x = x.contiguous()
        # Rows may lie apart, as slices of a wider matrix do.
        check_tensor(x[:1], "x", FLOATS, (None, None))
        m, width = x.shape
        n = width
        if self.prologue == SWIGLU:
            if width % 2:
                raise ValueError(f"x must have an even number of columns, got {width}")
            n = width // 2
        check_blocks(n, self.order, self.stride)
        device = x.device
        check_optional(input_scale, "input_scale", (torch.float32,), (n,), device)
        check_optional(weight, "weight", FLOATS, (n,), device)
        out_dtype = torch.float32 if self.grid is None else torch.int8
        out = torch.empty((m, n), dtype=out_dtype, device=device)
        scale = zero_point = None
        if self.grid is not None:
            form = m, self.grid.groups(n)
            scale = torch.empty(form, dtype=torch.float32, device=device)
            zero_point = torch.empty(form, dtype=torch.int32, device=device)
        result = out, scale, zero_point
        if m == 0:
            return result
        operands = (x, weight, input_scale)
        if grouped:
            self._groups(operands, epsilon, result)
            return result
        if self.order == 1:
            self._rows(operands, epsilon, result)
            return result
        arch = architecture(device)
        tile = tile_of(n, self.order, self.stride, self.transpose, device, arch)
        if tile is not None:
            self._tile(tile, operands, epsilon, result)
            return result
        blocks = blocks_of(n, self.order, self.stride, self.transpose, device, arch)
        self._blocks(blocks, operands, epsilon, result)
        return result

    def _constants(self, input_scale: torch.Tensor | None) -> dict[str, Any]:
        grid = self.grid
        return {
            "PROLOGUE": self.prologue,
            "SCALED": input_scale is not None,
            "QUANTIZE": grid is not None,
            "CODE_MIN": 0 if grid is None else grid.code_min,
            "CODE_MAX": 0 if grid is None else grid.code_max,
            "SYMMETRIC": grid is None or grid.symmetric,
            # Every step of the grid is rounded by itself.
            "enable_fp_fusion": False,
        }

    def _groups(self, operands: _Operands, epsilon: float, result: _Result) -> None:
        x, weight, input_scale = operands
        out, scale, zero_point = result
        m, n = out.shape
        assert self.grid is not None and self.grid.group_size is not None
        size = self.grid.group_size
        if ROW_BLOCK % size:
            raise ValueError(f"group_size must divide {ROW_BLOCK}, got {size}")
        constants = self._constants(input_scale)
        del constants["QUANTIZE"]
        groups_kernel[(m, triton.cdiv(n, ROW_BLOCK))](
            x,
            x if weight is None else weight,
            x if input_scale is None else input_scale,
            out,
            scale,
            zero_point,
            x.stride(0),
            epsilon,
            self.grid.clip_ratio,
            n,
            GROUP=size,
            BLOCK=ROW_BLOCK,
            num_warps=8,
            **constants,
        )

    def _rows(self, operands: _Operands, epsilon: float, result: _Result) -> None:
        x, weight, input_scale = operands
        out, scale, zero_point = result
        m, n = out.shape
        row_kernel[(m,)](
            x,
            x if weight is None else weight,
            x if input_scale is None else input_scale,
            out,
            out if scale is None else scale,
            out if zero_point is None else zero_point,
            x.stride(0),
            epsilon,
            1.0 if self.grid is None else self.grid.clip_ratio,
            n,
            BLOCK=ROW_BLOCK,
            num_warps=8,
            **self._constants(input_scale),
        )

    def _tile(
        self,
        tile: Tile,
        operands: _Operands,
        epsilon: float,
        result: _Result,
    ) -> None:
        x, weight, input_scale = operands
        out, scale, zero_point = result
        m, n = out.shape
        exact = self.prologue == PLAIN and input_scale is None
        before, after = scaling(self.order)
        tile_kernel[(m,)](
            x,
            x if weight is None else weight,
            x if input_scale is None else input_scale,
            out if tile.left is None else tile.left,
            out if tile.right is None else tile.right,
            out,
            out if scale is None else scale,
            out if zero_point is None else zero_point,
            x.stride(0),
            epsilon,
            1.0 if self.grid is None else self.grid.clip_ratio,
            before,
            after,
            N=n,
            ROWS=tile.rows,
            COLUMNS=tile.columns,
            PADDED_ROWS=tile.padded[0],
            PADDED_COLUMNS=tile.padded[1],
            LEFT=tile.left is not None,
            RIGHT=tile.right is not None,
            PARTS=_PARTS[x.dtype] if exact else 3,
            DOT=DOT,
            num_warps=tile_warps(tile),
            **self._constants(input_scale),
        )

    def _blocks(
        self, blocks: Blocks, operands: _Operands, epsilon: float, result: _Result
    ) -> None:
        x, weight, input_scale = operands
        out, scale, zero_point = result
        m, n = out.shape
        exact = self.prologue == PLAIN and input_scale is None
        before, after = scaling(self.order)
        left, right = blocks.left_table, blocks.right_table
        blocks_kernel[(m,)](
            x,
            x if weight is None else weight,
            x if input_scale is None else input_scale,
            left,
            left if right is None else right,
            out,
            out if scale is None else scale,
            out if zero_point is None else zero_point,
            x.stride(0),
            epsilon,
            1.0 if self.grid is None else self.grid.clip_ratio,
            before,
            after,
            N=n,
            PARTS=_PARTS[x.dtype] if exact else max(2, _PARTS[x.dtype]),
            DOT=DOT,
            num_warps=blocks_warps(blocks),
            num_stages=BLOCKS_STAGES,
            **blocks_constants(blocks),
            **self._constants(input_scale),
        )


def tile_warps(tile: Tile) -> int:
    """Warps for a tile: at most 64 elements a lane."""
    return 4 if tile.padded[0] * tile.padded[1] <= 4096 else 8


def blocks_warps(blocks: Blocks) -> int:
    """Warps for the tiles of a row."""
    return 8 if blocks.kept else 4


def blocks_constants(blocks: Blocks) -> dict[str, Any]:
    """What ``blocks_kernel`` is compiled for, of the blocks of a row."""
    right = blocks.right_table
    return {
        "LEFT": blocks.left,
        "INNER": blocks.inner,
        "RIGHT": 1 if right is None else len(right),
        "BLOCK_M": blocks.block_m,
        "BLOCK_C": blocks.block_c,
        "KEPT": blocks.kept,
    }
