# SPDX-License-Identifier: Apache-2.0
"""Scales that even out what a Hadamard mixes, from weights and float activations.

A Hadamard spreads the quantization error of a linear's input evenly, so the output
error goes with ``sum_i (a_i / s_i)^2 * sum_i (w_i s_i)^2`` for inputs of root mean
square a_i, weight columns of norm w_i and a scale s_i that divides input i. By
Cauchy-Schwarz it is least at ``s_i = sqrt(a_i / w_i)``: inputs and columns are then of
one size, as in SmoothQuant (Xiao et al., 2023) at alpha = 0.5, with rms for maximum.
"""

from collections.abc import Mapping

import torch

from ..architecture import ModelShape

# Beyond this a channel is as good as dead, and its scale would be noise.
LARGEST = 2.0**12


class InputPower:
    """Sum of squares of each input channel of o_proj and down_proj, over all tokens."""

    def __init__(self) -> None:
        self.sums: dict[str, torch.Tensor] = {}

    def add(self, stage: str, x: torch.Tensor) -> None:
        """Add the rows of x ``[..., n]``."""
        power = x.double().square().flatten(0, -2).sum(dim=0)
        self.sums[stage] = self.sums.get(stage, 0) + power


def up_scale(power: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
    """What up_proj's rows are divided and down_proj's columns multiplied by.

    Args:
        power: ``[intermediate]``, sum of squares of down_proj's inputs.
        down: its weight ``[hidden, intermediate]``.

    Returns:
        float64 ``[intermediate]``, with geometric mean 1.
    """
    return _balance(power, down.double().square().sum(dim=0))


def up_scales(
    power: InputPower, weights: Mapping[str, torch.Tensor], shape: ModelShape
) -> torch.Tensor | None:
    """:func:`up_scale` of a layer, ``[experts, intermediate]`` where it has experts.

    None where what is between up and down lets no scale pass.

    Args:
        power: of the layer's inputs.
        weights: of the layer, by name after ``model.layers.N.``.
    """
    if not shape.architecture.passes_up_scale:
        return None
    if not shape.num_experts:
        return up_scale(power.sums["down_input"], weights["mlp.down_proj.weight"])
    return torch.stack(
        [
            up_scale(
                power.sums[f"{expert}.down_input"],
                weights[f"{expert}.down_proj.weight"],
            )
            for expert in shape.mlps()
        ]
    )


def value_scale(
    power: torch.Tensor, out: torch.Tensor, shape: ModelShape
) -> torch.Tensor:
    """As :func:`up_scale` between v_proj and o_proj: ``[num_kv_heads * head_dim]``.

    The heads that share a value head share its scale.
    """
    columns = out.double().square().sum(dim=0)
    group = shape.num_heads // shape.num_kv_heads

    def per_value(x: torch.Tensor) -> torch.Tensor:
        return x.view(shape.num_kv_heads, group, shape.head_dim).sum(dim=1).flatten()

    return _balance(per_value(power), per_value(columns))


def _balance(inputs: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    live = (inputs > 0) & (columns > 0)
    ratio = (inputs / columns).where(live, 1.0).pow(0.25)
    if bool(live.any()):
        ratio = ratio / ratio[live].log().mean().exp()
    return ratio.clamp(1 / LARGEST, LARGEST).where(live, 1.0)
