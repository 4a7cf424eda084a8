# SPDX-License-Identifier: Apache-2.0
"""Model cards: valid for the hub, deterministic, and proof against odd names."""

import re
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard
from hypothesis import given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from vllm_lowbit.calibrate.base_card import BaseMetadata, base_metadata
from vllm_lowbit.calibrate.card import (
    CalibrationText,
    Card,
    TextPerplexity,
    render_card,
    write_card,
)
from vllm_lowbit.calibrate.recipe import Recipe, load_recipe
from vllm_lowbit.calibrate.recipe_sections import Refine
from vllm_lowbit.schema import (
    ClipRatios,
    LowbitConfig,
    Rotation,
    Rotations,
    Scheme,
    scheme_from_name,
)

MODELS = Path(__file__).parents[2] / "models"
HADAMARD = Rotation(apply="folded", order=64, block=64, sign_seed=3)
CARD = Card(
    name="ref-7m-w4a4kv4",
    base_model="org/ref-7m",
    base_revision="0123abc",
    base=BaseMetadata(license="apache-2.0", language=("en", "no")),
    config=LowbitConfig(
        scheme=scheme_from_name("w4a4kv4"),
        rotations=Rotations(
            residual=HADAMARD.model_copy(update={"order": 256, "block": 256}),
            k=Rotation(apply="online", order=64, block=64),
            v=HADAMARD,
            down_input=Rotation(apply="online", order=12, block=768, scaled=True),
            max_tensor_parallel_size=8,
        ),
    ),
    recipe=load_recipe("quarot-gptq"),
    checkpoint_bytes=4_960_000,
    bf16_bytes=13_640_000,
    perplexities=(TextPerplexity("wikitext-2-test.txt", 19961, 512, 36.857, 38.194),),
    calibration=CalibrationText("wikitext-2-train.txt", 128, 512, 0),
    versions={"vllm-lowbit": "0.1.0", "torch": "2.13.0", "transformers": "5.19.0"},
)
NASTY = [
    "a|b",
    "a\n# heading",
    "a\r\n---\nlicense: mit",
    "a: b",
    "- a",
    "'quoted' \"name\"",
    "`code` ```fence```",
    "[link](x) ![image](y)",
    "<script>alert(1)</script> <!-- x",
    "*bold* _it_ ~~gone~~",
    "back\\slash",
    "{{ 7 * 7 }} {% raw %}",
    "$x$ &amp; #tag",
    "\x1b[31m\x00\u202e",
    "\ud800",
    "é – 模型 🙂",
    "no",
    "null",
    "1e3",
    "",
    "$(rm -rf x); `y`",
]


def front_matter(text: str) -> dict[str, Any]:
    found = re.match(r"\A---\n(.*?)\n---\n", text, re.DOTALL)
    assert found is not None
    data: dict[str, Any] = yaml.safe_load(found[1])
    return data


def body(text: str) -> str:
    return text.split("\n---\n", 1)[1]


def structure(text: str) -> list[str]:
    """Block tokens of the Markdown body: what a reader sees as its form."""
    tokens = MarkdownIt("commonmark").enable("table").parse(body(text))
    return [token.type for token in tokens]


def shown(text: str) -> list[str]:
    """Texts of headings, paragraphs and cells as a reader sees them."""
    tokens = MarkdownIt("commonmark").enable("table").parse(body(text))
    return [
        "".join(child.content for child in token.children or [])
        for token in tokens
        if token.type == "inline"
    ]


def commands(text: str) -> list[list[str]]:
    return [shlex.split(line) for line in text.splitlines() if line[:4] == "    "]


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


@pytest.mark.parametrize(
    ("name", "shown_as"),
    [
        ("/home/me/models/ref-7m", "ref-7m"),
        ("/home/me/models/ref-7m/", "ref-7m"),
        ("~/ref-7m", "ref-7m"),
        ("../models/ref-7m", "ref-7m"),
        ("./ref-7m", "ref-7m"),
        ("a/b/ref-7m", "ref-7m"),
        ("C:\\Users\\me\\ref-7m", "ref-7m"),
        ("org/ref-7m", "org/ref-7m"),
        ("ref-7m", "ref-7m"),
    ],
)
def test_no_path_of_this_machine(name: str, shown_as: str) -> None:
    row = replace(CARD.perplexities[0], text="/home/me/test.txt")
    calibration = CalibrationText("/home/me/train.txt", 1, 2, 3)
    text = render_card(
        replace(
            CARD,
            name="/home/me/out",
            base_model=name,
            perplexities=(row,),
            calibration=calibration,
        )
    )
    assert front_matter(text)["base_model"] == shown_as
    assert not re.search(r"/home|Users|\bme\b|models/|b/ref", text)


@pytest.mark.parametrize("name", ["my model", "a--b", "ümlaut", "x" * 200, ".hidden."])
def test_a_name_the_hub_would_refuse_is_left_out(name: str) -> None:
    data = front_matter(render_card(replace(CARD, base_model=name)))
    assert "base_model" not in data
    assert "base_model_relation" not in data


