# SPDX-License-Identifier: Apache-2.0
"""Keys of config.json for each architecture, and small models of them."""

from typing import Any

from vllm_lowbit.architecture import ModelShape

MISTRAL = {"architectures": ["MistralForCausalLM"]}
QWEN2 = {"architectures": ["Qwen2ForCausalLM"]}
QWEN3 = {"architectures": ["Qwen3ForCausalLM"]}
PHI3 = {"architectures": ["Phi3ForCausalLM"]}
MIXTRAL = {"architectures": ["MixtralForCausalLM"], "num_local_experts": 4}
QWEN3_MOE = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "num_experts": 6,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 96,
}
GEMMA2: dict[str, Any] = {"architectures": ["Gemma2ForCausalLM"]}
GEMMA3: dict[str, Any] = {"architectures": ["Gemma3ForCausalLM"]}
OPT: dict[str, Any] = {
    "architectures": ["OPTForCausalLM"],
    "ffn_dim": 768,
    "num_key_value_heads": 4,
}
GPT2: dict[str, Any] = {
    "architectures": ["GPT2LMHeadModel"],
    "n_embd": 256,
    "n_layer": 2,
    "n_head": 4,
    "hidden_size": None,
    "num_hidden_layers": None,
    "num_attention_heads": None,
    "num_key_value_heads": None,
}
FULL, SLIDING = "full_attention", "sliding_attention"
SIZES = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "vocab_size",
)


def config(**keys: Any) -> dict[str, Any]:
    """A small Llama's config.json, with keys replaced; None removes one."""
    base = {
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": 256,
        "intermediate_size": 768,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 1000,
    }
    return {k: v for k, v in {**base, **keys}.items() if v is not None}


def shape(hidden: int, intermediate: int, heads: int, **keys: Any) -> ModelShape:
    sizes = {
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
    }
    return ModelShape.from_config(config(**{**sizes, **keys}), "config.json")
