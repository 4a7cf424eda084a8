# SPDX-License-Identifier: Apache-2.0
"""SmoothQuant's scales: their formula, what they even out, and that nothing changes."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from vllm_lowbit.calibrate.block import through
from vllm_lowbit.calibrate.rotations import Dense, Orthogonal
from vllm_lowbit.calibrate.smooth import smooth_scales
from vllm_lowbit.calibrate.transforms import LayerTransforms, fold_layer

Make = Callable[..., Any]


def _stream() -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    size = torch.rand(64, generator=generator).mul(4).exp()
    return torch.randn(6, 16, 64, generator=generator) * size


def _scaled(
    models: Make,
    tensors: dict[str, torch.Tensor],
    alpha: float,
    residual: Orthogonal | None = None,
) -> LayerTransforms:
    plain = models().plain
    x = _stream()
    middle = plain.update("o_input", tensors, x)
    return smooth_scales(
        plain, tensors, (x, middle), residual, LayerTransforms(), alpha, chunk=4
    )


@pytest.mark.parametrize("alpha", [0.0, 0.5, 0.85, 1.0])
def test_formula(alpha: float, models: Make, layer_tensors: Make) -> None:
    tensors, plain = layer_tensors(), models().plain
    found = _scaled(models, tensors, alpha)
    x = _stream()
    inputs = plain.input_of("attn_input", tensors, x).flatten(0, 1).abs().amax(0)
    names = [f"self_attn.{name}_proj.weight" for name in "qkv"]
    columns = torch.cat([tensors[name] for name in names]).abs().amax(0)
    expected = inputs.double() ** alpha / columns.double() ** (1 - alpha)
    assert torch.allclose(found.attn_scale, expected)
    # Two query heads read each value head.
    inputs = plain.input_of("o_input", tensors, x).flatten(0, 1).abs().amax(0)
    columns = tensors["self_attn.o_proj.weight"].abs().amax(0)
    inputs, columns = (t.view(2, 2, 16).amax(1).flatten() for t in (inputs, columns))
    expected = inputs.double() ** alpha / columns.double() ** (1 - alpha)
    assert torch.allclose(found.value_scale, expected)


@pytest.mark.parametrize("rotated", [False, True])
def test_all_of_alpha_makes_inputs_even_and_the_function_stays(
    rotated: bool, models: Make, layer_tensors: Make
) -> None:
    tensors, both, residual = layer_tensors(), models(), None
    if rotated:
        generator = torch.Generator().manual_seed(1)
        random = torch.randn(1, 64, 64, generator=generator, dtype=torch.float64)
        residual = Dense(torch.linalg.qr(random).Q)
    scaled = _scaled(models, tensors, 1.0, residual)
    folded = fold_layer(tensors, both.plain.shape, residual, scaled)
    weights = {name: tensor.float() for name, tensor in folded.items()}
    x = _stream()
    wanted = through(both.plain, tensors, x)
    if residual is not None:
        x, wanted = residual.right(x), residual.right(wanted)
    assert torch.allclose(through(both.plain, weights, x), wanted, rtol=1e-3, atol=1e-2)
    middle = both.plain.update("o_input", weights, x)
    stages = {"attn_input": x, "mlp_input": middle, "down_input": middle}
    for stage, before in stages.items():
        peaks = both.plain.input_of(stage, weights, before).flatten(0, 1).abs().amax(0)
        assert torch.allclose(peaks, torch.ones_like(peaks), rtol=1e-3), stage


def test_channels_that_are_always_zero_are_left(
    models: Make, layer_tensors: Make
) -> None:
    tensors = layer_tensors()
    tensors["mlp.up_proj.weight"][5] = 0.0
    tensors["self_attn.o_proj.weight"][:, 7] = 0.0
    tensors["self_attn.o_proj.weight"][:, 7 + 16] = 0.0
    found = _scaled(models, tensors, 0.5)
    assert float(found.up_scale[5]) == 1.0 == float(found.value_scale[7])
    for scale in (found.attn_scale, found.mlp_scale, found.value_scale, found.up_scale):
        assert bool(scale.isfinite().all()) and bool((scale > 0).all())
