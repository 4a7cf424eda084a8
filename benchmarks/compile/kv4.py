# SPDX-License-Identifier: Apache-2.0
"""Cases of the 4-bit KV cache: every head size, and every way to attend.

The ceiling of a decode is a number of instructions per cached element: those of the
loop times the threads, over the elements of K and V that it takes.
"""

from collections.abc import Iterator
from typing import Any

from vllm_lowbit.kernels.gpu.target import lanes
from vllm_lowbit.kernels.kv4_attention.triton import ENCODE_ROWS, MERGE_AHEAD
from vllm_lowbit.kernels.kv4_attention.triton_kernel import attend, merge
from vllm_lowbit.kernels.kv4_attention.triton_plan import (
    DECODE_ROWS,
    most_rows,
    tile_of,
)
from vllm_lowbit.kernels.kv4_attention.triton_query import encode_queries
from vllm_lowbit.kernels.kv4_store.layout import HEAD_DIMS
from vllm_lowbit.kernels.kv4_store.triton import ROWS, next_power_of_two, row_warps
from vllm_lowbit.kernels.kv4_store.triton_kernel import store
from vllm_lowbit.kernels.rope_kv4_store.triton_kernel import rope_store

from .case import FLOAT_MATRIX, QUICK_TARGETS, TARGETS, Case

GROUP, PAGE = 4, 64
# Instructions of a thread, of 32 or of 64. Heads of 80 and 96 are padded to 128.
PER_ELEMENT = {
    32: {64: 5.0, 80: 6.3, 96: 5.3, 128: 4.0, 256: 2.7},
    64: {64: 8.3, 80: 15.5, 96: 11.0, 128: 8.0, 256: 5.0},
}
# Sixteen rows are too few for the matrix instructions of a warp group.
HALF_MATRIX = r"HMMA\.16816\.F32|v_mfma_f32_\d+x\d+x\d+_f16"
INTEGER_MATRIX = r"IMMA\.16832\.S8\.S8|v_mfma_i32_\d+x\d+x\d+_i8"
TYPES = {
    **dict.fromkeys(("key_ptr", "value_ptr", "query_ptr", "out_ptr"), "*bf16"),
    "cos_ptr": "*bf16",
    **dict.fromkeys(("sum_ptr", "factor_ptr", "partial_ptr"), "*fp32"),
    **dict.fromkeys(("peak_ptr", "total_ptr", "sinks_ptr"), "*fp32"),
    **dict.fromkeys(("starts_ptr", "lengths_ptr"), "*i32"),
    **dict.fromkeys(("score_factor", "cap_factor"), "fp32"),
    "encoded_ptr": "*fp16",
    "cache_ptr": "*u8",
    **dict.fromkeys(("slot_ptr", "position_ptr"), "*i64"),
}


def cases() -> Iterator[Case]:
    """All of them, for every target."""
    for target in TARGETS:
        for head_dim in HEAD_DIMS:
            yield _store(target, head_dim, "kv4_store", store, QUICK_TARGETS)
            # vLLM runs it on ROCm alone.
            yield _store(target, head_dim, "rope_kv4_store", rope_store, ("gfx942",))
            yield _encode(target, head_dim)
            yield from (_merge(target, head_dim, sinks) for sinks in (False, True))
            for rows in range(4, most_rows(head_dim).bit_length()):
                yield _attend(target, head_dim, 1 << rows, "partial")
            for sinks in ({}, {"SINKS": True}):
                yield _attend(target, head_dim, DECODE_ROWS, "fold", **sinks)
                yield _attend(target, head_dim, most_rows(head_dim), "whole", **sinks)
            for extra in ({"WINDOW": True}, {"CAP": True}, {"BLOCK_SIZE": 16}):
                yield _attend(target, head_dim, DECODE_ROWS, "partial", **extra)
                yield _attend(target, head_dim, most_rows(head_dim), "whole", **extra)


