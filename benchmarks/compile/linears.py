# SPDX-License-Identifier: Apache-2.0
"""Cases of the linears: every row of every chip's table.

A case is *plain* (bfloat16, symmetric weights, as many parts of split-K as the row has)
or has *every option* (float16, zero points, bias, K ragged where groups let it be, one
part). Rows are compiled for 4 bits plain, per channel and in groups of 128; for all
stored widths per channel, plain and with every option; and with every option for 4 bits
in groups of any size and any width in groups of 128, the last row for any width in
groups of any size. Chips with e4m3 products are compiled with them and without, with
every option where the table has them: what it does not take, wider codes or the tuner
may. Integer products with weights in groups are compiled with one scale a token, and
again with one for each group of a token.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import triton.language as tl

from vllm_lowbit.kernels.gpu import configs
from vllm_lowbit.kernels.gpu.limits import need
from vllm_lowbit.kernels.gpu.split import reduce_parts
from vllm_lowbit.kernels.gpu.target import E4M3_SUMS, lanes
from vllm_lowbit.kernels.gpu.weights import BLOCK, half_block
from vllm_lowbit.kernels.linear_w4a4.triton import REDUCE_BLOCK
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
from .ceilings import ceiling

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
WIDTHS = {"linear_w4a4": (4, 8), "linear_wna16": (2, 3, 4, 8)}
GROUPS = (32, 64, 128, 256)
# Chips with the table and the matrix units of another: plain cases of 4 bits only.
LIKE = {
    "linear_w4a4": {"sm_89": "sm_86"},
    "linear_wna16": {"sm_89": "sm_86", "sm_103": "sm_100"},
}


# Triton 3.9 needs so many times the instructions for int8 products there.
SM_103 = 2.4


@dataclass(frozen=True)
class _Weight:
    """What a linear multiplies with.

    Attributes:
        bits: stored width.
        group: columns of a group, 0 for one scale a channel.
        full: with every option, see above.
        tokens: scales of tokens are of its groups too.
        e4m3: products of e4m3 numbers.
    """

    bits: int
    group: int
    full: bool = False
    e4m3: bool = False
    tokens: bool = False

    @property
    def kind(self) -> configs.Weight:
        return configs.Weight(self.bits, self.group, self.full, self.tokens)

    @property
    def scheme(self) -> str:
        return self.kind.scheme

    def __str__(self) -> str:
        scale = f"group {self.group}" if self.group else "channel"
        scale += " of weights and tokens" if self.tokens else ""
        options = ", every option" if self.full else ""
        return f"{self.bits} bits, {scale}{options}"


def cases() -> Iterator[Case]:
    """Rows of the tables of all targets, and those of the fallback."""
    for target in TARGETS:
        for operator in WIDTHS:
            for weight in _weights(operator):
                if target in LIKE[operator] and (weight.bits != 4 or weight.full):
                    continue
                table = configs.table(target)[operator][weight.scheme]
                for row in configs.rows_of(table, weight.kind):
                    if _compiled(weight, row):
                        yield from _products(operator, target, weight, row)
                yield from _expert_cases(operator, target, weight)
            for scheme in configs.SCHEMES:
                if target in FALLBACK_TARGETS:
                    yield from _fallback_cases(operator, target, scheme)
                yield _reduce_case(operator, target, scheme)


def _weights(operator: str) -> Iterator[_Weight]:
    for bits in WIDTHS[operator]:
        yield _Weight(bits, 0)
        yield _Weight(bits, 0, full=True)
    in_groups = [_Weight(b, g, full=True) for b in WIDTHS[operator] for g in GROUPS]
    in_groups.append(_Weight(4, 128))
    yield from in_groups
    if operator == "linear_w4a4":
        yield from (replace(weight, tokens=True) for weight in in_groups)


def _compiled(weight: _Weight, row: configs.Row) -> bool:
    return (
        not weight.full
        or row.max_m is None
        or weight.group in (0, 128)
        or weight.bits == 4
    )


def _products(
    operator: str, target: str, weight: _Weight, row: configs.Row
) -> Iterator[Case]:
    """As integers or 16-bit floats, and of 4 bits as e4m3 where the chip has it."""
    if operator == "linear_wna16":
        yield _float_case(target, weight, row)
        return
    yield _integer_case(target, weight, row)
    # Not tabled, for the tuner: plain.
    e4m3 = target in E4M3_SUMS and (row.config.e4m3 or not weight.full)
    if weight.bits == 4 and e4m3:
        yield _integer_case(target, replace(weight, e4m3=True), row)


def _expert_cases(operator: str, target: str, weight: _Weight) -> Iterator[Case]:
    """The same tiles for the tokens of an expert; there is no split-K and no bias.

    Every row for 4 bits plain, the last for other widths.
    """
    if weight.group not in (0, 128) or (weight.bits == 4 and weight.full):
        return
    table = configs.rows_for_experts(target, operator, weight.scheme)
    for row in configs.rows_of(table, weight.kind):
        if weight.bits != 4 and row.max_m is not None:
            continue
        for case in _products(operator, target, weight, row):
            if row.config.e4m3 or not case.constants.get("E4M3"):
                yield replace(
                    case,
                    operator="linear_experts",
                    name=f"{operator}, {case.name}",
                    types={**case.types, "out_ptr": "*bf16"},
                    constants={
                        **case.constants,
                        "EXPERTS": True,
                        "PARTS": 1,
                        "BIAS": False,
                    },
                    quick=case.quick and target == "sm_90" and not weight.tokens,
                )


def _fallback_cases(operator: str, target: str, scheme: str) -> Iterator[Case]:
    table = configs.table(configs.FALLBACK)[operator][scheme]
    group = 128 if scheme == "group" else 0
    integer = operator == "linear_w4a4"
    make = _integer_case if integer else _float_case
    for bits, tokens in product(
        WIDTHS[operator], sorted({False, integer and group > 0})
    ):
        weight = _Weight(bits, group, full=bits != 4, tokens=tokens)
        for row in configs.rows_of(table, weight.kind):
            case = make(target, weight, row)
            yield replace(case, name=f"fallback, {case.name}", quick=False)


def _integer_case(target: str, weight: _Weight, row: configs.Row) -> Case:
    e4m3 = weight.e4m3
    case = _case(
        "linear_w4a4",
        integer_kernel,
        (target, weight, row),
        INTEGER_TYPES,
        tl.int32,
        {
            "NIBBLES": weight.bits == 4,
            "ZERO": True,
            "WEIGHT_ZERO": weight.full,
            "PTX": target.startswith("sm_"),
            "E4M3": e4m3,
            "IMPRECISE": E4M3_SUMS[target] if e4m3 else None,
            "TOKEN_GROUPS": weight.tokens,
        },
        {"enable_fp_fusion": False},
    )
    if target == "sm_103" and not e4m3:
        assert case.ceiling is not None
        case = replace(case, ceiling=int(SM_103 * case.ceiling))
    if e4m3:
        fewest = row.max_m is not None and row.max_m <= 16
        case = replace(
            case,
            name=f"{case.name}, e4m3",
            quick=fewest and not weight.full and weight.group == 0,
        )
    return case


def _float_case(target: str, weight: _Weight, row: configs.Row) -> Case:
    bits = weight.bits
    return _case(
        "linear_wna16",
        float_kernel,
        (target, weight, row),
        {**FLOAT_TYPES, "w_ptr": "*i8" if bits == 8 else "*u8"},
        tl.float32,
        {
            "BITS": bits,
            "HALF": half_block(weight.group or BLOCK, bits),
            "ZERO": weight.full,
            "DOT": tl.float16 if weight.full else tl.bfloat16,
        },
        {},
    )


def _case(
    operator: str,
    kernel: Any,
    what: tuple[str, _Weight, configs.Row],
    types: dict[str, str],
    sums: tl.dtype,
    constants: dict[str, Any],
    options: dict[str, Any],
) -> Case:
    """A linear as launched for a row of a table."""
    target, weight, row = what
    config, full = row.config, weight.full
    parts = 1 if full else config.split_k
    half = "*fp16" if full else "*bf16"
    partial = "*i32" if weight.group == 0 and sums == tl.int32 else "*fp32"
    matrix = (
        E4M3_MATRIX
        if weight.e4m3
        else INTEGER_MATRIX
        if sums == tl.int32
        else FLOAT_MATRIX
    )[target]
    first_or_last = row.max_m is None or row.max_m <= 16
    # A block of 3 bits may hold two groups of 128.
    block = 256 if operator == "linear_wna16" and weight.bits == 3 else 128
    halves = {"x_ptr": half, "bias_ptr": half}
    return Case(
        operator=operator,
        name=f"{weight}, M <= {row.max_m or 'any'}: {config.block_m} x "
        f"{config.block_n}, {config.warps} warps, {config.stages} stages",
        kernel=kernel,
        target=target,
        types={
            **{k: halves.get(k, v) for k, v in types.items()},
            "out_ptr": half if parts == 1 else partial,
        },
        constants={
            "GROUP": weight.group,
            "BIAS": full,
            "EVEN_K": not full or (weight.group > 0 and weight.group % block == 0),
            "PARTS": parts,
            "BLOCK_M": config.block_m,
            "BLOCK_N": config.block_n,
            "SWAP": config.swap,
            "EXPERTS": False,
            **constants,
        },
        aligned=("N", "K", "row_bytes"),
        options={**config.options(), **options},
        matrix=matrix,
        ceiling=ceiling(
            operator,
            matrix,
            weight.kind,
            config,
            lanes(target) * config.warps,
            weight.e4m3,
        ),
        need=need(target, operator, weight.kind, config),
        quick=weight.bits == 4
        and weight.group in (0, 128)
        and not full
        and first_or_last
        and target in (("sm_90",) if weight.tokens else QUICK_TARGETS),
    )


def _reduce_case(operator: str, target: str, scheme: str) -> Case:
    """The sum of split-K's parts, as many as a table's row may have."""
    integer, channel = operator == "linear_w4a4", scheme == "channel"
    pointers = {
        name: INTEGER_TYPES[name]
        for name in ("token_ptr", "zero_ptr", "scale_ptr", "sum_ptr", "bias_ptr")
    }
    return Case(
        operator=operator,
        name=f"{scheme}, sum of 16 parts",
        kernel=reduce_parts,
        target=target,
        types={
            **pointers,
            "part_ptr": "*i32" if integer and channel else "*fp32",
            "out_ptr": "*bf16",
            "M": "i32",
            "N": "i32",
        },
        constants={
            "PARTS": 16,
            "INTEGER": integer and channel,
            "CHANNEL": channel,
            "TOKEN": integer,
            "ZERO": integer and channel,
            "BIAS": True,
            "BLOCK": REDUCE_BLOCK,
        },
        aligned=("N",),
        options={"enable_fp_fusion": False} if integer else {},
    )
