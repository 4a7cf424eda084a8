# SPDX-License-Identifier: Apache-2.0
"""Clip ratios of linear inputs: learned by gradients, or searched for.

A ratio is a fraction of each range of the inputs of one layer and stage. Learned as in
PACT (Choi et al., 2018) and LSQ (Esser et al., 2020), with the range dynamic.
"""

from collections.abc import Mapping, Sequence

import torch
from torch.nn import functional

from ..kernels.grid import IntGrid
from ..schema import (
    LEAST_CLIP_RATIO,
    MOST_CLIP_RATIO,
    ClipRatios,
    LowbitConfig,
)
from .straight_through import fake_quantize, straight_through

# By stage, of one layer.
Ratios = dict[str, float]
# A ratio is stored with so many decimals: what is served was calibrated with.
_DIGITS = 4
_SEARCHED = tuple(step / 40 for step in range(30, 41))
# Of the calibration inputs, about so many decide.
SEARCH_TOKENS = 8192
# Of them at a time: all outputs of a large MLP take more memory than its weights.
_ROWS = 512


def ratio_of(raw: torch.Tensor) -> torch.Tensor:
    """Ratios, float32, as trained numbers say; what is beyond the bounds can return."""
    raw = raw.float()
    return straight_through(raw, raw.clamp(LEAST_CLIP_RATIO, MOST_CLIP_RATIO))


def stored_ratio(raw: torch.Tensor) -> float:
    """What a trained number is stored as."""
    return round(float(raw.clamp(LEAST_CLIP_RATIO, MOST_CLIP_RATIO)), _DIGITS)


def search_ratio(
    inputs: Sequence[torch.Tensor], weights: Sequence[torch.Tensor], grid: IntGrid
) -> float:
    """The ratio with the least squared error of the outputs of linears.

    Args:
        inputs: float32 ``[..., k]`` that they read, unquantized.
        weights: float32 ``[n, k]`` of those that share the input.
        grid: of the input.

    Returns:
        of equally good ratios the largest.
    """
    rows = [few for part in inputs for few in part.flatten(0, -2).split(_ROWS)]

    def error(ratio: float) -> float:
        total = 0.0
        for x in rows:
            difference = fake_quantize(x, grid, ratio) - x
            for weight in weights:
                out = functional.linear(difference, weight)
                total += float(out.double().square().sum())
        return total

    errors = {ratio: error(ratio) for ratio in reversed(_SEARCHED)}
    return min(errors, key=lambda ratio: errors[ratio])


def with_ratios(config: LowbitConfig, found: Mapping[int, Ratios]) -> LowbitConfig:
    """A checkpoint's config with the ratios of every layer.

    Args:
        config: as planned.
        found: by layer and stage; empty where inputs have one ratio for all.
    """
    if not found:
        return config
    layers = [found[index] for index in sorted(found)]
    ratios = {stage: [layer[stage] for layer in layers] for stage in layers[0]}
    scheme = config.scheme.with_clip_ratios(ClipRatios.model_validate(ratios))
    return config.model_copy(update={"scheme": scheme})
