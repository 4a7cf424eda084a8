# SPDX-License-Identifier: Apache-2.0
"""The float model on the calibration windows: what is aimed at."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..equalize import InputPower
from ..stages import RESIDUAL_STAGES, DecoderStages
from ..vocabulary import Vocabulary

Tensors = dict[str, torch.Tensor]
CHUNK_TOKENS = 4096


@dataclass(frozen=True)
class Teacher:
    """Float hidden states, from which its logits are cheap.

    Attributes:
        states: ``[windows, tokens, hidden]``, float32, before the final norm.
        powers: of each layer's inputs of o_proj and down_proj.
        stages: the float model.
        vocabulary: its own.
    """

    states: torch.Tensor
    powers: list[InputPower]
    stages: DecoderStages
    vocabulary: Vocabulary

    @classmethod
    @torch.no_grad()
    def of(
        cls,
        stages: DecoderStages,
        layers: Sequence[Tensors],
        vocabulary: Vocabulary,
        windows: torch.Tensor,
    ) -> "Teacher":
        """Run the float model, layer by layer."""
        parts = vocabulary.look_up(windows).split(
            max(1, CHUNK_TOKENS // windows.shape[1])
        )
        powers = []
        for index, weights in enumerate(layers):
            power, layer = InputPower(), stages.at(index)
            for stage in RESIDUAL_STAGES:
                parts = tuple(
                    layer.update(stage, weights, part, power.add) for part in parts
                )
            powers.append(power)
        return cls(torch.cat(parts), powers, stages, vocabulary)

    @torch.no_grad()
    def logits(self, windows: torch.Tensor) -> torch.Tensor:
        """``[windows, tokens, vocab]`` of some windows, by their indices."""
        x = self.stages.norm(self.states[windows], *self.vocabulary.final_norm)
        return self.vocabulary.logits(x)
