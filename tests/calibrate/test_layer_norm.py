# SPDX-License-Identifier: Apache-2.0
"""LayerNorms, learned positions and an MLP without a gate, through calibration."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from vllm_lowbit.architecture import ModelShape
from vllm_lowbit.calibrate.export import export
from vllm_lowbit.calibrate.observe import observe
from vllm_lowbit.calibrate.perplexity import perplexity
from vllm_lowbit.calibrate.pipeline import calibrate
from vllm_lowbit.calibrate.recipe import Recipe, load_recipe
from vllm_lowbit.calibrate.reference_model import ReferenceModel
from vllm_lowbit.calibrate.rotations import Dense, MeanKeeping, SignedHadamard
from vllm_lowbit.calibrate.text import calibration_windows, default_text
from vllm_lowbit.calibrate.transforms import fold_head
from vllm_lowbit.errors import CheckpointError, ConfigError, UnsupportedError
from vllm_lowbit.inspection import inspect, read_checkpoint
from vllm_lowbit.kernels.hadamard.signs import random_signs
from vllm_lowbit.manifest import verify
from vllm_lowbit.rotations import check_rotations
from vllm_lowbit.schema import LowbitConfig, Rotation, Rotations, scheme_from_name

OPT, GPT2 = "OPTForCausalLM", "GPT2LMHeadModel"
DATA = {"samples": 4, "seq_len": 48}
LEARN = {"steps": 2, "tokens_per_step": 64}
# By what a recipe changes here to be quick.
RECIPES: dict[str, dict[str, Any]] = {
    "rtn": {},
    "gptq": {},
    "gptaq": {},
    "smoothquant": {},
    "quarot": {},
    "quarot-gptq": {},
    "lowbit": {},
    "spinquant": {"learn": LEARN},
    "ostquant": {"learn": LEARN},
    "lowbit-best": {"learn": LEARN},
    "omniquant": {"omniquant": {"epochs": 1, "scale_rate": 0.2}},
    "refined": {"refine": {"scope": "model", "steps": 2}},
    "refined layers": {"refine": {"scope": "layer", "steps": 2}},
}
# Those that differ in what they do to it.
OF_GPT2 = ("gptq", "smoothquant", "ostquant", "omniquant", "refined")
SCALED = {"smoothquant", "lowbit", "ostquant", "lowbit-best", "omniquant"}
ROTATED = {"quarot", "quarot-gptq", "lowbit", "spinquant", "ostquant", "lowbit-best"}


def recipe_of(name: str, scheme: str = "w8a8", **changes: Any) -> Recipe:
    changes = {"scheme": scheme, "data": DATA, **RECIPES[name], **changes}
    if name.startswith("refined"):
        return Recipe.model_validate({"transforms": {"residual": "none"}, **changes})
    given = load_recipe(name)._mapping()
    sections = {
        key: given[key] | value if isinstance(value, dict) else value
        for key, value in changes.items()
        if key in given
    }
    return Recipe.model_validate({**given, **changes, **sections})


@pytest.fixture
def build(
    tmp_path: Path, tiny_model: Callable[..., Path], rewrite: Callable[..., Path]
) -> Callable[..., Path]:
    """``build(architecture, **config)``: a float32 model, no norm 1 and no bias 0."""

    def build(architecture: str, **config: Any) -> Path:
        directory = tiny_model(
            tmp_path / "plain",
            dtype="float32",
            tokenizer=True,
            architecture=architecture,
            **{"tie_word_embeddings": True, "initializer_range": 0.1, **config},
        )
        generator = torch.Generator().manual_seed(2)

        def spread(tensors: dict[str, torch.Tensor]) -> None:
            for name, tensor in tensors.items():
                if tensor.dim() == 1:
                    tensor += torch.randn(tensor.shape, generator=generator) / 2
                elif "position" in name:
                    # A mean that LayerNorm takes away, and RMSNorm would not.
                    tensor += 0.3

        rewrite(directory, spread)
        return directory

    return build


IDS = torch.arange(48) * 83 % 4096


@pytest.mark.parametrize(
    ("architecture", "recipe", "changes"),
    [
        *((OPT, recipe, {}) for recipe in RECIPES),
        (OPT, "lowbit", {"tie_word_embeddings": False}),
        (OPT, "ostquant", {"tie_word_embeddings": False}),
        *((GPT2, recipe, {}) for recipe in OF_GPT2),
        (GPT2, "lowbit", {"tie_word_embeddings": False}),
        (GPT2, "lowbit", {"vocab_bits": 8}),
        (GPT2, "rtn", {"vocab_bits": 8, "scheme": "w3a16"}),
    ],
)
def test_8_bits_compute_the_model(
    build: Callable[..., Path],
    tmp_path: Path,
    architecture: str,
    recipe: str,
    changes: dict[str, Any],
) -> None:
    """Whatever is folded, the function stays; of what is stored, the losses."""
    tied = changes.get("tie_word_embeddings", True)
    plain, out = build(architecture, tie_word_embeddings=tied), tmp_path / "out"
    of_recipe = {k: v for k, v in changes.items() if k != "tie_word_embeddings"}
    chosen = recipe_of(recipe, **of_recipe)
    report = calibrate(str(plain), out, chosen, default_text(), "cpu")
    expected, logits = (ReferenceModel(str(model))(IDS) for model in (plain, out))
    # The first of these clips its inputs, and the other has no 8 bits.
    coarse = recipe == "lowbit-best" or "scheme" in changes
    allowed = 0.4 if "scheme" in changes else 0.1 if coarse else 0.05
    assert (logits - expected).norm() < allowed * expected.norm()
    shape, config = read_checkpoint(out)
    assert list(verify(out, shape, config)) == []
    rotated = recipe in ROTATED
    assert (config.rotations.residual is not None) == rotated
    assert shape.tie_word_embeddings == (tied and not rotated)
    apart = report.held_out.quantized - report.held_out.plain
    assert abs(apart) < (0.2 if coarse else 0.05)
    of_card = (out / "README.md").read_text()
    assert ("two matrices" in of_card) == (tied and rotated)
    between = "up and down" in of_card
    assert between == (architecture == OPT and recipe in SCALED)
    if recipe in ("rtn", "lowbit") and not coarse:
        found = observe(str(plain), str(out), [IDS])
        assert {place.kind for place in found.places} >= {"mlp.up_proj"}
        for who in ("checkpoint", "rtn"):
            assert all(0 < error.all < 0.05 for error in found.errors[who].values())


@pytest.mark.parametrize("architecture", [OPT, GPT2])
@pytest.mark.parametrize("recipe", ["rtn", "lowbit"])
def test_4_bits(
    build: Callable[..., Path], tmp_path: Path, recipe: str, architecture: str
) -> None:
    """What is measured while calibrating is what the reference computes."""
    plain, out = build(architecture), tmp_path / "out"
    recipe_ = recipe_of(recipe, "w4a4kv4", data={"samples": 8, "seq_len": 128})
    report = calibrate(str(plain), out, recipe_, default_text(), "cpu")
    windows = calibration_windows(str(out), default_text(), 10, 128, 0)[8:]
    served = perplexity(ReferenceModel(str(out)), windows.flatten(), 128)
    assert served.tokens == report.held_out_tokens
    assert math.log(served.perplexity) == pytest.approx(
        report.held_out.quantized, abs=0.03
    )
    linears = inspect(out).linears
    assert list(linears) == ["qkv_proj", "o_proj", "up_proj", "down_proj"]
    assert {linear.weight_bits for linear in linears.values()} == {4}
    assert 4 < inspect(out).bits_per_weight.linears < 4.5


@pytest.mark.parametrize("size", [16, 48, 192])
@pytest.mark.parametrize("kind", ["dense", "hadamard", "identity", "negative"])
def test_rotations_that_keep_the_mean(size: int, kind: str) -> None:
    """Orthogonal, with the ones fixed: LayerNorm commutes, and RMSNorm's does too."""
    generator = torch.Generator().manual_seed(size)
    random = torch.randn(size, size, generator=generator, dtype=torch.float64)
    eye = torch.eye(size, dtype=torch.float64)
    inner = {
        "dense": Dense(torch.linalg.qr(random).Q.unsqueeze(0)),
        "hadamard": SignedHadamard(size, random_signs(1, size)),
        "identity": Dense(eye.unsqueeze(0)),
        "negative": Dense(-eye.unsqueeze(0)),
    }[kind]
    rotation = MeanKeeping(inner)
    matrix = rotation.right(eye)
    assert torch.allclose(matrix @ matrix.t(), eye, atol=1e-12)
    ones = torch.ones(size, dtype=torch.float64)
    assert torch.allclose(rotation.right(ones), ones, atol=1e-12)
    normed = torch.nn.functional.layer_norm(random, (size,))
    after = torch.nn.functional.layer_norm(rotation.right(random), (size,))
    assert torch.allclose(after, rotation.right(normed), atol=1e-9)
    if kind in ("identity", "negative"):
        assert torch.allclose(matrix, eye, atol=1e-12)
    elif kind == "hadamard":
        # One large channel is spread over all.
        assert matrix.abs().max() < 4 * size**-0.5
    with pytest.raises(TypeError, match="residual stream has no heads"):
        rotation.repeat(2)


