# SPDX-License-Identifier: Apache-2.0
"""Cases of hadamard_quantize as served by default: asymmetric, with an input scale.

Columns that are scaled have more bits than bfloat16, so they are multiplied in three
parts.
"""

from collections.abc import Iterator
from dataclasses import replace

import torch

from vllm_lowbit.kernels.hadamard.triton import tile_of

from .activations import ROWS, _tile_case
from .case import TARGETS, Case

SERVED = {"SCALED": True, "PARTS": 3, "SYMMETRIC": False, "CODE_MIN": -8}
CEILING = 4600


def cases() -> Iterator[Case]:
    """Every row that is one tile, on every target; bfloat16 there, float16 here."""
    for target in TARGETS:
        for row in ROWS:
            tile = tile_of(*row, False, torch.device("cpu"), target)
            if tile is None:
                continue
            case = _tile_case(target, row, tile, 0)
            yield replace(
                case,
                name=f"{case.name}, as served",
                types={**case.types, "x_ptr": "*fp16"},
                constants={**case.constants, **SERVED},
                ceiling=CEILING,
                quick=False,
            )
