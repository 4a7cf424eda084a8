# SPDX-License-Identifier: Apache-2.0
"""Learned clipping and scales: on the serving grid, function-preserving, and better."""

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch

from vllm_lowbit.calibrate.block import Block, through
from vllm_lowbit.calibrate.layer import (
    LayerModels,
    QuantizedLayer,
    StageQuantizer,
    Streams,
)
from vllm_lowbit.calibrate.omniquant import (
    ClippedMatrix,
    LearnedBlock,
    OmniQuant,
    OmniQuantOptions,
)
from vllm_lowbit.calibrate.quantize import round_to_nearest
from vllm_lowbit.calibrate.recipe_sections import OmniQuant as Settings
from vllm_lowbit.calibrate.recipe_sections import WeightMethod
from vllm_lowbit.calibrate.record import CalibrationRecord
from vllm_lowbit.calibrate.rotations import Dense
from vllm_lowbit.calibrate.stages import linears_of
from vllm_lowbit.calibrate.transforms import LayerTransforms, fold_layer
from vllm_lowbit.errors import CalibrationError, ConfigError
from vllm_lowbit.kernels.grid import IntGrid
from vllm_lowbit.kernels.quantize_weight.reference import quantize_weight
from vllm_lowbit.schema import Weights, scheme_from_name

Make = Callable[..., Any]
TRAINED = 128


def _weight(rows: int = 24, columns: int = 64) -> torch.Tensor:
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(1))
    weight[0] = 0.0
    weight[1] = weight[1].abs()
    weight[2] = -weight[2].abs()
    return weight


@pytest.mark.parametrize("bits", [2, 3, 4, 6])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("groups", [1, 2])
def test_training_uses_the_scales_that_are_stored(
    bits: int, symmetric: bool, groups: int
) -> None:
    grid, weight = IntGrid(bits, symmetric), _weight()
    size: Any = None if groups == 1 else 64 // groups
    clip = ClippedMatrix(weight, grid, size)
    clip.high += torch.randn(clip.high.shape) * 2
    clip.low -= torch.randn(clip.low.shape).abs() * 4
    weights = Weights(bits=bits, symmetric=symmetric, group_size=size)
    stored = round_to_nearest(weight, weights, clip.ranges(weight))
    assert torch.equal(stored.decoded(), clip.decoded(weight))
    assert stored.scale.dtype == torch.float32 and bool((stored.scale > 0).all())
    for values in (stored.codes, stored.zero_point):
        assert grid.code_min <= int(values.min()) <= int(values.max()) <= grid.code_max
    assert not bool(stored.decoded()[0].any())


@pytest.mark.parametrize("symmetric", [True, False])
def test_the_whole_range_is_the_grids_own(symmetric: bool) -> None:
    grid, weight = IntGrid(3, symmetric), _weight()
    clip = ClippedMatrix(weight, grid, None)
    clip.high += 100.0
    clip.low += 100.0
    scale, zero_point = clip.ranges(weight)
    whole, its_zero_point = grid.parameters(weight)
    assert torch.allclose(scale, whole, rtol=1e-6)
    assert torch.equal(zero_point, its_zero_point)


@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group_size", [None, 16])
def test_it_starts_at_the_clip_search(
    bits: int, symmetric: bool, group_size: int | None
) -> None:
    grid, weight = IntGrid(bits, symmetric), _weight()
    start, _ = ClippedMatrix(weight, grid, group_size).ranges(weight)
    scale = quantize_weight(weight, grid, group_size)[1]
    # But for those that would keep more than 0.982 of the range.
    assert bool(((start / scale - 1).abs() < 0.02).all())
    assert float(((start / scale - 1).abs() < 1e-5).float().mean()) > 0.4


def test_published_settings_by_scheme() -> None:
    found = {}
    for name in ("w4a16", "w3a16-g128", "w2a16-g64", "w6a6", "w4a4kv4"):
        options = OmniQuantOptions.of(Settings(), scheme_from_name(name), 0)
        found[name] = (options.let, options.aug, options.epochs)
    assert found == {
        "w4a16": (False, False, 20),
        "w3a16-g128": (False, False, 20),
        "w2a16-g64": (False, True, 40),
        "w6a6": (True, False, 20),
        "w4a4kv4": (True, False, 20),
    }
    chosen = Settings(let=True, aug=True, epochs=3)
    options = OmniQuantOptions.of(chosen, scheme_from_name("w4a16"), 0)
    assert (options.let, options.aug, options.epochs) == (True, True, 3)


def _rotation(size: int, blocks: int = 1) -> Dense:
    generator = torch.Generator().manual_seed(size)
    random = torch.randn(blocks, size, size, generator=generator, dtype=torch.float64)
    return Dense(torch.linalg.qr(random).Q)