def test_learned_rotations_get_a_gradient() -> None:
    """Also where they start, at the identity."""
    generator = torch.Generator().manual_seed(0)
    x, wanted = torch.randn(2, 5, 24, generator=generator, dtype=torch.float64)
    for start in (torch.eye(24), torch.linalg.qr(torch.randn(24, 24)).Q):
        blocks = start.double().unsqueeze(0).requires_grad_()

        def loss(blocks: torch.Tensor) -> torch.Tensor:
            return (MeanKeeping(Dense(blocks)).right(x) * wanted).sum()

        assert torch.autograd.gradcheck(loss, (blocks,))


def test_a_bias_of_the_final_norm_where_its_weight_is_zero() -> None:
    generator = torch.Generator().manual_seed(0)
    head, x, gamma, beta = (
        torch.randn(size, generator=generator, dtype=torch.float64)
        for size in ((50, 48), (7, 48), (48,), (48,))
    )
    gamma[:5] = 0
    rotation = MeanKeeping(SignedHadamard(48, random_signs(3, 48)))
    folded = fold_head(head, gamma, beta, rotation)
    expected = torch.nn.functional.layer_norm(x, (48,), gamma, beta) @ head.t()
    normed = torch.nn.functional.layer_norm(rotation.right(x), (48,)) + 1
    assert torch.allclose(normed @ folded.t(), expected, atol=1e-9)


