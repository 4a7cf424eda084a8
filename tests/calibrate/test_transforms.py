# SPDX-License-Identifier: Apache-2.0
"""Every fold is exact in float64: same logits with quantizers off."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig

from vllm_lowbit.architecture import POSITIONS, ModelShape
from vllm_lowbit.calibrate.elementwise import embedding_scale, soft_capped
from vllm_lowbit.calibrate.rotations import (
    Dense,
    Orthogonal,
    SignedHadamard,
    of_stream,
)
from vllm_lowbit.calibrate.stages import RESIDUAL_STAGES, DecoderStages, Online
from vllm_lowbit.calibrate.transforms import (
    LayerTransforms,
    fold_embedding,
    fold_head,
    fold_layer,
    folded_norm,
    gain,
    scale_shapes,
)
from vllm_lowbit.kernels.hadamard.matrices import largest_order
from vllm_lowbit.kernels.hadamard.signs import random_signs

MODELS = Path(__file__).parents[2] / "models"
TOKENS = 24
GEMMA: dict[str, Any] = {
    "tie_word_embeddings": True,
    "sliding_window": 7,
    "query_pre_attn_scalar": 48,
    "attn_logit_softcapping": 3.0,
    "final_logit_softcapping": 5.0,
}
GEMMA3: dict[str, Any] = {
    "tie_word_embeddings": True,
    "query_pre_attn_scalar": 48,
    "sliding_window": 7,
    "layer_types": ["sliding_attention", "full_attention"],
    "rope_parameters": {
        "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
        "full_attention": {
            "rope_type": "linear",
            "rope_theta": 50000.0,
            "factor": 4.0,
        },
    },
}
SHAPES: dict[str, dict[str, Any]] = {
    "gqa": {},
    "mha": {"num_key_value_heads": 4},
    "mqa": {"num_key_value_heads": 1},
    "tied": {"tie_word_embeddings": True},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "wide heads": {"head_dim": 80},
    "narrow heads, tied, biases": {
        "head_dim": 12,
        "tie_word_embeddings": True,
        "attention_bias": True,
        "mlp_bias": True,
    },
    "hidden 12 x 16, MLP 20 x 8": {"hidden_size": 192, "intermediate_size": 160},
    "llama 3 rope": {
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 500000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 128,
        }
    },
    "mistral": {"architecture": "MistralForCausalLM", "sliding_window": 7},
    "mistral, no window": {
        "architecture": "MistralForCausalLM",
        "sliding_window": None,
        "num_key_value_heads": 1,
    },
    "qwen2": {"architecture": "Qwen2ForCausalLM", "hidden_size": 256},
    "qwen2, tied, yarn": {
        "architecture": "Qwen2ForCausalLM",
        "hidden_size": 256,
        "num_key_value_heads": 1,
        "tie_word_embeddings": True,
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 1e6,
            "factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    },
    "phi3": {"architecture": "Phi3ForCausalLM", "sliding_window": 9},
    "qwen3": {"architecture": "Qwen3ForCausalLM"},
    "qwen3, tied, narrow heads": {
        "architecture": "Qwen3ForCausalLM",
        "head_dim": 12,
        "num_key_value_heads": 4,
        "tie_word_embeddings": True,
    },
    "gemma2": {"architecture": "Gemma2ForCausalLM", **GEMMA},
    "gemma2, one kv head, biases, no caps": {
        "architecture": "Gemma2ForCausalLM",
        **GEMMA,
        "head_dim": 12,
        "num_key_value_heads": 1,
        "attention_bias": True,
        "attn_logit_softcapping": None,
        "final_logit_softcapping": None,
        "layer_types": ["full_attention", "sliding_attention"],
    },
    "gemma3": {"architecture": "Gemma3ForCausalLM", **GEMMA3},
    "gemma3, untied, a cap": {
        "architecture": "Gemma3ForCausalLM",
        **GEMMA3,
        "tie_word_embeddings": False,
        "num_key_value_heads": 1,
        "head_dim": 12,
        "final_logit_softcapping": 5.0,
    },
    "opt": {"architecture": "OPTForCausalLM", "hidden_size": 192},
    "opt, tied": {"architecture": "OPTForCausalLM", "tie_word_embeddings": True},
    "gpt2": {"architecture": "GPT2LMHeadModel", "tie_word_embeddings": True},
    "gpt2, untied": {"architecture": "GPT2LMHeadModel", "hidden_size": 192},
    "mixtral": {"architecture": "MixtralForCausalLM", "num_local_experts": 4},
    "qwen3 moe": {
        "architecture": "Qwen3MoeForCausalLM",
        "num_experts": 5,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 96,
    },
    "qwen3 moe, tied, renormalized": {
        "architecture": "Qwen3MoeForCausalLM",
        "num_experts": 4,
        "num_experts_per_tok": 4,
        "moe_intermediate_size": 80,
        "norm_topk_prob": True,
        "tie_word_embeddings": True,
    },
}


def _random(generator: torch.Generator) -> Callable[..., torch.Tensor]:
    return lambda *size: torch.randn(size, dtype=torch.float64, generator=generator)


def _orthogonal(random: Callable[..., torch.Tensor], blocks: int, size: int) -> Dense:
    q, _ = torch.linalg.qr(random(blocks, size, size))
    return Dense(q)


def _all_of(shape: ModelShape, random: Callable[..., torch.Tensor]) -> LayerTransforms:
    """Every transform there is, random, the scales spread over a factor of 20."""
    kv = shape.num_kv_heads
    shifted = {"self_attn.v_proj", "self_attn.o_proj"} <= shape.biases
    scales: dict[str, Any] = {
        name: random(*size).mul(0.75).exp()
        for name, size in scale_shapes(shape).items()
    }
    return LayerTransforms(
        **scales,
        value=_orthogonal(random, kv, shape.head_dim),
        value_shift=random(kv * shape.head_dim) if shifted else None,
        down=SignedHadamard(largest_order(shape.intermediate_size)),
        attn_input=SignedHadamard(largest_order(shape.hidden_size)),
        mlp_input=SignedHadamard(2),
    )


class _Model:
    """A float64 model from a state dict, folded with what is given."""

    def __init__(
        self, config: PreTrainedConfig, state: dict[str, torch.Tensor]
    ) -> None:
        self.config = config
        self.shape = ModelShape.from_config(config.to_dict(), "x")
        self.state = state

    def logits(
        self,
        ids: torch.Tensor,
        residual: Orthogonal | None,
        per_layer: Callable[[], LayerTransforms],
        key: Orthogonal,
    ) -> torch.Tensor:
        embedding = self.state["model.embed_tokens.weight"]
        head = self.state.get("lm_head.weight", embedding)
        x = fold_embedding(embedding, residual)[ids].unsqueeze(0)
        x = x * embedding_scale(self.shape, torch.float64)
        if self.shape.positions:
            positions = fold_embedding(self.state[POSITIONS], residual)
            first = self.shape.architecture.position_rows
            x = x + positions[first : first + len(ids)]
        for index in range(self.shape.num_layers):
            prefix = f"model.layers.{index}."
            tensors = {
                name.removeprefix(prefix): tensor
                for name, tensor in self.state.items()
                if name.startswith(prefix)
            }
            transforms = per_layer()
            online = Online(
                key=key,
                down=transforms.down,
                attn_input=transforms.attn_input,
                mlp_input=transforms.mlp_input,
            )
            stages = DecoderStages(self.config, self.shape, online).at(index)
            weights = fold_layer(tensors, self.shape, residual, transforms)
            assert weights.keys() == tensors.keys()
            assert all(weights[k].shape == tensors[k].shape for k in tensors)
            for stage in RESIDUAL_STAGES:
                x = stages.update(stage, weights, x)
        norm, bias = self.state["model.norm.weight"], self.state.get("model.norm.bias")
        if residual is None:
            logits = stages.norm(x, norm, bias) @ head.t()
        else:
            folded = fold_head(head, gain(norm, self.shape), bias, residual)
            logits = stages.norm(x, *folded_norm(norm, self.shape)) @ folded.t()
        return soft_capped(logits[0], self.shape.logits_cap)


def _check(directory: Path, seed: int) -> None:
    config = AutoConfig.from_pretrained(directory)
    state = load_file(directory / "model.safetensors")
    state = {name: tensor.double() for name, tensor in state.items()}
    # Grouped GEMMs have no float64, and other attention no soft cap.
    model = AutoModelForCausalLM.from_pretrained(
        directory,
        dtype=torch.float64,
        experts_implementation="eager",
        attn_implementation="eager",
    )
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(config.vocab_size, (TOKENS,), generator=generator)
    with torch.no_grad():
        expected = model(ids.unsqueeze(0)).logits[0]

    shape = ModelShape.from_config(config.to_dict(), "x")
    of = {name: shape.in_plain(name) for name in shape.tensors()}
    parts = {
        name: (state[f].t() if shape.is_transposed(name) else state[f])[rows]
        for name, (f, rows) in of.items()
    }
    ours, random = _Model(config, parts), _random(generator)
    dense = of_stream(_orthogonal(random, 1, shape.hidden_size), shape)
    order = largest_order(shape.hidden_size)
    signs = random_signs(seed, shape.hidden_size)
    signed = of_stream(SignedHadamard(order, signs), shape)
    head = SignedHadamard(shape.head_dim)
    passes = not shape.architecture.output_norms
    for residual in (dense, signed) if passes else (None, None):
        logits = ours.logits(ids, residual, lambda: _all_of(shape, random), head)
        assert (logits - expected).norm() < 1e-6 * expected.norm()


@pytest.mark.parametrize("name", SHAPES)
def test_random_models(
    tiny_model: Callable[..., Path],
    rewrite: Callable[..., Path],
    tmp_path: Path,
    name: str,
) -> None:
    directory = tiny_model(tmp_path, dtype="float32", **SHAPES[name])
    generator = torch.Generator().manual_seed(1)

    def spread(state: dict[str, torch.Tensor]) -> None:
        for tensor_name, tensor in state.items():
            if tensor.dim() == 1:  # norms are all 1 and biases 0 in a new model
                tensor.add_(torch.rand(tensor.shape, generator=generator))
            else:
                tensor.mul_(20 if "embed" in tensor_name else 2)

    rewrite(directory, spread)
    _check(directory, seed=7)


@pytest.mark.parametrize("model", ["ref-7m", "ref-7m-outliers"])
def test_trained_models(model: str) -> None:
    _check(MODELS / model, seed=3)
