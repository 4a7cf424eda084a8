# SPDX-License-Identifier: Apache-2.0
"""A model card, and what is read from its text."""

import re
import shlex
from typing import Any

import yaml
from markdown_it import MarkdownIt

from vllm_lowbit.calibrate.base_card import BaseMetadata
from vllm_lowbit.calibrate.card import CalibrationText, Card, TextPerplexity
from vllm_lowbit.calibrate.recipe import load_recipe
from vllm_lowbit.schema import LowbitConfig, Rotation, Rotations, scheme_from_name

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


def front_matter(text: str) -> dict[str, Any]:
    found = re.match(r"\A---\n(.*?)\n---\n", text, re.DOTALL)
    assert found is not None
    data: dict[str, Any] = yaml.safe_load(found[1])
    return data


def body(text: str) -> str:
    return text.split("\n---\n", 1)[1]


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
