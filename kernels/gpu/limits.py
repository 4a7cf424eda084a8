# SPDX-License-Identifier: Apache-2.0
"""What a launch of a linear takes of a chip's memories, from its numbers alone.

Triton finds out when it loads a compiled kernel, and says so in its own words; for too
much tensor memory it compiles to a trap. Here it is known before anything is compiled.
``python -m benchmarks.compile`` holds each number against what the compiler took.
"""

import functools
from dataclasses import dataclass

from .configs import LinearConfig, Weight, rows_for_experts, rows_of, table
from .weights import BLOCK, half_block

# Bytes of shared memory that one block may have (CUDA programming guide, table of
# compute capabilities; LDS of the CDNA 3 and 4 instruction set manuals).
SHARED_LIMITS = {
    "sm_80": 166912,
    "sm_86": 101376,
    "sm_89": 101376,
    "sm_90": 232448,
    "sm_100": 232448,
    "sm_103": 232448,
    "sm_120": 101376,
    "gfx942": 65536,
    "gfx950": 163840,
}
# Columns of tensor memory, of 128 lanes of four bytes.
TENSOR_LIMITS = {"sm_100": 512, "sm_103": 512}
# Chips whose matrix units read operands from shared memory.
READ_SHARED = ("sm_90", "sm_100", "sm_103")
# What the units of sm_90 and later that read shared memory add for their barriers, and
# for results that are turned around.
BARRIERS = 4096


@dataclass(frozen=True)
class Need:
    """What a block takes at most: bytes of shared memory, columns of tensor memory."""

    shared: int
    tensor: int


@functools.cache
def need(
    arch: str,
    operator: str,
    weight: Weight,
    config: LinearConfig,
) -> Need:
    """What a block of a linear takes at most.

    Args:
        arch: a chip of SHARED_LIMITS.
        operator: ``linear_w4a4`` or ``linear_wna16``.
        weight: that is multiplied with, and what scales tokens have.
        config: of the launch.
    """
    integer, (bits, group_size, zeros, own) = operator == "linear_w4a4", weight
    plane, columns = turn_of(operator, weight)
    size = 1 if integer else 2
    groups = columns // group_size if group_size else 0
    activations = config.block_m * columns * size
    packed = config.block_n * columns * bits // 8
    unpacked = config.block_n * plane * size
    # Scales, zero points and, of integers, sums: four bytes each.
    numbers = 4 * config.block_n * groups * (1 + zeros + integer)
    # Scales and zero points of tokens.
    numbers += 4 * config.block_m * groups * 2 * own
    ahead = max(1, config.stages - 1)
    if arch == "gfx942":
        shared = ahead * (activations + max(packed, unpacked))
    elif arch == "gfx950":
        # Rows are padded, and written while others are read.
        shared = (ahead + 1) * (activations + max(packed, unpacked)) * 33 // 32
    else:
        shared = ahead * (activations + packed + numbers)
        if arch in READ_SHARED:
            # Operands that are being multiplied, beside those on their way.
            shared += activations + BARRIERS
            if not config.swap or (arch in TENSOR_LIMITS and config.block_n < 128):
                shared += unpacked
            elif integer and bits == 8:
                shared += packed
    tensor = 0
    if arch in TENSOR_LIMITS:
        across = config.block_m if config.swap else config.block_n
        # Each group has sums of its own. Weights wait there too, with groups no more
        # than four planes. It is taken in powers of two.
        waiting = columns * size // 4
        tensor = max(1, groups) * across + (min(64, waiting) if groups else waiting)
        tensor = 1 << (tensor - 1).bit_length()
    tile = config.block_m * config.block_n
    return Need(max(shared, 2 * tile), tensor)


def turn_of(operator: str, weight: Weight) -> tuple[int, int]:
    """Columns that are unpacked at a time, and of a turn of the loop over K."""
    bits, group_size = weight.bits, weight.group_size
    if operator == "linear_w4a4":
        narrow = group_size in (32, 64)
        plane = group_size if narrow else BLOCK
        block = plane * 2 if narrow and bits == 4 else plane
    else:
        plane = half_block(group_size or BLOCK, bits)
        block = plane * (8 if bits == 3 else 8 // bits)
    return plane, max(block, group_size)


@functools.cache
def check_fits(
    arch: str,
    operator: str,
    weight: Weight,
    config: LinearConfig,
) -> None:
    """Raise ValueError for a launch that a chip has no memory for.

    Chips that are in no table here are left to Triton. Arguments are those of
    :func:`need`.
    """
    if arch not in SHARED_LIMITS:
        return
    taken = need(arch, operator, weight, config)
    for found, limit, what in (
        (taken.shared, SHARED_LIMITS[arch], "bytes of shared memory"),
        (taken.tensor, TENSOR_LIMITS.get(arch, 0), "columns of tensor memory"),
    ):
        if found > limit:
            size = weight.group_size
            scale = f"groups of {size}" if size else "one scale a channel"
            scale += " of weights and tokens" if weight.token_groups else ""
            raise ValueError(
                f"{operator} with weights of {weight.bits} bits, {scale} and {config} "
                f"takes up to {found} {what}, {arch} has {limit}: take a smaller "
                "block_m or block_n, or fewer stages"
            )


def check_weight(arch: str, operator: str, weight: Weight) -> None:
    """Raise ValueError for a weight that some number of tokens has no memory for.

    Args:
        arch: of the chip, whose table is taken.
        operator: ``linear_w4a4`` or ``linear_wna16``, for one weight or for experts.
        weight: to be kept, and what scales tokens will have.
    """
    scheme = weight.scheme
    for rows in (
        table(arch)[operator][scheme],
        rows_for_experts(arch, operator, scheme),
    ):
        for row in rows_of(rows, weight):
            check_fits(arch, operator, weight, row.config)
