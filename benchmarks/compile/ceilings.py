# SPDX-License-Identifier: Apache-2.0
"""Most instructions of the main loop of a linear, from its tile.

A turn of the loop unpacks codes of the weight, loads activations, multiplies, and adds
groups up, with scales of tokens where those are of groups too. What of each falls to a
thread, times what the unit needs for it, is the ceiling. Budgets are upper envelopes of
what Triton 3.9 made of the tables' rows, and a tenth: a change that costs more than
that is seen.
"""

from dataclasses import dataclass, fields

from vllm_lowbit.kernels.gpu.configs import LinearConfig, Weight
from vllm_lowbit.kernels.gpu.limits import turn_of

HEADROOM = 1.1


@dataclass(frozen=True)
class Budget:
    """Instructions of a thread, in a turn of the loop.

    Attributes:
        start: of any turn.
        code: for each code of 2 or 4 bits (of 8, where they are multiplied as such).
        code3: for each code of 3 bits.
        code8: for each code of 8 bits that becomes a float.
        activation: for each activation, twice where they are summed up for zero points
            of the weight, or become e4m3.
        product: for each instruction of a warp's matrix unit.
        total: for each sum that is added to the groups before, twice with zero points.
        scale: for each output channel and group of the tile.
        token: for each sum of a group that a scale of its token is multiplied with. One
            is the product; the rest loads that and the zero point, which a thread has
            for every sum of Blackwell's units, for two of Hopper's, for more of others.
    """

    start: float
    code: float
    code3: float
    code8: float
    activation: float
    product: float
    total: float
    scale: float
    token: float


# By operator and by a part of the name of the matrix instruction.
BUDGETS = {
    ("linear_w4a4", "MMA"): Budget(0, 0.8, 0, 0, 2.25, 0, 9, 0, 2.5),
    ("linear_w4a4", "GMMA"): Budget(50, 1.2, 0, 0, 1.8, 0, 2.8, 105, 4.5),
    ("linear_w4a4", "UTC"): Budget(71, 1.35, 0, 0, 1.5, 0, 2.5, 90, 10),
    ("linear_w4a4", "mfma"): Budget(47, 1.3, 0, 0, 1.7, 0, 12, 375, 1),
    ("linear_wna16", "MMA"): Budget(60, 3.6, 5.7, 12.5, 0, 4.2, 1.3, 39, 0),
    ("linear_wna16", "GMMA"): Budget(75, 3.8, 6.2, 6.1, 0.5, 0, 0.6, 61, 0),
    ("linear_wna16", "UTC"): Budget(66, 5.3, 7.4, 5.2, 0, 0, 0.7, 84, 0),
    ("linear_wna16", "mfma"): Budget(130, 8, 8.6, 7.9, 3.8, 0, 1.9, 345, 0),
}


def ceiling(
    operator: str,
    matrix: str,
    weight: Weight,
    config: LinearConfig,
    threads: int,
    e4m3: bool,
) -> int:
    """Most instructions of a turn.

    Args:
        operator: ``linear_w4a4`` or ``linear_wna16``.
        matrix: regular expression of the matrix instruction.
        weight: that is multiplied with.
        config: of the launch.
        threads: of a block.
        e4m3: whether codes become e4m3 numbers.
    """
    unit = next(name for name in ("mfma", "UTC", "GMMA", "MMA") if name in matrix)
    budget = BUDGETS[operator, unit]
    integer = operator == "linear_w4a4"
    columns = turn_of(operator, weight)[1]
    groups = columns // weight.group_size if weight.group_size else 0
    codes = config.block_n * columns / threads
    outputs = config.block_m * config.block_n / threads
    wide = not integer and weight.bits == 8
    summed = integer and weight.zeros
    counts = Budget(
        start=1,
        code=0 if weight.bits == 3 or wide else codes,
        code3=codes if weight.bits == 3 else 0,
        code8=codes if wide else 0,
        activation=config.block_m * columns / threads * (1 + summed + e4m3),
        product=outputs * columns / (128 if integer else 64) if unit == "MMA" else 0,
        total=outputs * groups * (1 + weight.zeros),
        scale=config.block_n * groups / threads,
        token=outputs * groups * weight.token_groups,
    )
    sums = (getattr(budget, f.name) * getattr(counts, f.name) for f in fields(Budget))
    return int(HEADROOM * sum(sums))
