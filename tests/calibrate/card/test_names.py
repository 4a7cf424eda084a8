# SPDX-License-Identifier: Apache-2.0
"""Model cards are proof against odd names, and hold no path of a machine."""

import re
from dataclasses import replace

import pytest
from huggingface_hub import ModelCard
from hypothesis import given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from vllm_lowbit.calibrate.base_card import BaseMetadata
from vllm_lowbit.calibrate.card import CalibrationText, render_card

from .cards import CARD, body, commands, front_matter, shown

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


def structure(text: str) -> list[str]:
    """Block tokens of the Markdown body: what a reader sees as its form."""
    tokens = MarkdownIt("commonmark").enable("table").parse(body(text))
    return [token.type for token in tokens]


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