@pytest.mark.parametrize(
    ("architecture", "start", "linear", "other"),
    [
        (OPT, "model.", "model.decoder.layers.0.fc1", "decoder.embed_positions.weight"),
        (GPT2, "transformer.", "transformer.h.0.attn.c_attn", "ln_f.bias"),
    ],
)
def test_names_without_their_start(
    build: Callable[..., Path],
    tmp_path: Path,
    rewrite: Callable[..., Path],
    architecture: str,
    start: str,
    linear: str,
    other: str,
) -> None:
    """Of files that were saved from the model without its head, masks among them."""
    plain = build(architecture)
    expected = ReferenceModel(str(plain))(IDS)

    def shorten(tensors: dict[str, torch.Tensor]) -> None:
        for name in list(tensors):
            tensors[name.removeprefix(start)] = tensors.pop(name)
        if architecture == GPT2:
            tensors["h.0.attn.bias"] = torch.ones(1, 1, 256, 256).tril()

    rewrite(plain, shorten)
    assert torch.equal(ReferenceModel(str(plain))(IDS), expected)
    calibrate(str(plain), tmp_path / "out", recipe_of("rtn"), default_text(), "cpu")
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert f"{linear}.weight_packed" in stored
    rewrite(plain, lambda t: t.update({start + other: t[other].clone()}))
    with pytest.raises(CheckpointError, match=f"tensor {start}{other} is in both"):
        ReferenceModel(str(plain))


def test_sequences_longer_than_the_positions(
    build: Callable[..., Path], tmp_path: Path
) -> None:
    plain = build(OPT, max_position_embeddings=40)
    message = "data.seq_len 48: .*config.json has positions of 40 tokens"
    with pytest.raises(ConfigError, match=message):
        calibrate(str(plain), tmp_path / "out", recipe_of("rtn"), default_text(), "cpu")
    assert not (tmp_path / "out").exists()
    model = ReferenceModel(str(plain))
    with pytest.raises(ConfigError, match="sequence of 48 tokens: .* 40 positions"):
        model(IDS)
    # Every sequence starts at the first position.
    both = model(torch.cat((IDS[:30], IDS[:40])), [30, 40])
    for part, n in zip(both.split([30, 40]), (30, 40), strict=True):
        assert torch.allclose(part, model(IDS[:n]), atol=1e-4)


def test_rotations_that_cannot_be_served() -> None:
    shape = ModelShape.from_config(
        {
            "architectures": [OPT],
            "hidden_size": 128,
            "ffn_dim": 256,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "vocab_size": 50,
            "tie_word_embeddings": True,
        },
        "x",
    )
    for apply in ("folded", "online"):
        config = LowbitConfig(
            scheme=scheme_from_name("w4a4"),
            rotations=Rotations(residual=Rotation(apply=apply, order=128, block=128)),
        )
        message = f"apply is {apply} and tie_word_embeddings true; supported with Layer"
        with pytest.raises(ConfigError, match=message):
            check_rotations(shape, config, "x")


def test_an_8_bit_vocabulary(build: Callable[..., Path], tmp_path: Path) -> None:
    plain, recipe = build(OPT), recipe_of("rtn", vocab_bits=8)
    message = "vocab_bits 8 is not supported with OPTForCausalLM, whose vocabulary vLLM"
    with pytest.raises(UnsupportedError, match=message):
        calibrate(str(plain), tmp_path / "out", recipe, default_text(), "cpu")


def test_other_formats(build: Callable[..., Path], tmp_path: Path) -> None:
    plain, out = build(OPT), tmp_path / "out"
    recipe = recipe_of("rtn", "w4a16")
    calibrate(str(plain), out, recipe, default_text(), "cpu")
    with pytest.raises(UnsupportedError, match="OPTForCausalLM cannot be exported: it"):
        export(out, tmp_path / "exported")
    config = json.loads((plain / "config.json").read_text())
    gptq = {"bits": 4, "group_size": 128, "sym": True, "desc_act": False}
    config["quantization_config"] = {"quant_method": "gptq", **gptq}
    (plain / "config.json").write_text(json.dumps(config))
    message = "OPTForCausalLM quantized by gptq is not supported; plain and lowbit"
    with pytest.raises(UnsupportedError, match=message):
        ReferenceModel(str(plain))