def _halves(head_dim: int) -> dict[str, int]:
    half = head_dim // 2
    return {
        "HALF": half,
        "PADDED": next_power_of_two(head_dim),
        "PADDED_HALF": next_power_of_two(half),
    }


def _case(
    operator: str,
    kernel: Any,
    target: str,
    constants: dict[str, Any],
    table_type: str = "*i32",
    **demands: Any,
) -> Case:
    """Strides are multiples of 16, pages too; other integers are anything."""
    names = [name for name in kernel.arg_names if name not in constants]
    types = {"table_ptr": table_type, **TYPES}
    return Case(
        operator=operator,
        kernel=kernel,
        target=target,
        types={name: types.get(name, "i32") for name in names},
        constants=constants,
        aligned=tuple(
            n for n in names if n.endswith("_stride") and n != "table_stride"
        ),
        **demands,
    )


def _store(
    target: str, head_dim: int, operator: str, kernel: Any, quick: tuple[str, ...]
) -> Case:
    return _case(
        operator,
        kernel,
        target,
        {"BLOCK_SIZE": PAGE, **_halves(head_dim), "ROWS": ROWS, "ROTATE": True},
        "*i8",
        name=f"head {head_dim}",
        options={"num_warps": row_warps(head_dim), "enable_fp_fusion": False},
        matrix=INTEGER_MATRIX,
        quick=head_dim == 128 and target in quick,
    )


def _encode(target: str, head_dim: int) -> Case:
    return _case(
        "kv4_attention",
        encode_queries,
        target,
        {**_halves(head_dim), "ROWS": ENCODE_ROWS, "ROTATE": True},
        "*i8",
        name=f"head {head_dim} queries",
        options={"num_warps": row_warps(head_dim), "enable_fp_fusion": False},
        matrix=INTEGER_MATRIX,
    )


def _merge(target: str, head_dim: int, sinks: bool) -> Case:
    quarter = head_dim // 4
    return _case(
        "kv4_attention",
        merge,
        target,
        {
            "QUARTER": quarter,
            "PADDED": next_power_of_two(quarter),
            "WINDOW": False,
            "SINKS": sinks,
            "AHEAD": MERGE_AHEAD,
        },
        name=f"head {head_dim} merge" + " sinks" * sinks,
        options={"num_warps": 1},
        quick=sinks and head_dim == 128 and target in QUICK_TARGETS,
    )


def _attend(target: str, head_dim: int, rows: int, mode: str, **extra: Any) -> Case:
    nvidia = target.startswith("sm_")
    window, page = extra.get("WINDOW", False), extra.get("BLOCK_SIZE", PAGE)
    tile = tile_of(rows, head_dim, target, mode, window, page)
    quarter = head_dim // 4
    decode = rows == DECODE_ROWS
    ceiling = None
    if decode and not extra:
        threads = lanes(target)
        elements = 2 * tile.tokens * head_dim / (threads * tile.warps)
        ceiling = int(PER_ELEMENT[threads][head_dim] * elements)
    form = "".join(f" {name.lower().replace('_', ' ')}" for name in extra)
    return _case(
        "kv4_attention",
        attend,
        target,
        {
            "GROUP": GROUP,
            "BLOCK_Q": rows // GROUP,
            "ROWS": rows,
            "QUARTER": quarter,
            "PADDED": next_power_of_two(quarter),
            "BLOCK_SIZE": PAGE,
            "TILE": tile.tokens,
            "MODE": mode,
            "BY_SEQUENCE": mode != "whole",
            "WINDOW": False,
            "CAP": False,
            "SINKS": False,
            "LAZY": tile.lazy,
            "PTX": nvidia,
            **extra,
        },
        name=f"head {head_dim} rows {rows} {mode}{form}",
        options=tile.options(),
        matrix=HALF_MATRIX if rows < 64 else FLOAT_MATRIX[target],
        ceiling=ceiling,
        quick=(head_dim, mode, extra) == (128, "partial", {})
        and decode
        and target in QUICK_TARGETS,
    )
