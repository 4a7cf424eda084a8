# SPDX-License-Identifier: Apache-2.0
"""Where rotations start."""

from collections.abc import Iterable, Sequence

import torch

from ...architecture import ModelShape
from ...kernels.hadamard.matrices import largest_order
from ...kernels.hadamard.signs import random_signs
from ..equalize import up_scale, value_scale
from ..plan import Transforms
from ..recipe import Recipe
from ..rotations import SignedHadamard
from ..stages import stages_of
from ..transforms import gain, norm_readers, scale_shapes
from .parameters import CLIP, Parameters, Tensors
from .teacher import Teacher

OUT, DOWN = "self_attn.o_proj.weight", "mlp.down_proj.weight"


def start(
    shape: ModelShape,
    recipe: Recipe,
    fixed: Transforms,
    layers: Sequence[Tensors],
    teacher: Teacher,
) -> Parameters:
    """What is learned as it is before the first step, gradients on.

    Args:
        shape: sizes of the model.
        recipe: what is learned, and from where.
        fixed: the transforms that are not.
        layers: float32 tensors of each layer.
        teacher: what the float model's activations are.
    """
    log_scales = _log_scales(shape, recipe, layers, teacher)
    rotations: Tensors = {}
    if recipe.transforms.residual == "learned":
        rotations["residual"] = _residual(shape, recipe, layers).unsqueeze(0)
    if recipe.transforms.value == "learned":
        scales = log_scales.get("value_scale")
        rotations["value"] = _values(shape, recipe, layers, scales)
    device = teacher.states.device
    rotations = {name: t.to(device) for name, t in rotations.items()}
    log_scales = {name: t.to(device) for name, t in log_scales.items()}
    clips: Tensors = {}
    if recipe.learns_clips:
        ratio = recipe.activations.clip_ratio
        for stage in stages_of(shape):
            raw = torch.full((shape.num_layers,), ratio, dtype=torch.float64)
            clips[CLIP + stage] = raw.to(device)
    learned = {
        *rotations,
        *(log_scales if recipe.transforms.scales_are_learned else ()),
        *clips,
    }
    parameters = Parameters(
        shape, fixed, rotations, log_scales, frozenset(learned), clips
    )
    for leaf in parameters.leaves().values():
        leaf.requires_grad_()
    return parameters


def _log_scales(
    shape: ModelShape, recipe: Recipe, layers: Sequence[Tensors], teacher: Teacher
) -> Tensors:
    chosen = recipe.transforms
    logs = {
        name: torch.zeros(shape.num_layers, *size, dtype=torch.float64)
        for name, size in scale_shapes(shape).items()
        if chosen.scales_are_learned
        or (chosen.equalize and name in ("value_scale", "up_scale"))
    }
    if chosen.equalize:
        for index, (weights, power) in enumerate(
            zip(layers, teacher.powers, strict=True)
        ):
            values = value_scale(power.sums["o_input"], weights[OUT], shape)
            logs["value_scale"][index] = values.log()
            if "up_scale" in logs:
                ups = up_scale(power.sums["down_input"], weights[DOWN])
                logs["up_scale"][index] = ups.log()
    return logs


def _residual(
    shape: ModelShape, recipe: Recipe, layers: Sequence[Tensors]
) -> torch.Tensor:
    readers = (
        weights[f"{name}.weight"] * gain(weights[f"{norm}.weight"], shape)
        for weights in layers
        for norm, names in norm_readers(shape).items()
        for name in names
    )
    return _rotation(recipe, shape.hidden_size, recipe.seed, readers)


def _values(
    shape: ModelShape,
    recipe: Recipe,
    layers: Sequence[Tensors],
    log_scales: torch.Tensor | None,
) -> torch.Tensor:
    heads, size = shape.num_kv_heads, shape.head_dim
    rotations = torch.empty(shape.num_layers, heads, size, size, dtype=torch.float64)
    for index, weights in enumerate(layers):
        columns = weights[OUT].double().cpu().unflatten(-1, (heads, -1, size))
        if log_scales is not None:
            columns = columns * log_scales[index].exp().view(heads, 1, size)
        for head in range(heads):
            seed = recipe.seed + 1 + index * heads + head
            rows = columns[:, head].flatten(0, 1)
            rotations[index, head] = _rotation(recipe, size, seed, [rows])
    return rotations


def _rotation(
    recipe: Recipe, size: int, seed: int, readers: Iterable[torch.Tensor]
) -> torch.Tensor:
    seed %= 1 << 63
    match recipe.learn.start:
        case "identity":
            return torch.eye(size, dtype=torch.float64)
        case "hadamard":
            return random_hadamard(size, seed)
    covariance = Covariance(size)
    covariance.add(readers)
    return womi(covariance.matrix(), seed)


def random_hadamard(size: int, seed: int) -> torch.Tensor:
    """Random-sign Hadamard, float64 ``[size, size]``; in blocks where it has to be."""
    rotation = SignedHadamard(largest_order(size), random_signs(seed, size))
    return rotation.right(torch.eye(size, dtype=torch.float64))


class Covariance:
    """Of the rows of weights, around their mean row."""

    def __init__(self, size: int) -> None:
        self.rows = 0
        self.sum = torch.zeros(size, dtype=torch.float64)
        self.squares = torch.zeros(size, size, dtype=torch.float64)

    def add(self, weights: Iterable[torch.Tensor]) -> None:
        """Add the rows of matrices ``[n, size]``."""
        for weight in weights:
            rows = weight.double().cpu()
            self.rows += len(rows)
            self.sum += rows.sum(dim=0)
            self.squares += rows.t() @ rows

    def matrix(self) -> torch.Tensor:
        """float64 ``[size, size]``."""
        mean = self.sum / self.rows
        return self.squares / self.rows - torch.outer(mean, mean)


def womi(covariance: torch.Tensor, seed: int) -> torch.Tensor:
    """Weight outlier minimisation, OSTQuant (Hu et al., 2025, section 3.3).

    Eigenvectors of the weights' covariance, then a random-sign Hadamard: every column
    of the weights gets the same share of each eigenvalue.

    Args:
        covariance: float64 ``[size, size]``, of the weights that read the input.
        seed: of the signs.
    """
    size = len(covariance)
    _, vectors = torch.linalg.eigh(covariance)
    # Of each block of the Hadamard, large and small eigenvalues alike.
    order = torch.arange(size).view(largest_order(size), -1).t().flatten()
    rotation = SignedHadamard(largest_order(size), random_signs(seed, size))
    return rotation.right(vectors[:, order])
