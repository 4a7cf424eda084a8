# SPDX-License-Identifier: Apache-2.0
"""Cases of the linears: every row of every chip's table, for 4-bit weights.

Other widths are compiled with the row for the fewest tokens. Chips with e4m3 products
are compiled with them and without: what the table does not take, wider codes or the
tuner may.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import triton.language as tl

from vllm_lowbit.kernels.gpu import configs
from vllm_lowbit.kernels.gpu.target import E4M3_SUMS
from vllm_lowbit.kernels.gpu.weights import BLOCK, half_block
from vllm_lowbit.kernels.linear_w4a4.triton_kernel import (
    linear_kernel as integer_kernel,
)
from vllm_lowbit.kernels.linear_wna16.triton_kernel import (
    linear_kernel as float_kernel,
)

from .case import (
    E4M3_MATRIX,
    FLOAT_MATRIX,
    INTEGER_MATRIX,
    QUICK_TARGETS,
    TARGETS,
    Case,
)

INTEGER_TYPES = {
    "a_ptr": "*i8",
    "w_ptr": "*i8",
    "token_ptr": "*fp32",
    "zero_ptr": "*i32",
    "scale_ptr": "*fp32",
    "weight_zero_ptr": "*i32",
    "sum_ptr": "*i32",
    "bias_ptr": "*bf16",
    "index_ptr": "*i64",
    "tiles_ptr": "*i32",
    **dict.fromkeys(("M", "N", "K", "row_bytes", "steps", "groups", "experts"), "i32"),
}
FLOAT_TYPES = {
    "x_ptr": "*bf16",
    "scale_ptr": "*fp32",
    "zero_ptr": "*i32",
    "bias_ptr": "*bf16",
    "index_ptr": "*i64",
    "tiles_ptr": "*i32",
    **dict.fromkeys(("M", "N", "K", "row_bytes", "turns", "groups", "experts"), "i32"),
}
# Least shared memory of NVIDIA's and of AMD's.
FALLBACK_TARGETS = ("sm_86", "gfx942")
# Most instructions of the main loop, by operator and scheme.
CEILINGS = {
    ("linear_w4a4", "channel"): 260,
    ("linear_w4a4", "group"): 600,
    ("linear_wna16", "channel"): 1000,
    ("linear_wna16", "group"): 1400,
}
# Of linear_w4a4 per channel, where operands become e4m3, and where int8 has no tensor
# core that reads shared memory.
E4M3_CEILING, SM_103_CEILING = 400, 500


def cases() -> Iterator[Case]:
    """Rows of the tables of all targets, by scheme, and those of the fallback."""
    for target in TARGETS:
        for scheme in configs.SCHEMES:
            if target in FALLBACK_TARGETS:
                yield from _fallback_cases(target, scheme)
            rows = configs.table(target)["linear_w4a4"][scheme]
            yield _integer_case(target, scheme, rows[0], 8)
            for row in rows:
                yield from _products(target, scheme, row)
            for row in configs.rows_for_experts(target, "linear_w4a4", scheme):
                for case in _products(target, scheme, row):
                    if row.config.e4m3 or not case.constants["E4M3"]:
                        yield _of_experts(case)
            rows = configs.table(target)["linear_wna16"][scheme]
            for bits in (2, 3, 8):
                yield _float_case(target, scheme, rows[0], bits)
            for row in rows:
                yield _float_case(target, scheme, row, 4)
            for row in configs.rows_for_experts(target, "linear_wna16", scheme):
                yield _of_experts(_float_case(target, scheme, row, 4))


def _products(target: str, scheme: str, row: configs.Row) -> Iterator[Case]:
    """Of 4-bit weights: int8, and e4m3 where the chip has it."""
    yield _integer_case(target, scheme, row, 4)
    if target in E4M3_SUMS:
        yield _integer_case(target, scheme, row, 4, e4m3=True)


def _of_experts(case: Case) -> Case:
    """The same tile for the tokens of an expert; there is no split-K."""
    return replace(
        case,
        operator="linear_experts",
        name=f"{case.operator}, {case.name}",
        types={**case.types, "out_ptr": "*bf16"},
        constants={**case.constants, "EXPERTS": True, "PARTS": 1},
        quick=case.quick and case.target == "sm_90",
    )


def _fallback_cases(target: str, scheme: str) -> Iterator[Case]:
    table = configs.table(configs.FALLBACK)
    for make, operator in (
        (_integer_case, "linear_w4a4"),
        (_float_case, "linear_wna16"),
    ):
        for row in table[operator][scheme]:
            case = make(target, scheme, row, 4)
            yield replace(case, name=f"fallback, {case.name}", quick=False)


def _integer_case(
    target: str, scheme: str, row: configs.Row, bits: int, e4m3: bool = False
) -> Case:
    case = _case(
        "linear_w4a4",
        integer_kernel,
        (target, scheme, row, bits),
        INTEGER_TYPES,
        tl.int32,
        {
            "NIBBLES": bits == 4,
            "ZERO": True,
            "WEIGHT_ZERO": False,
            "PTX": target.startswith("sm_"),
            "E4M3": e4m3,
            "IMPRECISE": E4M3_SUMS[target] if e4m3 else None,
            "TOKEN_GROUPS": False,
        },
        {"enable_fp_fusion": False},
    )
    if scheme == "channel" and (e4m3 or target == "sm_103"):
        case = replace(case, ceiling=E4M3_CEILING if e4m3 else SM_103_CEILING)
    if e4m3:
        fewest = row.max_m is not None and row.max_m <= 16
        case = replace(
            case,
            name=f"{case.name}, e4m3",
            matrix=E4M3_MATRIX[target],
            quick=fewest and scheme == "channel",
        )
    return case


def _float_case(target: str, scheme: str, row: configs.Row, bits: int) -> Case:
    return _case(
        "linear_wna16",
        float_kernel,
        (target, scheme, row, bits),
        {**FLOAT_TYPES, "w_ptr": "*i8" if bits == 8 else "*u8"},
        tl.float32,
        {
            "BITS": bits,
            "HALF": half_block(BLOCK, bits),
            "ZERO": scheme == "group",
            "DOT": tl.bfloat16,
        },
        {},
    )


def _case(
    operator: str,
    kernel: Any,
    what: tuple[str, str, configs.Row, int],
    types: dict[str, str],
    sums: tl.dtype,
    constants: dict[str, Any],
    options: dict[str, Any],
) -> Case:
    """A linear as launched for a row of a table, groups of 128 in scheme group."""
    target, scheme, row, bits = what
    config, channel = row.config, scheme == "channel"
    partial = "*i32" if channel and sums == tl.int32 else "*fp32"
    matrix = INTEGER_MATRIX if sums == tl.int32 else FLOAT_MATRIX
    first_or_last = row.max_m is None or row.max_m <= 16
    return Case(
        operator=operator,
        name=f"{bits} bits, {scheme}, M <= {row.max_m or 'any'}: {config.block_m}"
        f" x {config.block_n}, {config.warps} warps, {config.stages} stages",
        kernel=kernel,
        target=target,
        types={**types, "out_ptr": "*bf16" if config.split_k == 1 else partial},
        constants={
            "GROUP": 0 if channel else 128,
            "BIAS": False,
            "EVEN_K": True,
            "PARTS": config.split_k,
            "BLOCK_M": config.block_m,
            "BLOCK_N": config.block_n,
            "SWAP": config.swap,
            "EXPERTS": False,
            **constants,
        },
        aligned=("N", "K", "row_bytes"),
        options={
            "num_warps": config.warps,
            "num_stages": config.stages,
            **options,
        },
        matrix=matrix[target],
        ceiling=CEILINGS[operator, scheme],
        quick=bits == 4 and first_or_last and target in QUICK_TARGETS,
    )
