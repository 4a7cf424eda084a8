# SPDX-License-Identifier: Apache-2.0
"""Model cards: valid for the hub, deterministic, and complete."""

from dataclasses import replace
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from vllm_lowbit.calibrate.base_card import BaseMetadata
from vllm_lowbit.calibrate.card import CalibrationText, render_card, write_card
from vllm_lowbit.calibrate.recipe import Recipe, load_recipe
from vllm_lowbit.calibrate.recipe_sections import Refine
from vllm_lowbit.schema import (
    ClipRatios,
    LowbitConfig,
    Rotations,
    Scheme,
    scheme_from_name,
)

from .cards import CARD, HADAMARD, commands, front_matter, shown


def test_front_matter_is_what_the_hub_reads() -> None:
    text = render_card(CARD)
    assert front_matter(text) == {
        "license": "apache-2.0",
        "language": ["en", "no"],
        "base_model": "org/ref-7m",
        "base_model_relation": "quantized",
        "library_name": "vllm",
        "tags": ["vllm", "lowbit", "quantized", "w4a4kv4"],
    }
    data = ModelCard(text).data
    assert (data.license, data.base_model) == ("apache-2.0", "org/ref-7m")
    assert data.library_name == "vllm"


def test_everything_is_said() -> None:
    text = render_card(CARD)
    for words in (
        "# ref-7m-w4a4kv4\n",
        "[org/ref-7m](https://huggingface.co/org/ref-7m) at revision 0123abc",
        "5.0 MB, the same model in bf16 13.6 MB",
        "    pip install 'vllm-lowbit[serve]'\n    vllm serve ./ref-7m-w4a4kv4\n",
        "| weights of the linear layers | int4 symmetric, one scale per output channel",
        "| their inputs | int4 asymmetric, dynamic, one scale per token |",
        "| KV cache | int4 asymmetric, one scale and zero per token and head |",
        "| embedding and head | 16 bits |",
        "GPTQ: damping 0.01, blocks of\n128 columns, in their order.",
        "| residual stream | random-sign Hadamard of order 256, folded |",
        "| queries and keys | Hadamard of order 64, online |",
        "| values, per head | random-sign Hadamard of order 64, folded |",
        "| input of down_proj | Hadamard of order 12 across elements 64 apart, after ",
        " apart, after scales that are powers of two, online |",
        "tensor parallel size that divides 8 ",
        "| wikitext-2-test.txt | 19961 | 512 | 36.86 | 38.19 |",
        "    vllm-lowbit calibrate org/ref-7m -o ./ref-7m-w4a4kv4 --recipe recipe.yaml",
        "- recipe: `quarot-gptq`, [recipe.yaml](recipe.yaml) beside this file, SHA-256",
        f"SHA-256\n  `{CARD.recipe.sha256()}`\n",
        "- text: wikitext-2-train.txt, 128 windows of 512 tokens, seed 0\n",
        "- vllm-lowbit 0.1.0\n- torch 2.13.0\n- transformers 5.19.0\n",
        "which states: apache-2.0.",
    ):
        assert words in text.replace("\\_", "_"), words


def test_other_schemes_and_recipes() -> None:
    config = LowbitConfig(
        scheme=scheme_from_name("w3a16-g128", vocab_bits=8), rotations=Rotations()
    )
    card = replace(CARD, config=config, recipe=load_recipe("rtn"), calibration=None)
    text = render_card(card)
    for words in (
        "int3 asymmetric, one scale per 128 inputs of an output channel",
        "| their inputs | 16 bits |",
        "| KV cache | 16 bits |",
        "| embedding and head | int8 symmetric, one scale per row |",
        "rounded to the nearest code",
        "## Transforms\n\nNone.\n",
    ):
        assert words in text
    assert "- text:" not in text
    assert "w3a16-g128" in front_matter(text)["tags"]


def test_equalization_and_other_matrices() -> None:
    recipe = load_recipe("rtn")
    transforms = recipe.transforms.model_copy(update={"equalize": True})
    learned = HADAMARD.model_copy(update={"kind": "orthogonal", "order": 64})
    config = CARD.config.model_copy(update={"rotations": Rotations(v=learned)})
    text = render_card(
        replace(
            CARD,
            config=config,
            recipe=recipe.model_copy(update={"transforms": transforms}),
        )
    )
    assert "| between v and o, up and down | scales from weights and inputs" in text
    assert (
        "| values, per head | learned orthogonal matrix of order 64, folded |" in text
    )


@pytest.mark.parametrize(
    ("name", "lines"),
    [
        ("gptaq", ["Weights were rounded by GPTAQ: damping 0.01, blocks of"]),
        (
            "smoothquant",
            [
                "Weights were rounded to the nearest code.",
                (
                    "| between norms and linears, v and o, up and down | SmoothQuant's "
                    "scales, alpha 0.5, folded |"
                ),
            ],
        ),
        (
            "omniquant",
            [
                "Weights were rounded by GPTAQ: damping 0.01, blocks of",
                "Their ranges are those that OmniQuant learned block by block.",
                (
                    "| between norms and linears, v and o, q and k, up and down | "
                    "scales that OmniQuant learned, folded |"
                ),
            ],
        ),
    ],
)
def test_methods(name: str, lines: list[str]) -> None:
    text = render_card(replace(CARD, recipe=load_recipe(name)))
    for line in lines:
        assert line in text


