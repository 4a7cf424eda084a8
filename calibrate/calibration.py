# SPDX-License-Identifier: Apache-2.0
"""The layers of a model, quantized one after another.

Two streams of hidden states go through the model: one in float, to compare with, and
one through what has been quantized so far, so that each linear is fitted to the inputs
it will really see. One layer's weights are in memory at a time.
"""

import itertools
from collections.abc import Callable
from dataclasses import replace

import torch
from torch.nn import functional

from ..architecture import ROUTER
from ..errors import CalibrationError
from ..load_time import check_finite
from ..schema import LowbitConfig
from .block import Block, through
from .clips import with_ratios
from .equalize import InputPower, up_scales, value_scale
from .estimate import CHUNK_TOKENS, Estimate, Estimator, Speed
from .layer import LayerModels, QuantizedLayer, StageQuantizer, Streams, layer_errors
from .learn.end_to_end import learn_transforms
from .learn.parameters import Learned
from .learn.snapshot import Snapshot
from .omniquant import OmniQuant, OmniQuantOptions
from .plan import Transforms, online, written_tensors
from .publish import Losses
from .recipe import Recipe
from .record import CalibrationRecord
from .refine import LearnedLayer, RefinedModel, refine_layer, refine_model
from .rotary import model_config
from .scratch import Scratch
from .smooth import smooth_scales
from .source import Source
from .stages import RESIDUAL_STAGES, DecoderStages
from .transforms import LayerTransforms, fold_layer, storable
from .vocabulary import Vocabulary, plain_vocabulary, served_vocabulary
from .writer import CheckpointWriter, largest_bytes, stacking

Weights = dict[str, torch.Tensor]
Progress = Callable[[int, int, str], None]
Announce = Callable[[Estimate], None]


def _module(index: int) -> str:
    return f"model.layers.{index}"


def _prefix(index: int) -> str:
    return f"{_module(index)}."


