# SPDX-License-Identifier: Apache-2.0
"""Norms with 1 added to their weights, and of what goes into the residual stream."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from vllm_lowbit.architecture import ModelShape
from vllm_lowbit.calibrate.observe import observe
from vllm_lowbit.calibrate.pipeline import calibrate
from vllm_lowbit.calibrate.recipe import Recipe, load_recipe
from vllm_lowbit.calibrate.reference_model import ReferenceModel
from vllm_lowbit.calibrate.text import default_text
from vllm_lowbit.calibrate.transforms import (
    LayerTransforms,
    fold_layer,
    norm_readers,
    storable,
)
from vllm_lowbit.errors import UnsupportedError
from vllm_lowbit.supported_models import ARCHITECTURES

MODELS: dict[str, dict[str, Any]] = {
    "Gemma2ForCausalLM": {
        "tie_word_embeddings": True,
        "sliding_window": 20,
        "attn_logit_softcapping": 4.0,
        "final_logit_softcapping": 8.0,
    },
    "Gemma3ForCausalLM": {
        "tie_word_embeddings": True,
        "sliding_window": 20,
        "sliding_window_pattern": 2,
    },
}
DATA = {"samples": 4, "seq_len": 48}
RECIPES: dict[str, dict[str, Any]] = {
    "smoothquant": {},
    "omniquant": {"omniquant": {"epochs": 1, "scale_rate": 0.2}},
    "refined": {
        "transforms": {"equalize": True},
        "weights": {"method": "gptaq"},
        "refine": {"scope": "model", "steps": 2},
    },
}


def _recipe(name: str) -> Recipe:
    changes = {"scheme": "w8a8", "data": DATA, **RECIPES.get(name, {})}
    if name == "refined":
        return Recipe.model_validate(changes)
    recipe = load_recipe(name)
    return Recipe.model_validate(recipe._mapping() | changes)


@pytest.fixture
def plain(
    name: str, tmp_path: Path, tiny_model: Callable[..., Path], rewrite: Any
) -> Path:
    """A bfloat16 model; gains of its norms from 0.01 on."""
    directory = tiny_model(
        tmp_path / "plain",
        tokenizer=True,
        architecture=name,
        **{"initializer_range": 0.1, **MODELS[name]},
    )
    generator = torch.Generator().manual_seed(2)

    def spread(tensors: dict[str, torch.Tensor]) -> None:
        for tensor in tensors.values():
            if tensor.dim() == 1:
                tensor.uniform_(-4.5, 1.0, generator=generator).exp_().sub_(1)

    rewrite(directory, spread)
    return directory


@pytest.mark.parametrize(
    ("name", "recipe"),
    [
        ("Gemma2ForCausalLM", "smoothquant"),
        ("Gemma2ForCausalLM", "refined"),
        ("Gemma3ForCausalLM", "omniquant"),
    ],
)
def test_8_bits_compute_the_model(plain: Path, tmp_path: Path, recipe: str) -> None:
    """Whatever is folded, the function stays."""
    out = tmp_path / "out"
    calibrate(str(plain), out, _recipe(recipe), default_text(), "cpu")
    ids = torch.arange(48) * 83 % 4096
    expected, logits = (ReferenceModel(str(model))(ids) for model in (plain, out))
    assert (logits - expected).norm() < 0.05 * expected.norm()
    if recipe == "refined":
        found = observe(str(plain), str(out), [ids])
        for who in ("checkpoint", "rtn"):
            assert all(0 < error.all < 0.05 for error in found.errors[who].values())


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("recipe", ["spinquant", "ostquant", "lowbit-best"])
def test_a_learned_rotation_of_the_stream(
    plain: Path, tmp_path: Path, recipe: str
) -> None:
    message = (
        "config.json: transforms.residual learned: the weights of post_attention_layer"
        "norm and post_feedforward_layernorm of Gemma.* use residual: hadamard"
    )
    with pytest.raises(UnsupportedError, match=message):
        calibrate(str(plain), tmp_path / "out", _recipe(recipe), default_text(), "cpu")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_scales_leave_weights_that_can_be_stored(dtype: torch.dtype) -> None:
    """Near -1 there are few, and none of gain 0 may be among them."""
    shape = ModelShape(
        64, 64, 1, 1, 1, 64, 8, True, architecture=ARCHITECTURES["Gemma2ForCausalLM"]
    )
    generator = torch.Generator().manual_seed(0)
    tensors = {
        name.removeprefix("model.layers.0."): torch.randn(size, generator=generator)
        for name, size in shape.tensors().items()
        if name.startswith("model.layers.0.")
    }
    tensors = {name: tensor.to(dtype) for name, tensor in tensors.items()}
    tensors["input_layernorm.weight"][:4] = torch.tensor([-1.0, -0.99, -1.01, 0.0])
    wanted = torch.randn(64, generator=generator).double().mul(4).exp()
    start = LayerTransforms(attn_scale=wanted, mlp_scale=wanted.flip(0))
    found = storable(start, tensors, shape, None)
    folded = fold_layer(tensors, shape, None, found)
    for norm, readers in norm_readers(shape).items():
        weight = folded[f"{norm}.weight"]
        stored = weight.to(dtype).double()
        assert torch.allclose(stored, weight, rtol=0, atol=1e-12)
        gain = tensors[f"{norm}.weight"].double() + 1
        assert torch.equal(stored == -1, gain == 0)
        for reader in readers:
            before = tensors[f"{reader}.weight"].double() * gain
            after = folded[f"{reader}.weight"] * (stored + 1)
            assert torch.allclose(after, before, rtol=1e-9, atol=0)
    # And near those that were asked for, where there are such weights.
    many = (tensors["input_layernorm.weight"].double() + 1).abs() / wanted > 0.5
    ratio = (found.attn_scale / wanted)[many]
    assert len(ratio) > 8 and bool(((ratio - 1).abs() < 0.01).all())