def test_refined() -> None:
    recipe = load_recipe("lowbit").model_copy(update={"refine": Refine(scope="model")})
    text = render_card(replace(CARD, recipe=recipe))
    assert "Then codes, scales and norm weights were trained to follow" in text


def test_clipped_inputs_are_named() -> None:
    scheme = scheme_from_name("w4a4", clip_ratio=0.9)
    config = CARD.config.model_copy(update={"scheme": scheme})
    text = render_card(replace(CARD, config=config))
    assert "one scale per token, clipped to 0.9 of its range" in text
    assert "clip_ratios" not in text


def test_groups_of_inputs_are_named() -> None:
    scheme = scheme_from_name("w4a4kv4-g64-ag64")
    config = CARD.config.model_copy(update={"scheme": scheme})
    text = render_card(replace(CARD, config=config))
    assert "int4 symmetric, one scale per 64 inputs of an output channel |" in text
    assert "dynamic, one scale per token and group of 64 |" in text


@pytest.mark.parametrize(
    ("clip", "line"),
    [
        ("learned", "How much of its range each input keeps was learned;"),
        ("searched", "each input keeps was searched for, for least squared error of"),
    ],
)
def test_clip_ratios_are_named(clip: str, line: str) -> None:
    ratios = {stage: [0.9, 0.8125] for stage in ClipRatios.model_fields}
    activations = {"bits": 4, "clip_ratios": ratios}
    scheme = CARD.config.scheme.model_dump() | {"activations": activations}
    recipe = Recipe.model_validate({"activations": {"clip": clip}})
    config = CARD.config.model_copy(update={"scheme": Scheme.model_validate(scheme)})
    text = render_card(replace(CARD, config=config, recipe=recipe))
    assert "token, clipped to 0.8125 to 0.9 of its range, by layer |" in text
    assert line in text


def test_scales_of_omniquant_are_not_learned_for_weights_alone_unless_asked() -> None:
    config = CARD.config.model_copy(update={"scheme": scheme_from_name("w3a16-g128")})
    recipe = Recipe.model_validate({"weights": {"method": "omniquant"}})
    text = render_card(replace(CARD, config=config, recipe=recipe))
    assert "scales that OmniQuant learned" not in text
    assert "Weights were rounded to the nearest code." in text
    card = replace(CARD, config=config, recipe=load_recipe("omniquant"))
    assert "scales that OmniQuant learned" in render_card(card)


def test_every_rotation_has_a_place() -> None:
    names = [name for name in Rotations.model_fields if name[:3] != "max"]
    rotations = Rotations(**dict.fromkeys(names, HADAMARD))
    card = replace(CARD, config=CARD.config.model_copy(update={"rotations": rotations}))
    assert render_card(card).count("random-sign Hadamard of order 64") == len(names)


def test_nothing_measured() -> None:
    none = render_card(replace(CARD, perplexities=()))
    assert "## Perplexity\n\nNot measured.\n" in none


def test_commands() -> None:
    serve, measure, reproduce = commands(render_card(CARD))[1:]
    assert serve == ["vllm", "serve", "./ref-7m-w4a4kv4"]
    assert measure == reproduce
    assert reproduce[-2:] == ["--recipe", "recipe.yaml"]


def test_a_text_of_the_user_is_part_of_the_command() -> None:
    calibration = CalibrationText("/home/me/my text.txt", 128, 512, 0)
    text = render_card(replace(CARD, calibration=calibration))
    assert commands(text)[-1][-2:] == ["--data", "my text.txt"]


def test_unknown_licence() -> None:
    text = render_card(replace(CARD, base=BaseMetadata()))
    assert "license" not in front_matter(text)
    assert "language" not in front_matter(text)
    assert "Its metadata states none" in text


def test_named_licence() -> None:
    base = BaseMetadata("other", "llama3", "https://x.org/a_b", None, "text-generation")
    text = render_card(replace(CARD, base=base))
    data = front_matter(text)
    assert data["license_name"] == "llama3"
    assert data["license_link"] == "https://x.org/a_b"
    assert data["pipeline_tag"] == "text-generation"
    assert shown(text)[-1].endswith("which states: other, llama3, https://x.org/a_b.")


def test_written_bytes_are_reproducible(tmp_path: Path) -> None:
    path = write_card(tmp_path, CARD)
    assert path == tmp_path / "README.md"
    first = path.read_bytes()
    assert b"\r" not in first
    assert first.endswith(b"\n")
    assert b"\n\n\n" not in first
    assert write_card(tmp_path, CARD).read_bytes() == first
    assert first.decode() == render_card(CARD)
