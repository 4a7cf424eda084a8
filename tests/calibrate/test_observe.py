# SPDX-License-Identifier: Apache-2.0
"""A checkpoint beside its base model: errors and inputs against other ways to them."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from vllm_lowbit.calibrate.observe import PLACES, Observation, observe
from vllm_lowbit.calibrate.qsur import log_qsur
from vllm_lowbit.calibrate.reference_model import ReferenceModel
from vllm_lowbit.errors import ConfigError
from vllm_lowbit.kernels.grid import IntGrid, decode

ROTATIONS = {
    "residual": {"apply": "folded", "order": 128, "block": 128, "sign_seed": 3},
    "v": {"apply": "folded", "order": 64, "block": 64, "sign_seed": 4},
    "k": {"apply": "online", "order": 64, "block": 64},
    "down_input": {"apply": "online", "order": 256, "block": 256},
}
BLOCKS = [f"model.layers.{n}.{block}" for n in (0, 1) for block in ("self_attn", "mlp")]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory, tiny_model: Any) -> str:
    return str(tiny_model(tmp_path_factory.mktemp("base")))


@pytest.fixture(scope="module")
def windows() -> list[torch.Tensor]:
    with torch.random.fork_rng():
        torch.manual_seed(2)
        return [torch.randint(256, (n,)) for n in (40, 24)]


@pytest.fixture(scope="module")
def plain_rtn(
    tmp_path_factory: pytest.TempPathFactory, base: str, lowbit_checkpoint: Any
) -> str:
    directory = tmp_path_factory.mktemp("rtn")
    return str(lowbit_checkpoint(directory, base, "w4a4kv4"))


@pytest.fixture(scope="module")
def rotated(
    tmp_path_factory: pytest.TempPathFactory, base: str, lowbit_checkpoint: Any
) -> str:
    directory = tmp_path_factory.mktemp("rotated")
    return str(lowbit_checkpoint(directory, base, "w4a4kv4", **ROTATIONS))


@pytest.fixture(scope="module")
def seen(base: str, rotated: str, windows: list[torch.Tensor]) -> Observation:
    return observe(base, rotated, windows)


def test_without_transforms_the_checkpoint_is_rtn(
    base: str, plain_rtn: str, windows: list[torch.Tensor]
) -> None:
    """The fixture rounds to nearest too, so it is the same model to the bit."""
    found = observe(base, plain_rtn, windows)
    assert list(found.errors["rtn"]) == BLOCKS
    assert found.errors["checkpoint"] == found.errors["rtn"]
    for place in found.places:
        assert torch.equal(place.before.peaks, place.after.peaks) or place.kind in (
            "self_attn.o_proj",
            "mlp.down_proj",
        )
        assert "online Hadamard" not in place.qsur


@pytest.mark.parametrize(("tied", "apply"), [(False, "folded"), (True, "online")])
def test_eight_bits_are_nearly_the_base_model(
    tmp_path: Path,
    windows: list[torch.Tensor],
    tiny_model: Any,
    lowbit_checkpoint: Any,
    tied: bool,
    apply: str,
) -> None:
    """Any mistake in the change of basis would be an error of order one."""
    model = tiny_model(tmp_path / "base", tie_word_embeddings=tied)
    rotations = {key: value for key, value in ROTATIONS.items() if key != "k"}
    rotations["residual"] = {**rotations["residual"], "apply": apply}
    checkpoint = lowbit_checkpoint(tmp_path / "q", model, "w8a8", **rotations)
    found = observe(str(model), str(checkpoint), windows)
    for error in found.errors["checkpoint"].values():
        assert 0 < error.weights < 0.03 and error.weights < error.all < 0.05
        assert 0 < error.stream < 0.05


def test_errors_have_the_order_they_must(seen: Observation) -> None:
    for name in ("checkpoint", "rtn"):
        errors = seen.errors[name]
        assert list(errors) == BLOCKS
        assert all(0 < e.weights < e.all < 1 for e in errors.values())


def test_stream_error_is_that_of_the_two_models(
    base: str, rotated: str, windows: list[torch.Tensor], seen: Observation
) -> None:
    """The last residual stream of each, in whole forwards; rotated, norms stay."""
    streams: dict[str, list[torch.Tensor]] = {}
    for name in (base, rotated):
        model = ReferenceModel(name)
        add_norm, last = model._add_norm, []

        def record(x: Any, residual: Any, norm: str, add=add_norm, last=last) -> Any:
            if norm == "model.norm":
                last.append(x + residual)
            return add(x, residual, norm)

        model._add_norm = record  # type: ignore[method-assign]
        for window in windows:
            model(window)
        streams[name] = last
    ours, theirs = (torch.cat(streams[name]).double() for name in (rotated, base))
    # Their products with themselves do not depend on the basis of the rows' space.
    u, _, v = torch.linalg.svd(theirs.t() @ ours)
    nearest = float((ours - theirs @ (u @ v)).norm() / theirs.norm())
    found = seen.errors["checkpoint"]["model.layers.1.mlp"].stream
    # The nearest rotation of these few rows is at least as near as the true one.
    assert nearest <= found * 1.01
    products = float((ours @ ours.t() - theirs @ theirs.t()).norm())
    assert products <= 2.2 * found * float((theirs @ theirs.t()).norm()) * math.sqrt(2)


def test_inputs(base: str, windows: list[torch.Tensor], seen: Observation) -> None:
    """In the order they run, with the largest magnitudes of what is read."""
    kinds = [(place.layer, place.kind) for place in seen.places]
    gated = [kind for kind in PLACES if kind != "mlp.up_proj"]
    assert kinds == [(layer, kind) for layer in (0, 1) for kind in gated]
    model = ReferenceModel(base)
    first = [model.vocabulary.look_up(window) for window in windows]
    weight = model.tensors["model.layers.0.input_layernorm.weight"]
    x = torch.cat([s * torch.rsqrt(s.square().mean(-1, True) + 1e-6) for s in first])
    place = seen.places[0]
    assert torch.allclose(place.before.peaks, (x * weight).abs().amax(0), rtol=1e-3)
    assert place.before.sample.shape == (40, 128)
    assert place.before.sample.max() <= place.before.peaks.max()
    moment = (x * weight).double()
    expected = log_qsur(moment.t() @ moment / len(x))
    assert place.qsur["base model"] == pytest.approx(expected, rel=1e-3)


def test_stages_of_transforms(seen: Observation) -> None:
    stages = {place.kind: list(place.qsur) for place in seen.places}
    assert stages["self_attn.qkv_proj"] == ["base model", "residual rotation"]
    assert stages["mlp.gate_up_proj"] == ["base model", "residual rotation"]
    assert stages["self_attn.o_proj"] == ["base model", "folded transforms"]
    assert stages["mlp.down_proj"][0] == "base model"
    assert stages["mlp.down_proj"][-1] == "online Hadamard"


def test_groups_of_activations(
    tmp_path: Path, base: str, windows: list[torch.Tensor], lowbit_checkpoint: Any
) -> None:
    """The error of an input is that of its groups' own ranges."""
    checkpoint = lowbit_checkpoint(tmp_path, base, "w4a4kv4-g32-ag32")
    found = observe(base, str(checkpoint), windows)
    model = ReferenceModel(base)
    x = torch.cat([model.vocabulary.look_up(window) for window in windows])
    x = x * torch.rsqrt(x.square().mean(-1, True) + 1e-6)
    x = x * model.tensors["model.layers.0.input_layernorm.weight"]
    rows = x.reshape(-1, 32)
    rounded = decode(*IntGrid(4, False).quantize(rows))
    expected = float((rounded - rows).norm() / rows.norm())
    assert found.places[0].before.error == pytest.approx(expected, rel=1e-3)


