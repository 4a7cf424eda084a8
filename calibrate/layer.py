# SPDX-License-Identifier: Apache-2.0
"""One decoder layer: quantizing it stage by stage, and what is stored of it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import torch

from ..kernels.grid import IntGrid
from ..schema import Scheme
from .clips import SEARCH_TOKENS, search_ratio
from .gptq import Compensation, GPTQOptions, Hessian, gptq
from .quantize import Add, QuantizedMatrix, Ranges, round_to_nearest
from .recipe_sections import WeightMethod
from .scratch import Scratch
from .stages import RESIDUAL_STAGES, DecoderStages

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class QuantizedLayer:
    """A decoder layer as a checkpoint stores it, by name after ``model.layers.N.``.

    Attributes:
        linears: by the name of the module.
        floats: norm weights and biases, in the dtype they are stored in.
    """

    linears: Mapping[str, QuantizedMatrix]
    floats: Mapping[str, torch.Tensor]

    def weights(self) -> Tensors:
        """What the server computes with, float32, by the name of the tensor."""
        weights = {name: tensor.float() for name, tensor in self.floats.items()}
        for name, matrix in self.linears.items():
            weights[f"{name}.weight"] = matrix.decoded()
        return weights

    def write(self, add: Add, prefix: str) -> None:
        """Hand over every tensor, its name after a prefix."""
        for name, tensor in self.floats.items():
            add(prefix + name, tensor)
        for name, matrix in self.linears.items():
            matrix.write(add, prefix + name)


@dataclass(frozen=True)
class Streams:
    """Hidden states before a layer, ``[windows, tokens, hidden]`` in the served basis.

    Attributes:
        served: of the model quantized so far.
        plain: of the float model, its transforms applied.
    """

    served: torch.Tensor
    plain: torch.Tensor


@dataclass(frozen=True)
class LayerModels:
    """The two models that go through a layer.

    Attributes:
        served: with the server's quantizers and online rotations.
        plain: with the rotations alone.
        scratch: where hidden states and weights are kept.
    """

    served: DecoderStages
    plain: DecoderStages
    scratch: Scratch = field(default_factory=Scratch)

    def at(self, layer: int) -> "LayerModels":
        """The same of another layer, by its index."""
        return replace(self, served=self.served.at(layer), plain=self.plain.at(layer))

    def advance(
        self, layer: QuantizedLayer, x: torch.Tensor, chunk: int
    ) -> torch.Tensor:
        """The served stream after a layer, ``chunk`` windows at a time."""
        weights = layer.weights()
        for stage in RESIDUAL_STAGES:
            parts = (self.served.update(stage, weights, p) for p in x.split(chunk))
            x = self.scratch.collect(parts, len(x))
        return x


def layer_errors(
    models: LayerModels, layer: QuantizedLayer, folded: Tensors, streams: Streams
) -> dict[str, dict[str, float]]:
    """How far each linear is from the float model's.

    Args:
        models: the served and the float model.
        layer: what is stored.
        folded: its tensors before rounding, float32.
        streams: hidden states to measure on.

    Returns:
        by linear ``weight_error`` and ``output_error``: norms of the differences over
        those of the float weight and output. The output's is with the inputs that
        either model sees.
    """
    weights, errors = layer.weights(), {}
    x, y = streams.served, streams.plain
    for stage, names in models.plain.stages.items():
        # An expert's error is on the tokens the float model sends it.
        sent = _sent(models.plain, stage, folded, y)
        h = models.served.input_of(stage, weights, x, sent)
        g = models.plain.input_of(stage, folded, y, sent)
        served = models.served.linears(stage, weights, h)
        plain = models.plain.linears(stage, folded, g)
        for name, out, wanted in zip(names, served, plain, strict=True):
            weight = f"{name}.weight"
            errors[name] = {
                "weight_error": _relative(weights[weight], folded[weight]),
                "output_error": _relative(out, wanted),
            }
        if stage == "o_input":
            x = models.served.added(stage, weights, x, served[0])
            y = models.plain.added(stage, folded, y, plain[0])
    return errors


def _sent(
    model: DecoderStages, stage: str, weights: Tensors, x: torch.Tensor
) -> torch.Tensor | None:
    """Tokens of an expert's stage, None for any other stage."""
    expert = stage.rpartition(".")[0]
    return model.sent(expert, weights, x) if expert else None


def _relative(x: torch.Tensor, wanted: torch.Tensor) -> float:
    norm = float(wanted.norm())
    return float((x - wanted).norm()) / norm if norm else 0.0


