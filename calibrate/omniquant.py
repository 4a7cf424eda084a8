# SPDX-License-Identifier: Apache-2.0
"""OmniQuant: weight clipping and scales that are learned block by block.

Shao et al., OmniQuant, 2024: learnable weight clipping (LWC, eq. 2) and learnable
equivalent transformation (LET, section 3.3), trained together on the error of each
block's output. Scales and zero points in training are those that are stored; norm
weights are rounded as they are stored.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from ..errors import ConfigError
from ..kernels.grid import TINY, IntGrid
from ..kernels.quantize_weight.reference import best_clip
from ..schema import Scheme
from .block import Block
from .clips import ratio_of, stored_ratio
from .layer import LayerModels, Streams, Tensors
from .quantize import Ranges
from .recipe_sections import GPTQ_METHODS
from .recipe_sections import OmniQuant as Settings
from .record import CalibrationRecord
from .rotations import Orthogonal
from .stages import linears_of, stages_of
from .straight_through import on_grid, rounded, stored_as
from .training import Group, Training
from .transforms import (
    NORM_SCALES,
    LayerTransforms,
    fold_layer,
    scale_shapes,
    storable,
)

# LWC starts with at most sigmoid(4) = 0.982 of a range, as published. Where the clip
# search that all methods share keeps less, it starts from that.
START = 4.0


@dataclass(frozen=True)
class OmniQuantOptions:
    """Settings of :class:`OmniQuant`.

    Attributes:
        let: whether scales are learned; clipping always is.
        alpha: SmoothQuant's, of the scales that learning starts from.
        aug: see :class:`.block.Block`.
        epochs: over the windows.
        batch: windows of a step.
        clip_rate: learning rate of clipping.
        scale_rate: of the logarithms of scales, and of shifts.
        input_clip_rate: of the clip ratios of inputs.
        seed: of the order of windows.
        clip_ratio: that the clip ratios of inputs start from, None where they are not
            learned.
        extra_bits: of weights while learning. Ranges are not kept then.
    """

    let: bool
    alpha: float
    aug: bool
    epochs: int
    batch: int
    clip_rate: float
    scale_rate: float
    input_clip_rate: float
    seed: int
    clip_ratio: float | None = None
    extra_bits: int = 0

    @classmethod
    def of(
        cls,
        recipe: Settings,
        scheme: Scheme,
        seed: int,
        clip_ratio: float | None = None,
    ) -> "OmniQuantOptions":
        """A recipe's, and for what it leaves open the published ones of a scheme.

        Raises:
            ConfigError: when nothing that is learned would be kept.
        """
        two_bits = scheme.weights.bits == 2
        weights_alone = scheme.activations.bits == 16
        let, aug, epochs = recipe.let, recipe.aug, recipe.epochs
        alpha, extra_bits = recipe.alpha, recipe.extra_weight_bits
        if let is None:
            let = not weights_alone
        if extra_bits is None:
            makes_up = recipe.rounding in GPTQ_METHODS
            extra_bits = int(weights_alone and makes_up and let)
        if extra_bits and not let and clip_ratio is None:
            bits, given = scheme.activations.bits, json.dumps(recipe.let)
            raise ConfigError(
                f"omniquant.extra_weight_bits is {extra_bits}: with let "
                f"{given} and inputs of {bits} bits only ranges are learned, "
                "which would not be kept; use let true, or no extra bits"
            )
        return cls(
            let=let,
            alpha=(0.25 if weights_alone else 0.5) if alpha is None else alpha,
            aug=two_bits if aug is None else aug,
            epochs=epochs or (40 if two_bits else 20),
            batch=recipe.batch,
            clip_rate=recipe.clip_rate,
            scale_rate=recipe.scale_rate,
            input_clip_rate=recipe.input_clip_rate,
            seed=seed,
            clip_ratio=clip_ratio,
            extra_bits=extra_bits,
        )


class ClippedMatrix:
    """Learnable range of every group of a matrix.

    Args:
        weight: ``[n, k]`` that it starts from.
        grid: of its codes.
        group_size: elements of k that share a scale; None for whole rows.

    Attributes:
        high, low: logits of the fractions of maximum and minimum that are kept,
            ``[n, groups, 1]``.
    """

    def __init__(
        self, weight: torch.Tensor, grid: IntGrid, group_size: int | None
    ) -> None:
        self.grid = grid
        rows = weight.float().unflatten(-1, (-1, group_size or weight.shape[1]))
        best, _ = best_clip(rows.flatten(0, 1), grid)
        kept = best.view(*rows.shape[:2], 1) / grid.parameters(rows)[0]
        self.high = torch.special.logit(kept, eps=1e-6).clamp(max=START)
        self.low = self.high.clone()

    def parameters(self, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Scale and zero point, float32 ``[n, groups, 1]``, of ``[n, groups, size]``.

        A range always holds zero, and one of nothing but zeros has scale 1, as in the
        grid's own.
        """
        low, high = rows.aminmax(dim=-1, keepdim=True)
        high = torch.sigmoid(self.high) * high.clamp(min=0.0)
        low = torch.sigmoid(self.low) * low.clamp(max=0.0)
        peak = torch.maximum(high, -low)
        grid = self.grid
        if grid.symmetric:
            scale = torch.where(peak < TINY, 1.0, peak / grid.code_max)
            return scale, torch.zeros_like(scale)
        scale = (high - low) / (grid.code_max - grid.code_min)
        scale = torch.where(peak < TINY, 1.0, scale)
        return scale, grid.code_min - rounded(low * (1.0 / scale))

    def decoded(self, weight: torch.Tensor) -> torch.Tensor:
        """A weight ``[n, k]`` as it would be served; carries gradients."""
        rows = weight.unflatten(-1, (self.high.shape[1], -1))
        scale, zero_point = self.parameters(rows)
        return on_grid(rows * (1.0 / scale), self.grid, scale, zero_point).flatten(-2)

    @torch.no_grad()
    def ranges(self, weight: torch.Tensor) -> Ranges:
        """Those that a weight ``[n, k]`` is stored with."""
        rows = weight.unflatten(-1, (self.high.shape[1], -1))
        scale, zero_point = self.parameters(rows)
        return scale.squeeze(-1), zero_point.squeeze(-1).to(torch.int32)


