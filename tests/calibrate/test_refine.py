# SPDX-License-Identifier: Apache-2.0
"""Matrices, layers and models that are trained on the serving grid."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from vllm_lowbit.calibrate.block import Block, through
from vllm_lowbit.calibrate.layer import QuantizedLayer, Streams
from vllm_lowbit.calibrate.quantize import QuantizedMatrix, round_to_nearest
from vllm_lowbit.calibrate.recipe import Recipe
from vllm_lowbit.calibrate.record import CalibrationRecord
from vllm_lowbit.calibrate.refine import (
    LearnedLayer,
    LearnedMatrix,
    RefinedModel,
    refine_layer,
    refine_model,
)
from vllm_lowbit.calibrate.vocabulary import Vocabulary
from vllm_lowbit.errors import CalibrationError
from vllm_lowbit.kernels.grid import IntGrid
from vllm_lowbit.schema import Weights

W3 = Weights(bits=3, symmetric=False, group_size=32)
Make = Callable[..., Any]


def _matrix(weights: Weights) -> tuple[torch.Tensor, QuantizedMatrix]:
    weight = torch.randn(24, 64, generator=torch.Generator().manual_seed(1))
    return weight, round_to_nearest(weight, weights)


GRIDS = [
    Weights(bits=4),
    Weights(bits=2, symmetric=False, group_size=32),
    Weights(bits=3, symmetric=False),
    Weights(bits=8, group_size=32),
]


@pytest.mark.parametrize("weights", GRIDS)
def test_a_matrix_starts_where_it_was(weights: Weights) -> None:
    weight, matrix = _matrix(weights)
    # GPTQ may have chosen any code, however far from the weight.
    moved = torch.randint(-2, 3, matrix.codes.shape).to(torch.int8)
    codes = (matrix.codes + moved).clamp(matrix.grid.code_min, matrix.grid.code_max)
    start = QuantizedMatrix(matrix.grid, codes, matrix.scale, matrix.zero_point)
    learned = LearnedMatrix(start, weight)
    assert torch.equal(learned.quantized().codes, codes)
    assert torch.equal(learned.quantized().zero_point, matrix.zero_point)
    assert torch.allclose(learned.quantized().scale, matrix.scale, rtol=1e-5)


@pytest.mark.parametrize("weights", GRIDS)
def test_what_is_stored_is_what_was_trained(weights: Weights) -> None:
    learned = LearnedMatrix(_matrix(weights)[1], _matrix(weights)[0])
    learned.steps += torch.randn(learned.steps.shape) * 3
    learned.log_scale += torch.randn(learned.log_scale.shape)
    stored = learned.quantized()
    assert torch.equal(stored.decoded(), learned.decoded())
    assert stored.scale.dtype == torch.float32
    assert stored.codes.min() >= stored.grid.code_min
    assert stored.codes.max() <= stored.grid.code_max


def test_gradients_reach_codes_scales_and_norms(
    models: Make, layer_tensors: Make, rounded_layer: Make
) -> None:
    tensors = layer_tensors()
    learned = LearnedLayer(rounded_layer(tensors, W3), tensors)
    trained = [t for m in learned.matrices.values() for t in (m.steps, m.log_scale)]
    trained += learned.norms.values()
    for tensor in trained:
        tensor.requires_grad_()
    x = torch.randn(2, 8, 64, generator=torch.Generator().manual_seed(2))
    served = models(IntGrid(4, symmetric=False), kv4=True).served
    through(served, learned.weights(), x).square().mean().backward()
    for tensor in trained:
        assert tensor.grad is not None
        assert bool(tensor.grad.isfinite().all()) and bool(tensor.grad.any())


def _recipe(**refine: Any) -> Recipe:
    return Recipe.model_validate({"refine": {"scope": "model", "batch": 4, **refine}})


@pytest.fixture
def model(models: Make, layer_tensors: Make, rounded_layer: Make) -> Make:
    return lambda: _model(models, layer_tensors, rounded_layer)


def _model(models: Make, layer_tensors: Make, rounded_layer: Make) -> RefinedModel:
    both = models(IntGrid(4, symmetric=False), kv4=True)
    generator = torch.Generator().manual_seed(7)
    vocabulary = Vocabulary(
        embedding=torch.randn(50, 64, generator=generator),
        norm=torch.ones(64),
        head=torch.randn(50, 64, generator=generator) * 0.3,
    )
    tensors = [layer_tensors(seed) for seed in (0, 1)]
    learned = [LearnedLayer(rounded_layer(t, W3), t) for t in tensors]
    return RefinedModel(
        (both.served, both.plain), (vocabulary, vocabulary), tensors, learned
    )


def _windows(count: int = 40) -> torch.Tensor:
    return torch.randint(50, (count, 24), generator=torch.Generator().manual_seed(9))


def _stored(layers: list[QuantizedLayer]) -> list[torch.Tensor]:
    tensors: list[torch.Tensor] = []
    for layer in layers:
        layer.write(lambda name, tensor: tensors.append(tensor), "")
    return tensors


def test_the_whole_model_comes_closer_on_windows_it_was_not_trained_on(
    model: Make,
) -> None:
    rates = {"code_rate": 2e-2, "scale_rate": 4e-3, "norm_rate": 4e-3}
    recipe, other = _recipe(steps=60, **rates), _windows(200)[150:]
    trained = model()
    before = float(trained.loss(other, 1000))
    record = CalibrationRecord()
    layers = refine_model(trained, _windows(), recipe, record, lambda step, loss: None)
    # What is stored, not what was trained, is measured.
    weights = [layer.weights() for layer in layers]
    for learned, stored in zip(trained.layers, weights, strict=True):
        values = learned.weights()
        assert values.keys() == stored.keys()
        assert all(torch.equal(values[name], stored[name]) for name in stored)
    assert float(trained.loss(other, 1000)) < 0.9 * before
    assert '"refine.validation"' in record.text()


def test_same_seed_same_bytes(model: Make) -> None:
    runs = []
    for seed in (0, 0, 1):
        recipe, record = _recipe(steps=5).override(seed=seed), CalibrationRecord()
        layers = refine_model(model(), _windows(), recipe, record, lambda s, x: None)
        runs.append((_stored(layers), record.text()))
    assert all(map(torch.equal, runs[0][0], runs[1][0]))
    assert runs[0][1] == runs[1][1] != runs[2][1]


def test_training_that_diverges_keeps_the_start(model: Make) -> None:
    trained = model()
    start = _stored([layer.quantized() for layer in trained.layers])
    recipe = _recipe(steps=4, code_rate=1.0, scale_rate=1.0)
    layers = refine_model(
        trained, _windows(), recipe, CalibrationRecord(), lambda s, x: None
    )
    assert all(map(torch.equal, start, _stored(layers)))


def test_a_loss_that_is_not_finite_names_the_step(model: Make) -> None:
    spoiled = model()
    spoiled.plain_weights[1]["mlp.down_proj.weight"][:] = torch.nan
    with pytest.raises(CalibrationError, match=r"refine.*: the loss at step 0 is nan"):
        refine_model(
            spoiled, _windows(), _recipe(), CalibrationRecord(), lambda s, x: None
        )


def test_one_layer_comes_closer_to_the_float_one(
    models: Make, layer_tensors: Make, rounded_layer: Make
) -> None:
    tensors, both = layer_tensors(), models(IntGrid(4, symmetric=False), kv4=True)
    generator = torch.Generator().manual_seed(3)
    mix = torch.randn(64, 64, generator=generator).tril(8) / 4
    x = torch.randn(144, 16, 64, generator=generator) @ mix
    streams = Streams(x + 0.02 * torch.randn(x.shape, generator=generator), x)
    start = rounded_layer(tensors, W3)
    recipe = Recipe.model_validate({"refine": {"scope": "layer", "steps": 120}})
    said: list[str] = []
    layer = refine_layer(
        "model.layers.0",
        Block(both, tensors, streams, 128, 8),
        LearnedLayer(start, tensors),
        recipe,
        CalibrationRecord(),
        said.append,
    )
    wanted = through(both.plain, tensors, x[128:])

    def error(candidate: QuantizedLayer) -> float:
        out = through(both.served, candidate.weights(), streams.served[128:])
        return float((out - wanted).square().mean())

    assert error(layer) < 0.9 * error(start)
    assert len(said) == 120 and said[0].startswith("model.layers.0, step 1/120, ")


def test_samples_of_the_recipe() -> None:
    data = {"data": {"samples": 8}}
    for refine, expected in (
        ({}, 8),
        ({"scope": "layer"}, 8),
        ({"scope": "model"}, 8),
        ({"scope": "model", "samples": 30}, 30),
        ({"scope": "model", "samples": 4}, 8),
    ):
        recipe = Recipe.model_validate(data | {"refine": refine})
        assert recipe.training_samples() == expected