class Calibration:
    """One run over a model; arguments as in :func:`calibrate`.

    Args:
        windows: token ids ``[windows, tokens]``; those after ``recipe.data.samples``
            are only measured on.
        training: token ids of the windows that the whole model is trained on.

    Attributes:
        record: what training and quantization measured.
    """

    def __init__(
        self,
        source: Source,
        config: LowbitConfig,
        recipe: Recipe,
        windows: torch.Tensor,
        training: torch.Tensor,
        device: str,
        progress: Progress,
        scratch: Scratch,
    ) -> None:
        self.scratch = scratch
        self.source, self.config, self.recipe = source, config, recipe
        self.shape, self.device = source.shape, device
        self.windows, self.training = windows, training
        self.transforms: Transforms | Learned
        self.transforms = Transforms.of(self.shape, config.rotations)
        hf_config = model_config(source.directory, self.shape)
        served = online(config.scheme, self.transforms)
        self.plain = DecoderStages(hf_config, self.shape, device=device)
        rotated = replace(served, activations=None, kv4=False)
        self.models = LayerModels(
            served=DecoderStages(hf_config, self.shape, served, device),
            plain=DecoderStages(hf_config, self.shape, rotated, device),
            scratch=scratch,
        )
        self.clip_ratios = served.clip_ratios
        self.progress = progress
        self.chunk = max(1, CHUNK_TOKENS // windows.shape[1])
        self.per_layer = sum(map(len, self.plain.stages.values()))
        self.total = self.shape.num_layers * self.per_layer
        if recipe.refine.scope == "model":
            self.total += recipe.refine.steps
        self.record = CalibrationRecord()
        samples, scheme = recipe.data.samples, config.scheme
        self.quantizer = StageQuantizer(
            self.models,
            scheme,
            recipe.rounding,
            samples,
            self.chunk,
            searches_clips=recipe.clip == "searched",
        )
        clip = recipe.activations.clip_ratio if recipe.clip == "learned" else None
        options = OmniQuantOptions.of(recipe.omniquant, scheme, recipe.seed, clip)
        learns_scales = recipe.weights.method == "omniquant" and options.let
        self.alpha = options.alpha if learns_scales else recipe.transforms.smooth
        self.omniquant = OmniQuant(
            self.models, scheme, options, samples, self.chunk, self.record
        )

    @property
    def untouched_experts(self) -> int:
        """How many experts no calibration token went through."""
        return sum(not tokens for tokens in self.quantizer.tokens.values())

    def learn(self, snapshot: Snapshot) -> None:
        """Learn what the recipe says is learned.

        Raises:
            CalibrationError: naming the step at which numbers were not finite.
            ConfigError: when the snapshot belongs to another run.
        """
        if not self.recipe.learns:
            return
        self.transforms, curve = learn_transforms(
            self.source,
            self.recipe,
            self.config,
            self.windows[: self.recipe.data.samples].to(self.device),
            snapshot,
            self.progress,
        )
        for index, ratios in enumerate(self.transforms.clip_ratios):
            self.clip_ratios[index].update(ratios)
        for step, loss in curve:
            self.record.point("learn", step, loss)

    def served_config(self) -> LowbitConfig:
        """What is served, once it has run: the config with the clip ratios found."""
        return with_ratios(
            self.config, {i: r for i, r in self.clip_ratios.items() if r}
        )

    def check_resources(self, announce: Announce) -> None:
        """Say what the run will take.

        Raises:
            ConfigError: when this machine has not so much memory.
        """
        output = sum(
            map(largest_bytes, written_tensors(self.source, self.config).values())
        )
        estimator = Estimator(self.shape, self.recipe, len(self.windows), output)
        speed = Speed.measure(self.device)
        on_disk = estimator.estimate(speed, on_disk=True)
        if self.scratch.directory is not None:
            announce(on_disk)
            on_disk.check(None)
            return
        in_memory = estimator.estimate(speed, on_disk=False)
        announce(in_memory)
        if self.device == "cpu":
            in_memory.check(on_disk)

    @torch.no_grad()
    def run(self, writer: CheckpointWriter) -> tuple[Losses, Losses]:
        """Write every tensor; losses on calibration and on held-out windows.

        Raises:
            CheckpointError: naming a tensor of the base model that is not finite.
            CalibrationError: naming the layer whose output, or the training whose
                loss, is not finite.
        """
        plain = plain_vocabulary(self.source, self.scratch)
        served = served_vocabulary(
            stacking(writer, self.shape),
            self.source,
            self.config.scheme,
            self.transforms.residual,
            self.scratch,
        )
        x, y = (self._embedded(v) for v in (served, plain))
        layers: list[tuple[QuantizedLayer, Weights]] = []
        for index in range(self.shape.num_layers):
            tensors = self.source.layer(index)
            for name, tensor in tensors.items():
                check_finite(tensor, f"model.layers.{index}.{name}")
            streams = Streams(x, self._served_basis(y))
            y, transforms = self._plain_layer(index, tensors, y)
            layer, folded = self._served_layer(index, tensors, transforms, streams)
            x = self._advance(index, layer, folded, streams)
            if self.recipe.refine.scope == "model":
                layers.append((layer, folded))
            else:
                layer.write(stacking(writer, self.shape), _prefix(index))
        if layers:
            x = self._refine(layers, plain, served, writer)
        self.progress(self.total, self.total, "measuring")
        split = self.recipe.data.samples
        return (
            self._losses(slice(None, split), plain, y, served, x),
            self._losses(slice(split, None), plain, y, served, x),
        )

    def _embedded(self, vocabulary: Vocabulary) -> torch.Tensor:
        """Hidden states of every window before the first layer."""
        parts = (
            vocabulary.look_up(ids).to(self.device)
            for ids in self.windows.split(self.chunk)
        )
        return self.scratch.collect(parts, len(self.windows))

    def _served_basis(self, y: torch.Tensor) -> torch.Tensor:
        """The float stream with the residual rotation."""
        residual = self.transforms.residual
        if residual is None:
            return y
        parts = (residual.right(part) for part in y.split(self.chunk))
        return self.scratch.collect(parts, len(y))

    def _plain_layer(
        self, index: int, tensors: Weights, y: torch.Tensor
    ) -> tuple[torch.Tensor, LayerTransforms]:
        """The float stream after a layer, and the transforms to fold into it."""
        weights = {
            name: self.scratch.keep(t.float().to(self.device))
            for name, t in tensors.items()
        }
        power, plain = InputPower(), self.plain.at(index)
        before = []
        for stage in RESIDUAL_STAGES:
            before.append(y)
            parts = (
                plain.update(stage, weights, part, power.add)
                for part in y.split(self.chunk)
            )
            y = self.scratch.collect(parts, len(y))
        transforms = self.transforms.layer(index)
        if self.recipe.transforms.equalize and not self.recipe.learns:
            out = weights["self_attn.o_proj.weight"]
            transforms = replace(
                transforms,
                value_scale=value_scale(power.sums["o_input"], out, self.shape),
                up_scale=up_scales(power, weights, self.shape),
            )
        if self.alpha is not None:
            transforms = smooth_scales(
                plain,
                weights,
                (before[0], before[1]),
                self.transforms.residual,
                transforms,
                self.alpha,
                self.chunk,
            )
            residual = self.transforms.residual
            transforms = storable(transforms, tensors, self.shape, residual)
        return y, transforms

    def _served_layer(
        self,
        index: int,
        tensors: Weights,
        transforms: LayerTransforms,
        streams: Streams,
    ) -> tuple[QuantizedLayer, Weights]:
        """A layer quantized, and its float32 tensors with the transforms folded in."""
        done = itertools.count(index * self.per_layer)
        on_device = {name: tensor.to(self.device) for name, tensor in tensors.items()}

        def starting(name: str) -> None:
            self.progress(next(done), self.total, name)

        def training(what: str) -> None:
            self.progress(index * self.per_layer, self.total, what)

        residual, ranges = self.transforms.residual, None
        if self.recipe.weights.method == "omniquant":
            ranges, transforms = self.omniquant.run(
                index, on_device, residual, transforms, streams, training
            )
        exact = fold_layer(on_device, self.shape, residual, transforms)
        floats = {
            name: tensor.to(tensors[name].dtype)
            for name, tensor in exact.items()
            if tensor.dim() == 1 or name == f"{ROUTER}.weight"
        }
        folded = {
            name: self.scratch.keep(exact.pop(name).float()) for name in list(exact)
        }
        layer = self.quantizer.run(index, folded, floats, streams, starting, ranges)
        if self.recipe.refine.scope == "layer":
            block = Block(
                self.models.at(index),
                folded,
                streams,
                self.recipe.data.samples,
                self.chunk,
            )
            layer = refine_layer(
                _module(index),
                block,
                LearnedLayer(layer, folded),
                self.recipe,
                self.record,
                training,
            )
        return layer, folded

    def _advance(
        self, index: int, layer: QuantizedLayer, folded: Weights, streams: Streams
    ) -> torch.Tensor:
        """The quantized stream after a layer, whose errors are recorded.

        Raises:
            CalibrationError: naming the layer when it is not finite.
        """
        few = Streams(streams.served[: self.chunk], streams.plain[: self.chunk])
        models = self.models.at(index)
        for name, errors in layer_errors(models, layer, folded, few).items():
            self.record.layer(_prefix(index) + name, **errors)
        x = models.advance(layer, streams.served, self.chunk)
        if not bool(torch.isfinite(x).all()):
            raise CalibrationError(
                f"{_module(index)}: its quantized output holds an Inf or NaN"
            )
        return x

    def _refine(
        self,
        layers: list[tuple[QuantizedLayer, Weights]],
        plain: Vocabulary,
        served: Vocabulary,
        writer: CheckpointWriter,
    ) -> torch.Tensor:
        """Train the whole model and write it; the quantized stream at its end."""
        started = self.shape.num_layers * self.per_layer

        def training(step: int, loss: float) -> None:
            self.progress(started + step, self.total, f"refining, loss {loss:.4g}")

        plain_weights = [
            {n: t.float().to(self.device) for n, t in self.source.layer(i).items()}
            for i in range(self.shape.num_layers)
        ]
        model = RefinedModel(
            (self.models.served, self.plain),
            (served.to(self.device), plain.to(self.device)),
            plain_weights,
            [LearnedLayer(layer, folded) for layer, folded in layers],
        )
        windows = self.training.to(self.device)
        refined = refine_model(model, windows, self.recipe, self.record, training)
        x = self._embedded(served)
        y = self._served_basis(plain.look_up(self.windows[: self.chunk]))
        y = y.to(self.device)
        for index, (layer, (_, folded)) in enumerate(zip(refined, layers, strict=True)):
            layer.write(stacking(writer, self.shape), _prefix(index))
            x = self._advance(index, layer, folded, Streams(x, y))
            y = through(self.models.plain.at(index), folded, y)
        return x

    def _losses(
        self,
        windows: slice,
        plain: Vocabulary,
        y: torch.Tensor,
        served: Vocabulary,
        x: torch.Tensor,
    ) -> Losses:
        ids = self.windows[windows].to(self.device)
        return Losses(
            plain=self._loss(y[windows], plain, ids),
            quantized=self._loss(x[windows], served, ids),
        )

    def _loss(self, x: torch.Tensor, end: Vocabulary, ids: torch.Tensor) -> float:
        end, total = end.to(self.device), 0.0
        for states, targets in zip(x, ids, strict=True):
            logits = end.logits(self.plain.norm(states[:-1], *end.final_norm))
            total += float(
                functional.cross_entropy(logits.double(), targets[1:], reduction="sum")
            )
        return total / ids[:, 1:].numel()
