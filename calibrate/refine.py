# SPDX-License-Identifier: Apache-2.0
"""Distilling the float model into what a checkpoint stores: codes, scales and norms.

After transforms and rounding, the whole quantized model is trained to follow the float
one. Each weight is ``scale * (round(u) - zero_point)`` with a float u of its own that
starts at its code: gradients pass straight through the rounding, and the activations
and the cache are quantized as the server does. What is learned is stored exactly.
"""

from collections.abc import Callable, Sequence

import torch

from .block import Block, through
from .layer import QuantizedLayer, Tensors
from .learn.loss import kl_top
from .quantize import QuantizedMatrix
from .recipe import Recipe
from .recipe_sections import Refine
from .record import CalibrationRecord
from .stages import DecoderStages
from .straight_through import on_grid, stored_as
from .training import Group, Training, minimise
from .vocabulary import Vocabulary

# Of a step to the next code: how far from its code a weight may start.
_MARGIN = 0.3


class LearnedMatrix:
    """A matrix whose codes and scales are trained.

    Args:
        matrix: where it starts.
        weight: ``[n, k]``, what was rounded; says which way each code may turn.

    Attributes:
        steps: float32 ``[n, groups, k / groups]``, rounded to a code less the zero
            point.
        log_scale: of the scales, ``[n, groups, 1]``.
    """

    def __init__(self, matrix: QuantizedMatrix, weight: torch.Tensor) -> None:
        self.grid = matrix.grid
        groups = matrix.scale.shape[1]
        scale = matrix.scale.unsqueeze(-1)
        self.zero_point = matrix.zero_point.unsqueeze(-1)
        start = matrix.codes.unflatten(-1, (groups, -1)) - self.zero_point
        wanted = weight.float().unflatten(-1, (groups, -1)) / scale
        self.steps = start + (wanted - start).clamp(-_MARGIN, _MARGIN)
        self.log_scale = scale.log()

    def decoded(self) -> torch.Tensor:
        """The matrix as it would be served now, ``[n, k]``; carries gradients."""
        scale = self.log_scale.exp()
        return on_grid(self.steps, self.grid, scale, self.zero_point).flatten(-2)

    def quantized(self) -> QuantizedMatrix:
        """It on its grid."""
        codes = torch.round(self.steps) + self.zero_point
        codes = codes.clamp(self.grid.code_min, self.grid.code_max)
        return QuantizedMatrix(
            grid=self.grid,
            codes=codes.to(torch.int8).flatten(-2),
            scale=self.log_scale.exp().squeeze(-1),
            zero_point=self.zero_point.squeeze(-1),
        )


class LearnedLayer:
    """A decoder layer whose matrices and norm weights are trained.

    Args:
        layer: where it starts.
        folded: its tensors before rounding.
    """

    def __init__(self, layer: QuantizedLayer, folded: Tensors) -> None:
        self.floats = layer.floats
        self.matrices = {
            name: LearnedMatrix(matrix, folded[f"{name}.weight"])
            for name, matrix in layer.linears.items()
        }
        self.norms = {
            name: folded[name].float().clone()
            for name in layer.floats
            if name.endswith("norm.weight")
        }

    def weights(self) -> Tensors:
        """What the server would compute with now; carries gradients."""
        weights = {name: tensor.float() for name, tensor in self.floats.items()}
        for name, norm in self.norms.items():
            weights[name] = stored_as(norm, self.floats[name].dtype)
        for name, matrix in self.matrices.items():
            weights[f"{name}.weight"] = matrix.decoded()
        return weights

    def quantized(self) -> QuantizedLayer:
        """It as it would be stored now."""
        floats = dict(self.floats)
        for name, norm in self.norms.items():
            floats[name] = norm.to(floats[name].dtype)
        linears = {name: m.quantized() for name, m in self.matrices.items()}
        return QuantizedLayer(linears, floats)