class LearnedBlock:
    """One decoder layer whose ranges and scales are trained.

    Args:
        models: its stages.
        scheme: grids.
        tensors: of the layer, in the dtype of the base model.
        residual: rotation of the residual stream.
        transforms: where its scales start.
        let: whether they are trained.
        clip_ratio: that those of its inputs start from; None where they are not
            trained.
        extra_bits: of weights, beyond the scheme's, 8 in all at most.
    """

    def __init__(
        self,
        models: LayerModels,
        scheme: Scheme,
        tensors: Tensors,
        residual: Orthogonal | None,
        transforms: LayerTransforms,
        let: bool,
        clip_ratio: float | None = None,
        extra_bits: int = 0,
    ) -> None:
        self.shape, self.tensors = models.served.shape, tensors
        self.residual, self.start = residual, transforms
        weights = scheme.weights
        grid = IntGrid(min(8, weights.bits + extra_bits), weights.symmetric)
        self.log_scales: Tensors = {}
        self.shifts: Tensors = {}
        if let:
            self.log_scales = self._log_scales()
            biases = [tensors.get(f"self_attn.{name}_proj.bias") for name in "vo"]
            if biases[0] is not None and biases[1] is not None:
                self.shifts["value_shift"] = torch.zeros_like(biases[0]).float()
        with torch.no_grad():
            folded = self._fold()
        self._fixed = None if let else folded
        self.clips = {
            name: ClippedMatrix(folded[f"{name}.weight"], grid, weights.group_size)
            for name in linears_of(self.shape)
        }
        self.input_clips: Tensors = {}
        if clip_ratio is not None:
            device = next(iter(tensors.values())).device
            self.input_clips = {
                stage: torch.tensor(clip_ratio, device=device)
                for stage in stages_of(self.shape)
            }

    def clip_ratios(self) -> Tensors:
        """Of its inputs, by stage; carry gradients."""
        return {stage: ratio_of(raw) for stage, raw in self.input_clips.items()}

    def _log_scales(self) -> Tensors:
        logs = {}
        for name, extent in scale_shapes(self.shape).items():
            scale = getattr(self.start, name)
            device = next(iter(self.tensors.values())).device
            ones = torch.ones(extent, device=device)
            logs[name] = (ones if scale is None else scale.float()).log()
        return logs

    def transforms(self) -> LayerTransforms:
        """With scales and shifts as they are now."""
        learned: dict[str, Any] = {n: s.exp() for n, s in self.log_scales.items()}
        learned |= self.shifts
        transforms = replace(self.start, **learned)
        if not learned:
            return transforms
        with torch.no_grad():
            exact = storable(transforms, self.tensors, self.shape, self.residual)
        through: dict[str, Any] = {
            name: learned[name] + (getattr(exact, name) - learned[name]).detach()
            for name in NORM_SCALES
        }
        return replace(transforms, **through)

    def _fold(self) -> Tensors:
        folded = fold_layer(self.tensors, self.shape, self.residual, self.transforms())
        return {name: tensor.float() for name, tensor in folded.items()}

    def folded(self) -> Tensors:
        """float32 tensors before rounding; carry gradients."""
        return self._fold() if self._fixed is None else self._fixed

    def weights(self) -> Tensors:
        """What the server would compute with now; carries gradients."""
        weights = {}
        for name, tensor in self.folded().items():
            clip = self.clips.get(name.removesuffix(".weight"))
            if clip is None:
                weights[name] = stored_as(tensor, self.tensors[name].dtype)
            else:
                weights[name] = clip.decoded(tensor)
        return weights

    @torch.no_grad()
    def ranges(self) -> dict[str, Ranges]:
        """Of every linear, as they are now."""
        folded = self.folded()
        return {
            name: clip.ranges(folded[f"{name}.weight"])
            for name, clip in self.clips.items()
        }