@pytest.mark.parametrize("rotated", [False, True])
def test_learned_scales_keep_the_function(
    rotated: bool, models: Make, layer_tensors: Make
) -> None:
    both, tensors = models(), layer_tensors()
    residual = _rotation(64) if rotated else None
    start = LayerTransforms(value=_rotation(16, 2)) if rotated else LayerTransforms()
    scheme = scheme_from_name("w4a4kv4")
    learned = LearnedBlock(both, scheme, tensors, residual, start, let=True)
    assert set(learned.log_scales) == {
        "attn_scale",
        "mlp_scale",
        "value_scale",
        "key_scale",
        "up_scale",
    }
    generator = torch.Generator().manual_seed(4)
    for scale in learned.log_scales.values():
        scale += torch.randn(scale.shape, generator=generator) * 0.5
    x = torch.randn(2, 8, 64, generator=generator)
    wanted = through(both.plain, tensors, x)
    if residual is not None:
        x, wanted = residual.right(x), residual.right(wanted)
    found = through(both.plain, learned.folded(), x)
    assert torch.allclose(found, wanted, rtol=1e-4, atol=1e-4)
    assert not torch.equal(
        learned.folded()["mlp.up_proj.weight"], tensors["mlp.up_proj.weight"]
    )


def _streams(windows: int = 144) -> Streams:
    """Correlated hidden states, 16 windows of which are not trained on."""
    generator = torch.Generator().manual_seed(3)
    mix = torch.randn(64, 64, generator=generator).tril(8) / 4
    x = torch.randn(windows, 16, 64, generator=generator) @ mix
    return Streams(x + 0.02 * torch.randn(x.shape, generator=generator), x)


def _run(
    both: LayerModels,
    tensors: dict[str, torch.Tensor],
    scheme: str,
    streams: Streams | None = None,
    **settings: Any,
) -> tuple[QuantizedLayer, CalibrationRecord]:
    record, chosen = (
        CalibrationRecord(),
        Settings(**({"epochs": 20, "batch": 128} | settings)),
    )
    options = OmniQuantOptions.of(chosen, scheme_from_name(scheme), 0)
    method = OmniQuant(both, scheme_from_name(scheme), options, TRAINED, 8, record)
    streams = streams or _streams()
    ranges, transforms = method.run(
        0, tensors, None, LayerTransforms(), streams, lambda what: None
    )
    rounding = WeightMethod(method=chosen.rounding)
    quantizer = StageQuantizer(both, scheme_from_name(scheme), rounding, TRAINED, 8)
    folded = fold_layer(tensors, both.served.shape, None, transforms)
    folded = {name: tensor.float() for name, tensor in folded.items()}
    floats = {name: tensor for name, tensor in folded.items() if tensor.dim() == 1}
    layer = quantizer.run(0, folded, floats, streams, lambda name: None, ranges)
    return layer, record


@pytest.mark.parametrize(
    ("scheme", "settings"),
    [
        ("w2a16-g32", {"clip_rate": 5e-3}),
        ("w3a16", {"clip_rate": 5e-3}),
        ("w4a4kv4", {"clip_rate": 5e-3, "scale_rate": 5e-3}),
    ],
)
def test_a_trained_block_is_closer_than_at_its_start(
    scheme: str,
    settings: dict[str, float],
    models: Make,
    layer_tensors: Make,
) -> None:
    parsed = scheme_from_name(scheme)
    kv4 = parsed.kv_cache.bits == 4
    grid = IntGrid(4, symmetric=False) if parsed.activations.bits == 4 else None
    both, tensors, streams = models(grid, kv4), layer_tensors(), _streams()
    layer, record = _run(both, tensors, scheme, **settings)
    wanted = through(both.plain, tensors, streams.plain[TRAINED:])

    def error(candidate: QuantizedLayer) -> float:
        out = through(both.served, candidate.weights(), streams.served[TRAINED:])
        return float((out - wanted).square().mean())

    # Clipping starts at the best of a search already: the rest is what outputs need.
    start, _ = _run(both, tensors, scheme, clip_rate=1e-9, scale_rate=1e-9)
    assert error(layer) < 0.995 * error(start)
    curve = json.loads(record.text())["curves"]["omniquant.model.layers.0"]
    assert curve[-1][1] < curve[0][1]


