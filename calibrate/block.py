# SPDX-License-Identifier: Apache-2.0
"""Training one decoder layer so that its output follows the float model's."""

from collections.abc import Callable, Sequence

import torch

from .layer import LayerModels, Streams, Tensors
from .record import CalibrationRecord
from .stages import RESIDUAL_STAGES, DecoderStages
from .training import Group, Training, minimise


class Block:
    """The inputs and outputs that one layer is trained on.

    Args:
        models: the served and the float model.
        folded: the float layer's tensors.
        streams: hidden states before it.
        samples: windows to train on, the first ones.
        chunk: windows at a time where nothing is trained.
        aug: also follow what the float layer makes of the served inputs.
    """

    @torch.no_grad()
    def __init__(
        self,
        models: LayerModels,
        folded: Tensors,
        streams: Streams,
        samples: int,
        chunk: int,
        aug: bool = False,
    ) -> None:
        self.served = models.served
        self.inputs = streams.served[:samples]
        weights = {name: tensor.float() for name, tensor in folded.items()}

        def outputs(x: torch.Tensor) -> torch.Tensor:
            few = x[:samples]
            parts = (through(models.plain, weights, p) for p in few.split(chunk))
            return models.scratch.collect(parts, len(few))

        self.targets = [outputs(streams.plain)]
        if aug:
            self.targets.append(outputs(streams.served))

    def train(
        self,
        weights_of: Callable[[], Tensors],
        groups: Sequence[Group],
        training: Training,
        record: CalibrationRecord,
        progress: Callable[[int, float], None],
        clip_ratios_of: Callable[[], Tensors] | None = None,
    ) -> None:
        """Train tensors in place on the mean squared error of the layer's output.

        Args:
            weights_of: the layer as it would be served now; carries gradients.
            groups: what is trained.
            training: how long.
            record: takes the curve.
            progress: called with the steps done and the loss.
            clip_ratios_of: its inputs' clip ratios, by stage, where they are trained
                as well; carry gradients.
        """

        def loss_of(batch: torch.Tensor) -> torch.Tensor:
            served = self.served
            if clip_ratios_of is not None:
                served = served.clipped(clip_ratios_of())
            out = through(served, weights_of(), self.inputs[batch])
            losses = [(out - target[batch]).square().mean() for target in self.targets]
            return torch.stack(losses).sum()

        minimise(loss_of, groups, training, record, progress)


def through(model: DecoderStages, weights: Tensors, x: torch.Tensor) -> torch.Tensor:
    """The residual stream x after a layer."""
    for stage in RESIDUAL_STAGES:
        x = model.update(stage, weights, x)
    return x