class StageQuantizer:
    """``rtn``, ``gptq`` and ``gptaq``: linears in the order they run.

    Args:
        models: the served and the float model, of any layer.
        scheme: grids.
        recipe: method and settings.
        samples: windows to fit to, the first ones.
        chunk: windows at a time.
        searches_clips: whether each stage's clip ratio is searched for before its
            linears are quantized; it is put among those of the served model.
    """

    def __init__(
        self,
        models: LayerModels,
        scheme: Scheme,
        recipe: WeightMethod,
        samples: int,
        chunk: int,
        searches_clips: bool = False,
    ) -> None:
        # Of the layer at hand, once one is.
        self.models, self.scheme, self.recipe = models, scheme, recipe
        self.samples, self.chunk = samples, chunk
        self.searches_clips = searches_clips
        # Of every expert, by its name in the model.
        self.tokens: dict[str, int] = {}
        self.options = GPTQOptions(
            recipe.damping, recipe.block_size, recipe.act_order, recipe.correction
        )

    def run(
        self,
        layer: int,
        folded: Tensors,
        floats: Tensors,
        streams: Streams,
        starting: Callable[[str], None],
        ranges: Mapping[str, Ranges] | None = None,
    ) -> QuantizedLayer:
        """Quantize a layer.

        Args:
            layer: its index.
            folded: its tensors with the transforms folded in.
            floats: norm weights and biases as they will be stored.
            streams: before the layer.
            starting: called with the name of each linear.
            ranges: by linear; None where their method finds its own.
        """
        prefix = f"model.layers.{layer}."
        self.models = self.models.at(layer)
        plain_weights = {name: tensor.float() for name, tensor in folded.items()}
        weights = {name: tensor.float() for name, tensor in floats.items()}
        x, y = (s[: self.samples] for s in (streams.served, streams.plain))
        linears: dict[str, QuantizedMatrix] = {}
        chosen: torch.Tensor | None = None
        for stage, names in self.models.served.stages.items():
            compensation = None
            if self.searches_clips:
                self._search_clip(layer, stage, weights, plain_weights, x)
            if self.recipe.method != "rtn":
                expert = stage.rpartition(".")[0]
                if expert and chosen is None:
                    chosen = self._chosen(weights, x)
                hessian = self._hessian(stage, weights, plain_weights, x, y, chosen)
                if expert:
                    self.tokens[prefix + expert] = hessian.rows
                compensation = Compensation.of(hessian, self.options, prefix + names[0])
            for name in names:
                starting(prefix + name)
                weight = plain_weights[f"{name}.weight"]
                fixed = None if ranges is None else ranges[name]
                linears[name] = self._quantize(weight, compensation, fixed)
                decoded = linears[name].decoded()
                weights[f"{name}.weight"] = self.models.scratch.keep(decoded)
            needed = compensation is not None or self.searches_clips
            if stage == "o_input" and needed:
                x = self._updated(self.models.served, weights, x)
                y = self._updated(self.models.plain, plain_weights, y)
        return QuantizedLayer(linears, floats)

    def _search_clip(
        self,
        layer: int,
        stage: str,
        weights: Tensors,
        plain_weights: Tensors,
        x: torch.Tensor,
    ) -> None:
        """Find what is kept of the range of a stage's input."""
        served = self.models.served
        grid = served.online.activations
        assert grid is not None
        few = x.split(self.chunk)[: -(-SEARCH_TOKENS // (self.chunk * x.shape[1]))]
        inputs = [served.input_of(stage, weights, part) for part in few]
        readers = [plain_weights[f"{name}.weight"] for name in served.stages[stage]]
        ratio = search_ratio(inputs, readers, grid)
        served.online.clip_ratios[layer][stage] = ratio

    def _updated(
        self, model: DecoderStages, weights: Tensors, x: torch.Tensor
    ) -> torch.Tensor:
        """The stream between attention and MLP."""
        parts = (model.update("o_input", weights, p) for p in x.split(self.chunk))
        return self.models.scratch.collect(parts, len(x))

    def _chosen(self, weights: Tensors, x: torch.Tensor) -> torch.Tensor:
        """Experts of every token, once for all stages."""
        served = self.models.served
        return torch.cat([served.chosen(weights, p) for p in x.split(self.chunk)])

    def _quantize(
        self,
        weight: torch.Tensor,
        compensation: Compensation | None,
        ranges: Ranges | None,
    ) -> QuantizedMatrix:
        weights = self.scheme.weights
        if compensation is None:
            return round_to_nearest(weight, weights, ranges)
        grid = IntGrid(weights.bits, weights.symmetric)
        size, block = weights.group_size, self.options.block_size
        done = gptq(weight, compensation, grid, size, block, ranges)
        return QuantizedMatrix(grid, *done)

    def _hessian(
        self,
        stage: str,
        weights: Tensors,
        plain_weights: Tensors,
        x: torch.Tensor,
        y: torch.Tensor,
        chosen: torch.Tensor | None,
    ) -> Hessian:
        served, plain = self.models.served, self.models.plain
        hessian: Hessian | None = None
        expert = stage.rpartition(".")[0]
        every = None if chosen is None else served.goes_to(expert, chosen)
        for start in range(0, len(x), self.chunk):
            few = slice(start, start + self.chunk)
            part, plain_part = x[few], y[few]
            sent = None if every is None else every[few]
            h = served.quantized(stage, served.input_of(stage, weights, part, sent))
            hessian = hessian or Hessian(h.shape[-1], h.device)
            if self.recipe.method == "gptaq":
                hessian.add(h, plain.input_of(stage, plain_weights, plain_part, sent))
            else:
                hessian.add(h)
        assert hessian is not None
        return hessian
