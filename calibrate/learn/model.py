# SPDX-License-Identifier: Apache-2.0
"""The quantized model as a differentiable function of its transforms."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from transformers import PreTrainedConfig

from ...architecture import ModelShape
from ...kernels.grid import IntGrid
from ...kernels.quantize_weight.reference import best_clip
from ..rotations import Orthogonal
from ..stages import RESIDUAL_STAGES, DecoderStages, Online
from ..straight_through import fake_quantize
from ..transforms import fold_head, fold_layer, folded_norm, gain
from ..vocabulary import Vocabulary
from .parameters import Parameters, Tensors


class LearningModel:
    """Logits of the quantized model, its vocabulary in float.

    Args:
        config: of the model.
        shape: its sizes.
        layers: float32 tensors of each layer, by name after ``model.layers.N.``.
        vocabulary: of the float model.
        online: what the server does to activations.
        weights: grid and group size of fake-quantized weights, None for float ones.
        device: where it runs.
    """

    def __init__(
        self,
        config: PreTrainedConfig,
        shape: ModelShape,
        layers: Sequence[Tensors],
        vocabulary: Vocabulary,
        online: Online,
        weights: tuple[IntGrid, int | None] | None,
        device: str,
    ) -> None:
        self.shape, self.layers = shape, layers
        self.stages = DecoderStages(config, shape, online, device)
        self.vocabulary = vocabulary
        self.weights = weights
        self.clip_ratios: Tensors = {}
        """Of fake-quantized weights, by layer and name, kept until they are cleared:
        the search takes longer than all else of a small step."""

    def logits(self, ids: torch.Tensor, parameters: Parameters) -> torch.Tensor:
        """``[windows, tokens, vocab]`` for token ids ``[windows, tokens]``."""
        residual = parameters.residual(torch.float32)
        x = self._embedded(ids, residual)
        for index in range(self.shape.num_layers):
            x = self.layer(index, x, residual, parameters)
        vocabulary = self.vocabulary
        if residual is None:
            return vocabulary.logits(self.stages.norm(x, *vocabulary.final_norm))
        own = gain(vocabulary.norm, self.shape)
        head = fold_head(
            vocabulary.head, own, vocabulary.norm_bias, residual, torch.float32
        )
        normed = self.stages.norm(x, *folded_norm(vocabulary.norm, self.shape))
        return replace(vocabulary, head=head).logits(normed)

    def first_not_finite(self, ids: torch.Tensor, parameters: Parameters) -> str | None:
        """The first layer whose output holds an Inf or NaN, None where none does."""
        residual = parameters.residual(torch.float32)
        x = self._embedded(ids, residual)
        for index in range(self.shape.num_layers):
            x = self.layer(index, x, residual, parameters)
            if not bool(torch.isfinite(x).all()):
                return f"model.layers.{index}"
        return None

    def _embedded(self, ids: torch.Tensor, residual: Orthogonal | None) -> torch.Tensor:
        x = self.vocabulary.look_up(ids)
        return x if residual is None else residual.right(x)

    def layer(
        self,
        index: int,
        x: torch.Tensor,
        residual: Orthogonal | None,
        parameters: Parameters,
    ) -> torch.Tensor:
        """The residual stream after one layer."""
        transforms = parameters.layer(index, torch.float32)
        weights = fold_layer(
            self.layers[index], self.shape, residual, transforms, torch.float32
        )
        if self.weights is not None:
            for name, weight in weights.items():
                if weight.dim() == 2:
                    key = f"clip_ratio.{index}.{name}"
                    weights[name] = self._fake_quantized(key, weight, *self.weights)
        stages, ratios = self.stages.at(index), parameters.clip_ratios(index)
        if ratios:
            stages = stages.clipped(ratios)
        for stage in RESIDUAL_STAGES:
            x = stages.update(stage, weights, x)
        return x

    def _fake_quantized(
        self, name: str, weight: torch.Tensor, grid: IntGrid, group_size: int | None
    ) -> torch.Tensor:
        rows = weight.view(-1, group_size or weight.shape[1])
        ratio = self.clip_ratios.get(name)
        if ratio is None:
            whole, _ = grid.parameters(rows.detach())
            ratio = best_clip(rows.detach(), grid)[0] / whole
            self.clip_ratios[name] = ratio
        return fake_quantize(rows, grid, ratio).view(weight.shape)