def test_activations_that_are_not_quantized(
    tmp_path: Path, base: str, windows: list[torch.Tensor], lowbit_checkpoint: Any
) -> None:
    checkpoint = lowbit_checkpoint(tmp_path, base, "w4a16")
    found = observe(base, str(checkpoint), windows)
    assert all(p.before.error is p.after.error is None for p in found.places)
    for error in found.errors["checkpoint"].values():
        assert error.weights == error.all > 0


class TestBadInput:
    def test_not_quantized(self, base: str, windows: list[torch.Tensor]) -> None:
        with pytest.raises(ConfigError, match="is not quantized; a report compares"):
            observe(base, base, windows)

    def test_other_sizes(
        self, tmp_path: Path, rotated: str, windows: list[Any], tiny_model: Any
    ) -> None:
        other = tiny_model(tmp_path, intermediate_size=512)
        with pytest.raises(ConfigError, match="its sizes are not those of"):
            observe(str(other), rotated, windows)

    def test_other_model(
        self,
        tmp_path: Path,
        rotated: str,
        windows: list[Any],
        tiny_model: Any,
        rewrite: Any,
    ) -> None:
        other = tiny_model(tmp_path)
        name = "model.embed_tokens.weight"
        rewrite(other, lambda tensors: tensors[name].normal_())
        with pytest.raises(ConfigError, match="was not made from .* no rotation takes"):
            observe(str(other), rotated, windows)
