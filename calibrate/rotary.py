# SPDX-License-Identifier: Apache-2.0
"""What is taken from transformers: a checkpoint's config, and its rotary embedding."""

import copy
from pathlib import Path

import torch
from transformers import CONFIG_MAPPING, PreTrainedConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from ..architecture import ModelShape
from ..rope_config import LAYER_TYPES


class RotaryEmbedding(torch.nn.Module):
    """RoPE of every layer of a model.

    The computation is one for all supported architectures; what they have of their own
    is in the config.

    Args:
        config: of the model.
        shape: its sizes.
    """

    def __init__(self, config: PreTrainedConfig, shape: ModelShape) -> None:
        super().__init__()
        if not shape.architecture.rope_by_type:
            of_type = dict.fromkeys(LAYER_TYPES, LlamaRotaryEmbedding(config))
        else:
            of_type = {kind: _of_type(config, kind) for kind in LAYER_TYPES}
        self.of_type = torch.nn.ModuleDict(of_type)
        self.shape = shape

    def forward(
        self, x: torch.Tensor, positions: torch.Tensor, layer: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines and sines ``[windows, tokens, head_dim]`` in the dtype of x.

        Args:
            x: any tensor.
            positions: int64 ``[windows, tokens]``.
            layer: index of the layer.
        """
        cos, sin = self.of_type[self.shape.layer_type(layer)](x, positions)
        return cos, sin


def _of_type(config: PreTrainedConfig, kind: str) -> LlamaRotaryEmbedding:
    own = copy.deepcopy(config)
    own.rope_parameters = config.rope_parameters[kind]
    return LlamaRotaryEmbedding(own)


def norm_eps(config: PreTrainedConfig, shape: ModelShape) -> float:
    """What every norm of a model adds to the variance."""
    given = shape.architecture.norm_eps
    return float(getattr(config, given) if isinstance(given, str) else given)


def model_config(directory: Path | str, shape: ModelShape) -> PreTrainedConfig:
    """config.json of a model, with what its architecture takes for missing keys.

    Args:
        directory: of the checkpoint.
        shape: its sizes.
    """
    return CONFIG_MAPPING[shape.architecture.model_type].from_pretrained(directory)
