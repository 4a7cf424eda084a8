# SPDX-License-Identifier: Apache-2.0
"""Rows of the embedding and the head."""

import inspect
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from vllm_lowbit.vocabulary import EmbeddingMethod

from .rows import holds, members


@holds("UnquantizedEmbeddingMethod")
def _(symbol: Any, real: Any) -> None:
    members(symbol, {"create_weights", "embedding", "tie_weights"})
    asked = "vllm.model_executor.layers.quantization.base_config"
    assert real.resolve(f"{asked}.method_has_implemented_embedding")(EmbeddingMethod)


def vocabulary(real: Any) -> Any:
    """A head of 100 tokens, quantized to 8 bits while loading."""
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

    quant, model = type(real.quant), real.config.model_config
    config = quant.from_config_dict_json('{"vocab_bits": 8}')
    config.maybe_update_config(model.model, model.hf_config)
    return ParallelLMHead(100, 256, None, quant_config=config, disable_tp=True)


@holds("VocabParallelEmbedding")
def _(symbol: Any, real: Any) -> None:
    layer = vocabulary(real)
    assert isinstance(layer, symbol)
    assert layer.params_dtype == torch.get_default_dtype()
    # Without a name in Llama: our errors give it one.
    llama = real.resolve("vllm.model_executor.models.llama.LlamaModel")
    built = inspect.getsource(llama).partition("= VocabParallelEmbedding(")[2]
    assert "prefix" not in built.partition(")")[0]


@holds("VocabParallelEmbeddingShardIndices")
def _(symbol: Any, real: Any) -> None:
    assert vocabulary(real).shard_indices.num_org_elements == 100


@holds("weight_loader")
def _(symbol: Any, real: Any) -> None:
    parameter: Any = torch.nn.Parameter(torch.full((128, 2), torch.nan), False)
    parameter.output_dim = 0
    symbol(vocabulary(real), parameter, torch.ones(100, 2))
    assert (parameter[:100] == 1).all() and (parameter[100:] == 0).all()


@holds("_apply_head")
def _(symbol: Any, real: Any) -> None:
    x, layer = torch.ones(1, 2), SimpleNamespace(weight=torch.ones(3, 2))
    layer.quant_method = SimpleNamespace(apply=lambda layer, x, bias: "asked")
    same, other = (
        SimpleNamespace(head_dtype=t) for t in (torch.float32, torch.float64)
    )
    assert symbol(same, layer, x, None) == "asked"
    with pytest.raises(ValueError, match="only supported for an unquantized lm_head"):
        symbol(other, layer, x, None)
    layer.quant_method = object.__new__(EmbeddingMethod)
    assert symbol(other, layer, x, None).dtype == torch.float64  # not asked


@holds("checkpoint_has_lm_head")
def _(symbol: Any, real: Any) -> None:
    for name, own in (("lm_head.input_scale", False), ("lm_head.weight", True)):
        with tempfile.TemporaryDirectory() as directory:
            save_file({name: torch.ones(2)}, Path(directory) / "model.safetensors")
            assert bool(symbol(directory)) is own