@pytest.mark.parametrize("nasty", NASTY)
def test_odd_names_change_nothing_but_themselves(nasty: str) -> None:
    """Every free text of a card is odd; the card keeps its form."""
    odd = f"x{nasty}x"
    row = replace(CARD.perplexities[0], text=odd)
    plain = replace(CARD, base_model="plain", base=BaseMetadata("a", "b", "c", ("d",)))
    card = replace(
        plain,
        name=odd,
        base_model=odd,
        base_revision=odd,
        base=BaseMetadata(odd, odd, odd, (odd,), odd),
        perplexities=(row,),
        calibration=CalibrationText(odd, 1, 2, 3),
        versions={odd: odd, "torch": "1", "c": "2"},
    )
    text = render_card(card)
    text.encode()
    assert structure(text) == structure(render_card(plain))
    clean = " ".join("".join(c if c.isprintable() else " " for c in odd).split())
    data = front_matter(text)
    assert data["license"] == data["pipeline_tag"] == clean
    assert data["language"] == [clean]
    if "\\" not in odd:  # a path, then
        assert shown(text)[0] == clean
        assert commands(text)[-1][-1] == clean
    assert ModelCard(text).data.license == clean


@settings(max_examples=20)
@given(name=st.text(max_size=30))
def test_any_name(name: str) -> None:
    text = render_card(replace(CARD, name=f"x{name}", base_model=f"x{name}"))
    assert structure(text) == structure(render_card(CARD))
    front_matter(text)


def test_written_bytes_are_reproducible(tmp_path: Path) -> None:
    path = write_card(tmp_path, CARD)
    assert path == tmp_path / "README.md"
    first = path.read_bytes()
    assert b"\r" not in first
    assert first.endswith(b"\n")
    assert b"\n\n\n" not in first
    assert write_card(tmp_path, CARD).read_bytes() == first
    assert first.decode() == render_card(CARD)


class TestBaseMetadata:
    def test_of_the_model_here(self) -> None:
        assert base_metadata(MODELS / "ref-7m") == BaseMetadata(
            license="apache-2.0", language=("en",), pipeline_tag="text-generation"
        )

    def test_everything(self, tmp_path: Path) -> None:
        (tmp_path / "README.md").write_text(
            "\ufeff---\r\nlicense: other\r\nlicense_name: llama3.2\n"
            "license_link: https://x.org/LICENSE\nlanguage:\n- en\n- no\n"
            "pipeline_tag: text-generation\ntags: [a]\nmodel-index:\n"
            "- name: x\n  results:\n  - task: {type: y}\n    metrics:\n"
            "    - type: z\n      value: 1\n---  \r\n# Title\n---\nlicense: mit\n---",
            encoding="utf-8",
        )
        assert base_metadata(tmp_path) == BaseMetadata(
            license="other",
            license_name="llama3.2",
            license_link="https://x.org/LICENSE",
            language=("en", "no"),
            pipeline_tag="text-generation",
        )

    @pytest.mark.parametrize(
        "content",
        [
            "",
            "# Title\n",
            "# Title\n---\nlicense: mit\n---\n",
            "---\nlicense: mit\n",
            "---\n---\n",
            "---\nmit\n---\n",
            "---\n- license\n---\n",
            "---\nlicense: [\n---\n",
            "---\nlicense: mit\nlicense: mit\n---\n",
            "---\nlicense: &a mit\nlanguage: *a\n---\n",
            "---\nlicense: !!python/object:x.y mit\n---\n",
            "---\nlicense: 3\nlanguage: true\npipeline_tag:\n---\n",
            "---\nlicense: ''\nlanguage: [en, 3]\nlicense_name: {a: b}\n---\n",
            "---\nlanguage: []\nlicense_link: [a]\n---\n",
            "---\nlicense: \x00\n---\n",
            b"---\nlicense: \xff\n---\n",
            "---\n" + "[" * 60000 + "\n---\n",
            "---\n" + "a" * (1 << 20) + "\n---\n",
        ],
    )
    def test_malformed_says_nothing(
        self, tmp_path: Path, content: str | bytes, recwarn: pytest.WarningsRecorder
    ) -> None:
        data = content.encode() if isinstance(content, str) else content
        (tmp_path / "README.md").write_bytes(data)
        assert base_metadata(tmp_path) == BaseMetadata()
        assert not recwarn.list

    def test_no_file(self, tmp_path: Path) -> None:
        assert base_metadata(tmp_path) == BaseMetadata()
        assert base_metadata(tmp_path / "missing") == BaseMetadata()
        (tmp_path / "README.md").mkdir()
        assert base_metadata(tmp_path) == BaseMetadata()

    @given(content=st.binary(max_size=100) | st.text(max_size=60).map(str.encode))
    def test_any_front_matter(
        self, tmp_path_factory: pytest.TempPathFactory, content: bytes
    ) -> None:
        directory = tmp_path_factory.getbasetemp() / "base"
        directory.mkdir(exist_ok=True)
        (directory / "README.md").write_bytes(b"---\n" + content + b"\n---\n")
        base_metadata(directory)

    def test_a_card_is_metadata_again(self, tmp_path: Path) -> None:
        write_card(tmp_path, CARD)
        assert base_metadata(tmp_path) == CARD.base
