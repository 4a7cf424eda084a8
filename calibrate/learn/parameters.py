# SPDX-License-Identifier: Apache-2.0
"""What is learned, and the transforms it stands for."""

from dataclasses import dataclass, field, replace
from typing import Any

import torch

from ...architecture import ModelShape
from ..clips import Ratios, ratio_of
from ..plan import Transforms
from ..rotations import Dense, Orthogonal, of_stream
from ..transforms import LayerTransforms

Tensors = dict[str, torch.Tensor]
CLIP = "clip."


@dataclass(frozen=True)
class Parameters:
    """Rotations, logarithms of scales, and clip ratios, float64; what is absent is not
    learned.

    Attributes:
        shape: sizes of the model.
        fixed: the transforms that are not.
        rotations: ``residual`` ``[1, hidden, hidden]`` and ``value``
            ``[layers, num_kv_heads, head_dim, head_dim]``.
        log_scales: by name, ``[layers, ...]``; see
            :func:`~..transforms.scale_shapes`.
        learned: the names of those that are; other scales stay as they start.
        clips: by stage as ``clip.STAGE``, ``[layers]``, before
            :func:`~..clips.ratio_of`.
    """

    shape: ModelShape
    fixed: Transforms
    rotations: Tensors
    log_scales: Tensors
    learned: frozenset[str]
    clips: Tensors = field(default_factory=dict)

    def leaves(self) -> Tensors:
        """All that is learned, by name."""
        every = self.rotations | self.log_scales | self.clips
        return {name: t for name, t in every.items() if name in self.learned}

    def residual(self, dtype: torch.dtype) -> Orthogonal | None:
        """Rotation of the residual stream."""
        if "residual" not in self.rotations:
            return self.fixed.residual
        return of_stream(Dense(self.rotations["residual"].to(dtype)), self.shape)

    def layer(self, index: int, dtype: torch.dtype) -> LayerTransforms:
        """Transforms of one layer, with gradients where they are learned."""
        fixed = self.fixed.layer(index)
        value = fixed.value
        if "value" in self.rotations:
            value = Dense(self.rotations["value"][index].to(dtype))
        scales: dict[str, Any] = {
            name: logs[index].exp().to(dtype) for name, logs in self.log_scales.items()
        }
        return replace(fixed, value=value, **scales)

    def clip_ratios(self, index: int) -> Tensors:
        """Of the inputs of one layer, ``[]`` by stage, with gradients; empty where they
        are not learned."""
        return {
            name.removeprefix(CLIP): ratio_of(raw[index])
            for name, raw in self.clips.items()
        }


@dataclass(frozen=True)
class Learned:
    """Transforms of every layer, done learning: as :class:`~..plan.Transforms`.

    Attributes:
        residual: rotation of the residual stream.
        layers: transforms of each layer, float64.
        clip_ratios: of its inputs, by stage, as they are stored.
    """

    residual: Orthogonal | None
    layers: tuple[LayerTransforms, ...]
    clip_ratios: tuple[Ratios, ...]

    def layer(self, index: int) -> LayerTransforms:
        """Those of one decoder layer."""
        return self.layers[index]
