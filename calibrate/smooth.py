# SPDX-License-Identifier: Apache-2.0
"""SmoothQuant: closed-form scales between what is written and what reads it.

Xiao et al., SmoothQuant, 2023, eq. 4: channel j of a linear's input is divided by
``max|X_j|^alpha / max|W_j|^(1 - alpha)`` and the weight's column multiplied by it.
Here v to o and up to down are scaled as well as norm to linear.
"""

from collections.abc import Iterator, Mapping
from dataclasses import replace

import torch

from ..architecture import ModelShape
from .equalize import LARGEST
from .rotations import Orthogonal
from .stages import DecoderStages
from .transforms import LayerTransforms, gain, norm_readers


def smooth_scales(
    model: DecoderStages,
    weights: Mapping[str, torch.Tensor],
    streams: tuple[torch.Tensor, torch.Tensor],
    residual: Orthogonal | None,
    transforms: LayerTransforms,
    alpha: float,
    chunk: int,
) -> LayerTransforms:
    """The transforms of a layer, with SmoothQuant's scales.

    Args:
        model: the float model, without transforms.
        weights: of the layer, float32.
        streams: its residual stream before attention, and before the MLP.
        residual: rotation the scales come after.
        transforms: those the layer has already.
        alpha: share of the difficulty that moves into the weights.
        chunk: windows at a time.

    Returns:
        ``transforms`` with every scale but that of the keys, and that between up and
        down where no scale comes through the activation.
    """
    before_attention, before_mlp = streams
    norms = dict(
        zip(("attn_input", "mlp_input"), norm_readers(model.shape), strict=True)
    )

    def inputs(stage: str) -> Iterator[torch.Tensor]:
        attention = stage in ("attn_input", "o_input")
        x = before_attention if attention else before_mlp
        for part in x.split(chunk):
            if residual is not None and stage in norms:
                yield residual.right(model.normalized(part))
            else:
                yield model.input_of(stage, weights, part)

    def scale(stage: str, group: int = 1, heads: int = 1) -> torch.Tensor:
        largest = [x.abs().flatten(0, -2).amax(dim=0) for x in inputs(stage)]
        matrices = [weights[f"{name}.weight"].double() for name in model.stages[stage]]
        if residual is not None and stage in norms:
            own = gain(weights[f"{norms[stage]}.weight"].double(), model.shape)
            matrices = [residual.right(matrix * own) for matrix in matrices]
        columns = torch.cat(matrices).abs().amax(dim=0)
        peak = torch.stack(largest).amax(dim=0).double()
        return _balance(
            _shared(peak, group, heads), _shared(columns, group, heads), alpha
        )

    shape = model.shape
    return replace(
        transforms,
        attn_scale=scale("attn_input"),
        mlp_scale=scale("mlp_input"),
        value_scale=scale("o_input", _group(shape), shape.num_kv_heads),
        up_scale=scale("down_input") if shape.architecture.passes_up_scale else None,
    )


def _group(shape: ModelShape) -> int:
    return shape.num_heads // shape.num_kv_heads


def _shared(x: torch.Tensor, group: int, heads: int) -> torch.Tensor:
    """Largest over the query heads that share a value head."""
    return x if group == 1 else x.view(heads, group, -1).amax(dim=1).flatten()


def _balance(inputs: torch.Tensor, columns: torch.Tensor, alpha: float) -> torch.Tensor:
    live = (inputs > 0) & (columns > 0)
    ratio = inputs.where(live, 1.0).pow(alpha) / columns.where(live, 1.0).pow(1 - alpha)
    return ratio.clamp(1 / LARGEST, LARGEST).where(live, 1.0)