class RefinedModel:
    """The float model and the quantized one that is trained to follow it.

    Args:
        models: stages of the served model, and of the float one without transforms.
        vocabularies: theirs, in the same order.
        plain_weights: of the float model's layers, float32.
        layers: the quantized layers.
    """

    def __init__(
        self,
        models: tuple[DecoderStages, DecoderStages],
        vocabularies: tuple[Vocabulary, Vocabulary],
        plain_weights: Sequence[Tensors],
        layers: Sequence[LearnedLayer],
    ) -> None:
        self.served, self.plain = models
        self.served_vocabulary, self.plain_vocabulary = vocabularies
        self.plain_weights, self.layers = plain_weights, layers

    def loss(self, ids: torch.Tensor, top_k: int) -> torch.Tensor:
        """KL-Top on windows ``[windows, tokens]``; carries gradients."""
        with torch.no_grad():
            vocabulary = self.plain_vocabulary
            teacher = _logits(self.plain, vocabulary, self.plain_weights, ids)
        weights = [layer.weights() for layer in self.layers]
        student = _logits(self.served, self.served_vocabulary, weights, ids)
        return kl_top(student, teacher, top_k)


def _logits(
    model: DecoderStages,
    vocabulary: Vocabulary,
    layers: Sequence[Tensors],
    ids: torch.Tensor,
) -> torch.Tensor:
    x = vocabulary.look_up(ids)
    for index, weights in enumerate(layers):
        x = through(model.at(index), weights, x)
    return vocabulary.logits(model.norm(x, *vocabulary.final_norm))


def groups_of(layers: Sequence[LearnedLayer], options: Refine) -> list[Group]:
    """What is trained, with its learning rates."""
    matrices = [matrix for layer in layers for matrix in layer.matrices.values()]
    return [
        Group([matrix.steps for matrix in matrices], options.code_rate),
        Group([matrix.log_scale for matrix in matrices], options.scale_rate),
        Group([n for layer in layers for n in layer.norms.values()], options.norm_rate),
    ]


def refine_model(
    model: RefinedModel,
    windows: torch.Tensor,
    recipe: Recipe,
    record: CalibrationRecord,
    progress: Callable[[int, float], None],
) -> list[QuantizedLayer]:
    """Train all layers together.

    Args:
        model: where it starts.
        windows: token ids ``[windows, tokens]``. The last eighth, 16 at most, is
            not trained on: its loss decides which state is kept.
        recipe: settings, and the seed of the order of windows.
        record: takes the curves ``refine`` and ``refine.validation``.
        progress: called with the steps done and the loss.

    Raises:
        CalibrationError: naming the step whose loss is not finite.
    """
    options = recipe.refine
    kept = min(16, max(1, len(windows) // 8))
    train, validation = windows[:-kept], windows[-kept:]
    batch = min(options.batch, len(train))

    def loss_of(chosen: torch.Tensor) -> torch.Tensor:
        return model.loss(train[chosen], options.top_k)

    def validate() -> float:
        parts = validation.split(batch)
        losses = [float(model.loss(p, options.top_k)) * len(p) for p in parts]
        return sum(losses) / kept

    training = Training(
        name="refine",
        windows=len(train),
        batch=batch,
        steps=options.steps,
        seed=recipe.seed,
        cosine=True,
    )
    groups = groups_of(model.layers, options)
    minimise(loss_of, groups, training, record, progress, validate)
    return [layer.quantized() for layer in model.layers]


def refine_layer(
    name: str,
    block: Block,
    layer: LearnedLayer,
    recipe: Recipe,
    record: CalibrationRecord,
    progress: Callable[[str], None],
) -> QuantizedLayer:
    """Train one layer on its output, where the whole model is too large.

    Args:
        name: of the layer, such as ``model.layers.0``.
        block: its inputs and outputs.
        layer: where it starts.
        recipe: settings, and the seed of the order of windows.
        record: takes the curve ``refine.NAME``.
        progress: called with what is being done.

    Raises:
        CalibrationError: naming layer and step when a loss is not finite.
    """
    options, windows = recipe.refine, len(block.inputs)
    training = Training(
        name=f"refine.{name}",
        windows=windows,
        batch=min(options.batch, windows),
        steps=options.steps,
        seed=recipe.seed,
        cosine=True,
    )

    def shown(step: int, loss: float) -> None:
        progress(f"{name}, step {step}/{options.steps}, loss {loss:.3g}")

    groups = groups_of([layer], options)
    block.train(layer.weights, groups, training, record, shown)
    return layer.quantized()
