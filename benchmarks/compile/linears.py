# SPDX-License-Identifier: Apache-2.0
"""Cases of the linears: every row of every chip's table."""

from collections.abc import Iterator

from vllm_lowbit.kernels.gpu import configs
from vllm_lowbit.kernels.linear_w4a4.triton_kernel import linear_kernel

from .case import INTEGER_MATRIX, TARGETS, Case

INTEGER_TYPES = {
    "a_ptr": "*i8",
    "w_ptr": "*i8",
    "token_ptr": "*fp32",
    "zero_ptr": "*i32",
    "scale_ptr": "*fp32",
    "weight_zero_ptr": "*i32",
    "sum_ptr": "*i32",
    "bias_ptr": "*bf16",
    **dict.fromkeys(("M", "N", "K", "row_bytes", "steps", "groups"), "i32"),
}
# Instructions of the main loop per step of 128 columns: the first figure per warp of a
# tile of 16 x 16, so that the ceiling grows with the tile.
CHANNEL_CEILING = 260
GROUP_CEILING = 1400


def cases() -> Iterator[Case]:
    """Rows of the tables of all targets, by scheme."""
    for target in TARGETS:
        for scheme in configs.SCHEMES:
            rows = configs.table(target)["linear_w4a4"][scheme]
            for index, row in enumerate(rows):
                yield integer_case(
                    target, scheme, row, quick=index in (0, len(rows) - 1)
                )


def integer_case(target: str, scheme: str, row: configs.Row, quick: bool) -> Case:
    """``linear_w4a4`` as launched for a row of a table."""
    config = row.config
    group = 0 if scheme == "channel" else 128
    split = config.split_k > 1
    return Case(
        operator="linear_w4a4",
        name=f"{scheme} M<={row.max_m or 'any'}: {config.block_m}x{config.block_n}",
        kernel=linear_kernel,
        target=target,
        types={**INTEGER_TYPES, "out_ptr": _partial(group) if split else "*bf16"},
        constants={
            "GROUP": group,
            "NIBBLES": True,
            "ZERO": True,
            "WEIGHT_ZERO": False,
            "BIAS": False,
            "EVEN_K": True,
            "PARTS": max(1, config.split_k),
            "BLOCK_M": config.block_m,
            "BLOCK_N": config.block_n,
            "SWAP": config.swap,
            "PTX": target.startswith("sm_"),
        },
        aligned=("N", "K", "row_bytes"),
        options={
            "num_warps": config.warps,
            "num_stages": config.stages,
            "enable_fp_fusion": False,
        },
        matrix=INTEGER_MATRIX[target],
        ceiling=CHANNEL_CEILING if group == 0 else GROUP_CEILING,
        quick=quick,
    )


def _partial(group: int) -> str:
    return "*i32" if group == 0 else "*fp32"
