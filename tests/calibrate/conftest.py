# SPDX-License-Identifier: Apache-2.0
"""One small decoder layer, without a checkpoint around it."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import LlamaConfig

from vllm_lowbit.architecture import ModelShape
from vllm_lowbit.calibrate.layer import LayerModels, QuantizedLayer
from vllm_lowbit.calibrate.quantize import round_to_nearest
from vllm_lowbit.calibrate.stages import DecoderStages, Online, linears_of
from vllm_lowbit.kernels.grid import IntGrid
from vllm_lowbit.schema import Weights

SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 50,
}


CONFIG = LlamaConfig(architectures=["LlamaForCausalLM"], **SIZES)
SHAPE = ModelShape.from_config(CONFIG.to_dict(), "config.json")
LINEARS = linears_of(SHAPE)


def _models(activations: IntGrid | None = None, kv4: bool = False) -> LayerModels:
    served = DecoderStages(CONFIG, SHAPE, Online(activations, kv4))
    return LayerModels(served, DecoderStages(CONFIG, SHAPE))


def _layer_tensors(seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    sizes = {"q": (64, 64), "k": (32, 64), "v": (32, 64), "o": (64, 64)}
    sizes |= {"gate": (96, 64), "up": (96, 64), "down": (64, 96)}
    tensors = {}
    for name in LINEARS:
        n, k = sizes[name.split(".")[1].removesuffix("_proj")]
        tensors[f"{name}.weight"] = torch.randn(n, k, generator=generator) * k**-0.5
    for norm in ("input_layernorm.weight", "post_attention_layernorm.weight"):
        tensors[norm] = torch.rand(64, generator=generator) + 0.5
    return tensors


def _rounded_layer(
    tensors: dict[str, torch.Tensor], weights: Weights
) -> QuantizedLayer:
    linears = {
        name: round_to_nearest(tensors[f"{name}.weight"], weights) for name in LINEARS
    }
    floats = {n: t.bfloat16() for n, t in tensors.items() if t.dim() == 1}
    return QuantizedLayer(linears, floats)


@pytest.fixture(scope="module", autouse=True)
def text(short_default_text: None) -> None:
    """For every test here, unless its file says otherwise."""


@pytest.fixture(scope="session")
def models() -> Callable[..., LayerModels]:
    """``models(activations=None, kv4=False)``: a layer's stages, served and float."""
    return _models


@pytest.fixture(scope="session")
def layer_tensors() -> Callable[..., dict[str, torch.Tensor]]:
    """``layer_tensors(seed=0)``: float32 tensors of that layer."""
    return _layer_tensors


@pytest.fixture(scope="session")
def rounded_layer() -> Callable[..., QuantizedLayer]:
    """``rounded_layer(tensors, weights)``: rounded to nearest, norms in bfloat16."""
    return _rounded_layer