@pytest.mark.parametrize("rounding", ["gptq", "gptaq"])
def test_rounding_to_the_learned_ranges(
    rounding: str, models: Make, layer_tensors: Make
) -> None:
    """The ranges are those of rtn, and the block's output is closer."""
    both, tensors, streams = models(), layer_tensors(), _streams()
    nearest, _ = _run(both, tensors, "w3a16", epochs=2)
    layer, _ = _run(both, tensors, "w3a16", epochs=2, rounding=rounding)
    for name in linears_of(both.served.shape):
        assert torch.equal(layer.linears[name].scale, nearest.linears[name].scale)
    wanted = through(both.plain, tensors, streams.plain[TRAINED:])

    def error(candidate: QuantizedLayer) -> float:
        out = through(both.served, candidate.weights(), streams.served[TRAINED:])
        return float((out - wanted).square().mean())

    assert error(layer) < 0.9 * error(nearest)


@pytest.mark.parametrize("rounding", ["gptq", "gptaq"])
def test_scales_that_are_learned_on_a_finer_grid(
    rounding: str, models: Make, layer_tensors: Make
) -> None:
    """Are folded, and then weights are rounded as without omniquant."""
    both, tensors, streams = models(), layer_tensors(), _streams()
    for norm in ("input_layernorm.weight", "post_attention_layernorm.weight"):
        tensors[norm][::8] *= 8
    settings = {"let": True, "rounding": rounding, "extra_weight_bits": 1}
    found, start = (
        _run(both, tensors, "w2a16-g32", scale_rate=rate, **settings)[0]
        for rate in (0.05, 1e-9)
    )
    wanted = through(both.plain, tensors, streams.plain[TRAINED:])

    def error(candidate: QuantizedLayer) -> float:
        out = through(both.served, candidate.weights(), streams.served[TRAINED:])
        return float((out - wanted).square().mean())

    assert error(found) < 0.9 * error(start)
    for linear in found.linears.values():
        assert -2 <= int(linear.codes.min()) <= int(linear.codes.max()) <= 1


def test_what_would_not_be_kept_is_not_learned() -> None:
    finer = Settings(rounding="gptq", extra_weight_bits=1)
    message = "extra_weight_bits is 1: with let null and inputs of 16 bits only ranges"
    with pytest.raises(ConfigError, match=message):
        OmniQuantOptions.of(finer, scheme_from_name("w3a16"), 0)
    assert OmniQuantOptions.of(finer, scheme_from_name("w4a4"), 0).extra_bits == 1
    assert OmniQuantOptions.of(finer, scheme_from_name("w3a16"), 0, 0.9).extra_bits == 1


def test_second_loss_follows_the_float_block_on_quantized_inputs(
    models: Make, layer_tensors: Make
) -> None:
    both, tensors, streams = models(), layer_tensors(), _streams()
    block = Block(both, tensors, streams, 16, 8, aug=True)
    weights = {name: tensor.float() for name, tensor in tensors.items()}
    for target, x in zip(block.targets, (streams.plain, streams.served), strict=True):
        assert torch.equal(target, through(both.plain, weights, x[:16]))


def test_same_seed_same_layer(models: Make, layer_tensors: Make) -> None:
    both, tensors = models(), layer_tensors()
    first, again = (_run(both, tensors, "w3a16", epochs=1)[0] for _ in range(2))
    for name in linears_of(both.served.shape):
        assert torch.equal(first.linears[name].scale, again.linears[name].scale)
        assert torch.equal(first.linears[name].codes, again.linears[name].codes)


def test_a_loss_that_is_not_finite_names_layer_and_step(
    models: Make, layer_tensors: Make
) -> None:
    streams = _streams(16)
    streams.served[2, 3] = torch.inf
    message = r"omniquant\.model\.layers\.0: the loss at step 1 is nan"
    with pytest.raises(CalibrationError, match=message):
        _run(models(), layer_tensors(), "w4a16", streams)


@pytest.mark.parametrize(
    ("scheme", "settings", "bits"),
    [
        ("w3a16", {"let": True, "rounding": "gptaq"}, 1),
        ("w3a16", {"let": True, "rounding": "gptaq", "extra_weight_bits": 0}, 0),
        ("w3a16", {"let": True}, 0),
        ("w3a16", {"rounding": "gptaq"}, 0),
        ("w4a4kv4", {"let": True, "rounding": "gptaq"}, 0),
    ],
)
def test_weights_are_finer_where_gptq_rounds_them_alone(
    scheme: str, settings: dict[str, Any], bits: int
) -> None:
    options = OmniQuantOptions.of(Settings(**settings), scheme_from_name(scheme), 0)
    assert options.extra_bits == bits


@pytest.mark.parametrize(
    ("scheme", "given", "alpha"),
    [("w3a16", None, 0.25), ("w4a4kv4", None, 0.5), ("w3a16", 0.7, 0.7)],
)
def test_alpha_is_smaller_where_inputs_stay_as_they_are(
    scheme: str, given: float | None, alpha: float
) -> None:
    options = OmniQuantOptions.of(Settings(alpha=given), scheme_from_name(scheme), 0)
    assert options.alpha == alpha
