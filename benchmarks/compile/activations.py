# SPDX-License-Identifier: Apache-2.0
"""Cases of hadamard_quantize: the rows of well-known models."""

from collections.abc import Iterator

import torch
import triton.language as tl

from vllm_lowbit.kernels.hadamard.triton import Tile, blocks_of, tile_of
from vllm_lowbit.kernels.hadamard_quantize.triton import (
    BLOCKS_STAGES,
    ROW_BLOCK,
    blocks_constants,
    blocks_warps,
    tile_warps,
)
from vllm_lowbit.kernels.hadamard_quantize.triton_blocks import blocks_kernel
from vllm_lowbit.kernels.hadamard_quantize.triton_kernel import (
    groups_kernel,
    row_kernel,
    tile_kernel,
)

from .case import QUICK_TARGETS, TARGETS, Case

# (n, order, stride): hidden and intermediate sizes of Llama 3 8B and 70B and Qwen3 8B,
# and 32 heads of 128.
ROWS = (
    (4096, 4096, 1),
    (8192, 8192, 1),
    (12288, 12288, 1),
    (14336, 14336, 1),
    (4096, 32, 128),
)
# As down_proj is served: of one order in each of eight shards. Then blocks of 128 and
# all of a row, as recipes have it, and the largest intermediate size of a supported
# model.
BLOCKS = (
    (12288, 1536, 1),
    (14336, 1792, 1),
    (18944, 2368, 1),
    (28672, 3584, 1),
    (29568, 3696, 1),
    (28672, 128, 1),
    (14336, 14336, 1),
    (18944, 18944, 1),
    (28672, 28672, 1),
    (36864, 4608, 1),
)
GROUPS = (32, 64, 128, 256)
FORMS = ("", " after RMSNorm", " after SwiGLU")
QUICK = (4096, 4096, 1)
QUICK_BLOCKS = (14336, 1792, 1)
# Bound by memory, not by products: any unit for matrices of floats will do.
MATRIX = r"HMMA|HGMMA|v_mfma_f32"
CEILING = 4500
BLOCKS_CEILING = 6000
POINTERS = {
    "x_ptr": "*bf16",
    "weight_ptr": "*bf16",
    "input_scale_ptr": "*fp32",
    "out_ptr": "*i8",
    "scale_ptr": "*fp32",
    "zero_ptr": "*i32",
}
TYPES = {
    **POINTERS,
    "left_ptr": "*bf16",
    "right_ptr": "*bf16",
    "x_stride": "i32",
    **dict.fromkeys(("epsilon", "clip_ratio", "before", "after"), "fp32"),
}
ROWS_TYPES = {
    **POINTERS,
    "x_stride": "i32",
    "epsilon": "fp32",
    "clip_ratio": "fp32",
    "N": "i32",
}
GRID = {"CODE_MIN": -7, "CODE_MAX": 7, "SYMMETRIC": True, "QUANTIZE": True}


def cases() -> Iterator[Case]:
    """Every row on every target, and rows without a transform."""
    for target in TARGETS:
        for row in ROWS:
            tile = tile_of(*row, False, torch.device("cpu"), target)
            if tile is None:
                continue  # In blocks, below.
            for prologue in (0, 1, 2) if row == QUICK else (0,):
                yield _tile_case(target, row, tile, prologue)
        for row in BLOCKS:
            if tile_of(*row, False, torch.device("cpu"), target) is None:
                yield _blocks_case(target, row)
        yield _blocks_case(target, QUICK_BLOCKS, quantize=False)
        yield from _group_cases(target)
        yield Case(
            operator="hadamard_quantize",
            name="no transform",
            kernel=row_kernel,
            target=target,
            types=ROWS_TYPES,
            constants={"PROLOGUE": 0, "SCALED": False, "BLOCK": ROW_BLOCK, **GRID},
            aligned=("x_stride", "N"),
            options={"num_warps": 8, "enable_fp_fusion": False},
        )


def _group_cases(target: str) -> Iterator[Case]:
    """Groups with ranges of their own, asymmetric: as served, of transformed values.

    Of inputs without a transform too, scaled, and after what is fused with them.
    """
    for group in GROUPS:
        yield _group_case(target, group, "*fp32", 0, False)
    for dtype in ("*bf16", "*fp16"):
        for prologue in range(3):
            yield _group_case(target, 128, dtype, prologue, True)


def _group_case(
    target: str, group: int, dtype: str, prologue: int, scaled: bool
) -> Case:
    return Case(
        operator="hadamard_quantize",
        name=f"groups of {group} of {dtype[1:]}{FORMS[prologue]}",
        kernel=groups_kernel,
        target=target,
        types={**ROWS_TYPES, "x_ptr": dtype, "weight_ptr": dtype},
        constants={
            "PROLOGUE": prologue,
            "SCALED": scaled,
            "CODE_MIN": -8,
            "CODE_MAX": 7,
            "SYMMETRIC": False,
            "GROUP": group,
            "BLOCK": ROW_BLOCK,
        },
        aligned=("x_stride", "N"),
        options={"num_warps": 8, "enable_fp_fusion": False},
        quick=(group, dtype, target) == (128, "*fp32", "sm_90"),
    )


def _blocks_case(target: str, row: tuple[int, int, int], quantize: bool = True) -> Case:
    """As served: asymmetric, scaled. The parts of scaled fp16 and bf16 are two."""
    n, order, stride = row
    blocks = blocks_of(*row, False, torch.device("cpu"), target)
    return Case(
        operator="hadamard_quantize" if quantize else "hadamard",
        name=f"n {n} order {order} stride {stride} in blocks",
        kernel=blocks_kernel,
        target=target,
        types=TYPES if quantize else {**TYPES, "out_ptr": "*fp32"},
        constants={
            **GRID,
            "N": n,
            **blocks_constants(blocks),
            "PARTS": 2,
            "PROLOGUE": 0,
            "SCALED": True,
            "QUANTIZE": quantize,
            "CODE_MIN": -8,
            "SYMMETRIC": False,
            "DOT": tl.bfloat16,
        },
        aligned=("x_stride",),
        options={
            "num_warps": blocks_warps(blocks),
            "num_stages": BLOCKS_STAGES,
            "enable_fp_fusion": False,
        },
        matrix=MATRIX,
        ceiling=BLOCKS_CEILING,
        quick=row == QUICK_BLOCKS and quantize and target in QUICK_TARGETS,
    )


def _tile_case(
    target: str, row: tuple[int, int, int], tile: Tile, prologue: int
) -> Case:
    n, order, stride = row
    return Case(
        operator="hadamard_quantize",
        name=f"n {n} order {order} stride {stride}{FORMS[prologue]}",
        kernel=tile_kernel,
        target=target,
        types=TYPES,
        constants={
            "N": n,
            "ROWS": tile.rows,
            "COLUMNS": tile.columns,
            "PADDED_ROWS": tile.padded[0],
            "PADDED_COLUMNS": tile.padded[1],
            "LEFT": tile.left is not None,
            "RIGHT": tile.right is not None,
            "PARTS": 1 if prologue == 0 else 3,
            "PROLOGUE": prologue,
            "SCALED": False,
            "DOT": tl.bfloat16,
            **GRID,
        },
        aligned=("x_stride",),
        options={
            "num_warps": tile_warps(tile),
            "enable_fp_fusion": False,
        },
        matrix=MATRIX,
        ceiling=CEILING,
        quick=row == QUICK and prologue == 0 and target in QUICK_TARGETS,
    )