class OmniQuant:
    """The method, over the layers in order.

    Args:
        models: the served and the float model, of any layer.
        scheme: grids.
        options: settings.
        samples: windows to train on, the first ones.
        chunk: windows at a time where nothing is trained.
        record: takes the curves.
    """

    def __init__(
        self,
        models: LayerModels,
        scheme: Scheme,
        options: OmniQuantOptions,
        samples: int,
        chunk: int,
        record: CalibrationRecord,
    ) -> None:
        self.models, self.scheme, self.options = models, scheme, options
        self.samples, self.chunk, self.record = samples, chunk, record

    def run(
        self,
        layer: int,
        tensors: Tensors,
        residual: Orthogonal | None,
        transforms: LayerTransforms,
        streams: Streams,
        progress: Callable[[str], None],
    ) -> tuple[dict[str, Ranges] | None, LayerTransforms]:
        """Train one layer.

        Args:
            layer: its index.
            tensors: of the layer, by name after ``model.layers.N.``.
            residual: rotation of the residual stream.
            transforms: where its scales start.
            streams: before the layer.
            progress: called with what is being done.

        Returns:
            What its linears are rounded to, None after training on a finer grid, and
            the transforms to fold into it. Clip ratios that were learned are put among
            those of the served model.

        Raises:
            CalibrationError: naming layer and step when a loss is not finite.
        """
        options, models = self.options, self.models.at(layer)
        name = f"model.layers.{layer}"
        learned = LearnedBlock(
            models,
            self.scheme,
            tensors,
            residual,
            transforms,
            options.let,
            options.clip_ratio,
            options.extra_bits,
        )
        with torch.no_grad():
            folded = learned.folded()
        samples = min(self.samples, len(streams.served))
        block = Block(models, folded, streams, samples, self.chunk, options.aug)
        clips = learned.clips.values()
        groups = [Group([t for c in clips for t in (c.high, c.low)], options.clip_rate)]
        if options.let:
            let = [*learned.log_scales.values(), *learned.shifts.values()]
            groups.append(Group(let, options.scale_rate))
        if learned.input_clips:
            inputs = list(learned.input_clips.values())
            groups.append(Group(inputs, options.input_clip_rate))
        batch = min(options.batch, samples)
        training = Training(
            name=f"omniquant.{name}",
            windows=samples,
            batch=batch,
            steps=options.epochs * (samples // batch),
            seed=options.seed,
        )

        def shown(step: int, loss: float) -> None:
            progress(f"{name}, step {step}/{training.steps}, loss {loss:.3g}")

        block.train(
            learned.weights,
            groups,
            training,
            self.record,
            shown,
            learned.clip_ratios if learned.input_clips else None,
        )
        with torch.no_grad():
            ratios = learned.clip_ratios().items()
            found = models.served.online.clip_ratios[layer]
            found.update({stage: stored_ratio(ratio) for stage, ratio in ratios})
            ranges = None if options.extra_bits else learned.ranges()
            return ranges, learned.transforms()
