# SPDX-License-Identifier: Apache-2.0
"""The files of a checkpoint that are not tensors: config, recipe, tokenizer, card."""

import json
import math
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ..lowbit_checkpoint import RECIPE
from ..schema import LowbitConfig
from .base_card import base_metadata
from .card import CalibrationText, Card, TextPerplexity, write_card
from .plan import served_shape
from .recipe import Recipe
from .source import Source
from .writer import CheckpointWriter

PACKAGES = ("vllm-lowbit", "torch", "transformers")


@dataclass(frozen=True)
class Losses:
    """Mean cross-entropy per token, in nats, of the float and the quantized model."""

    plain: float
    quantized: float


@dataclass(frozen=True)
class Report:
    """What a calibration made.

    Attributes:
        config: of the checkpoint.
        calibration: losses on the windows that were calibrated on.
        held_out: losses on other windows of the same text.
        held_out_tokens: predicted tokens of those.
        untouched_experts: that no calibration token went through; their weights are
            rounded to nearest.
        residual_is_replaced: see :func:`.plan.residual_is_replaced`.
    """

    config: LowbitConfig
    calibration: Losses
    held_out: Losses
    held_out_tokens: int
    untouched_experts: int = 0
    residual_is_replaced: bool = False


def publish(
    writer: CheckpointWriter, source: Source, recipe: Recipe, text: Path, report: Report
) -> None:
    """Write everything beside the tensors, and put the checkpoint in place."""
    writer.copy_companions(source.directory)
    writer.write_text(RECIPE, recipe.text())
    data = recipe.data
    measured = TextPerplexity(
        text=f"{text.name}, windows not calibrated on",
        tokens=report.held_out_tokens,
        seq_len=data.seq_len,
        base=math.exp(report.held_out.plain),
        quantized=math.exp(report.held_out.quantized),
    )
    card = Card(
        name=writer.directory.name,
        base_model=source.name,
        base_revision=source.revision,
        base=base_metadata(source.directory),
        config=report.config,
        recipe=recipe,
        checkpoint_bytes=writer.tensor_bytes,
        bf16_bytes=2 * sum(math.prod(size) for size in source.shape.tensors().values()),
        perplexities=(measured,),
        calibration=CalibrationText(text.name, data.samples, data.seq_len, recipe.seed),
        versions={package: version(package) for package in PACKAGES},
        untied=_is_untied(source, report.config),
        up_scaled=source.shape.architecture.passes_up_scale,
    )
    write_card(writer.staging, card)
    writer.commit(_model_config(source, report.config))


def _is_untied(source: Source, config: LowbitConfig) -> bool:
    return served_shape(source.shape, config) != source.shape


def _model_config(source: Source, config: LowbitConfig) -> dict[str, Any]:
    """config.json of the base model with the quantization in it."""
    text = (source.directory / "config.json").read_text(encoding="utf-8")
    model: dict[str, Any] = json.loads(text)
    if _is_untied(source, config):
        model["tie_word_embeddings"] = False
    quantization = config.model_dump(mode="json", exclude_none=True)
    return model | {"quantization_config": quantization}
