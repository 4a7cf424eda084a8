# SPDX-License-Identifier: Apache-2.0
"""What is taken from transformers: a checkpoint's config, and its rotary embedding."""

from pathlib import Path

from transformers import CONFIG_MAPPING, PreTrainedConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from ..architecture import ModelShape

# The computation is one for all supported architectures; what they have of their own
# is in the config.
RotaryEmbedding = LlamaRotaryEmbedding


def model_config(directory: Path | str, shape: ModelShape) -> PreTrainedConfig:
    """config.json of a model, with what its architecture takes for missing keys.

    Args:
        directory: of the checkpoint.
        shape: its sizes.
    """
    return CONFIG_MAPPING[shape.architecture.model_type].from_pretrained(directory)
