# SPDX-License-Identifier: Apache-2.0
"""What is read from config.json, as transformers reads it, and its tensors."""

from typing import Any

import pytest

from vllm_lowbit.architecture import ModelShape
from vllm_lowbit.supported_models import ARCHITECTURES

from .configs import (
    FULL,
    GEMMA2,
    GEMMA3,
    GPT2,
    MISTRAL,
    MIXTRAL,
    OPT,
    PHI3,
    QWEN2,
    QWEN3,
    QWEN3_MOE,
    SLIDING,
    config,
)

QKV = {"self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"}


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({}, {"num_kv_heads": 2, "head_dim": 64}),
        ({"num_key_value_heads": None}, {"num_kv_heads": 4}),
        ({"num_key_value_heads": 4}, {"num_kv_heads": 4}),
        ({"num_key_value_heads": 1}, {"num_kv_heads": 1}),
        ({"head_dim": 128}, {"head_dim": 128, "hidden_size": 256, "num_heads": 4}),
        ({"attention_bias": True}, {"biases": QKV | {"self_attn.o_proj"}}),
        (
            {"mlp_bias": True},
            {"biases": {"mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"}},
        ),
        ({"tie_word_embeddings": True}, {"tie_word_embeddings": True}),
        ({**QWEN2}, {"biases": QKV, "sliding_window": None}),
        ({**QWEN2, "sliding_window": 64}, {"sliding_window": None}),
        ({**MISTRAL, "sliding_window": 64}, {"sliding_window": 64, "biases": set()}),
        ({**QWEN3, "head_dim": 32}, {"head_dim": 32, "biases": set()}),
        (MIXTRAL, {"num_experts": 4, "experts_per_token": 2, "renormalize": True}),
        (
            {**MIXTRAL, "num_experts_per_tok": 3, "head_dim": None},
            {"experts_per_token": 3, "head_dim": 64},
        ),
        (
            GEMMA2,
            {
                "head_dim": 256,
                "tie_word_embeddings": True,
                "sliding_window": 4096,
                "full_layers": {1},
                "query_scalar": 256,
                "attention_cap": 50.0,
                "logits_cap": 30.0,
                "attention_scale": 1 / 16,
            },
        ),
        (
            {
                **GEMMA2,
                "layer_types": [FULL, SLIDING],
                "query_pre_attn_scalar": 144,
                "attn_logit_softcapping": 20,
            },
            {"full_layers": {0}, "attention_scale": 1 / 12, "attention_cap": 20},
        ),
        (
            {**GEMMA3, "sliding_window_pattern": 2, "final_logit_softcapping": 30},
            {"full_layers": {1}, "attention_cap": None, "logits_cap": 30},
        ),
        (GEMMA3, {"full_layers": set(), "sliding_window": 4096, "logits_cap": None}),
        ({"query_pre_attn_scalar": 9}, {"attention_scale": 1 / 8}),
        (
            OPT,
            {
                "positions": 2050,
                "tie_word_embeddings": True,
                "biases": {*QKV, "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj"},
            },
        ),
        ({**OPT, "max_position_embeddings": 30}, {"positions": 32, "num_kv_heads": 4}),
        (
            {**GPT2, "n_inner": 768},
            {"positions": 1024, "tie_word_embeddings": True, "num_kv_heads": 4},
        ),
    ],
)
def test_shape(keys: dict[str, Any], expected: dict[str, Any]) -> None:
    found = ModelShape.from_config(config(**keys), "config.json")
    for name, value in expected.items():
        assert getattr(found, name) == value
    assert (found.intermediate_size, found.num_layers) == (768, 2)
    assert found.vocab_size == 1000


NOT_NULL = {  # transformers' config class, or what reads it, refuses these
    ("MistralForCausalLM", "num_key_value_heads"),
    ("Qwen3ForCausalLM", "head_dim"),
    ("Phi3ForCausalLM", "head_dim"),
    ("MixtralForCausalLM", "num_key_value_heads"),
    ("Qwen3MoeForCausalLM", "num_key_value_heads"),
    ("OPTForCausalLM", "max_position_embeddings"),
    ("OPTForCausalLM", "tie_word_embeddings"),
    ("GPT2LMHeadModel", "n_positions"),
    ("GPT2LMHeadModel", "tie_word_embeddings"),
    *(
        (f"Gemma{version}ForCausalLM", key)
        for version in (2, 3)
        for key in (
            "num_key_value_heads",
            "head_dim",
            "sliding_window",
            "sliding_window_pattern",
            "query_pre_attn_scalar",
            "tie_word_embeddings",
        )
    ),
}
OF_EXPERTS = {c["architectures"][0]: c for c in (MIXTRAL, QWEN3_MOE)}
LEFT_OUT = ("num_key_value_heads", "head_dim", "sliding_window")
OF = {
    "Gem": (
        "sliding_window_pattern",
        "tie_word_embeddings",
        "layer_types",
        "query_pre_attn_scalar",
        "attn_logit_softcapping",
        "final_logit_softcapping",
    ),
    "OPT": ("max_position_embeddings", "tie_word_embeddings", "word_embed_proj_dim"),
    "GPT": ("n_positions", "n_inner", "tie_word_embeddings"),
}


@pytest.mark.parametrize(
    ("name", "dropped", "how"),
    [
        (name, dropped, how)
        for name in ARCHITECTURES
        for dropped in (*LEFT_OUT, *OF.get(name[:3], ()))
        for how in ("missing", "null")
        if how == "missing" or (name, dropped) not in NOT_NULL
    ],
)
def test_keys_left_out_mean_what_they_mean_to_transformers(
    name: str, dropped: str, how: str
) -> None:
    """Whether config.json or transformers' config is read."""
    transformers = pytest.importorskip("transformers")
    keys = {**config(), "num_attention_heads": 32, "hidden_size": 1024}
    if name != "Qwen2ForCausalLM":
        keys["head_dim"] = 64
    keys["architectures"] = [name]
    keys |= OF_EXPERTS.get(name, {})
    if name == "OPTForCausalLM":
        keys |= {"ffn_dim": 768, "num_key_value_heads": 32, "head_dim": 32}
    if name == "GPT2LMHeadModel":
        sizes = {"n_embd": 1024, "n_layer": 2, "n_head": 32, "n_inner": 768}
        keys = {"architectures": [name], "vocab_size": 1000, "n_positions": 64, **sizes}
    keys.pop(dropped, None)
    if how == "null":
        keys[dropped] = None
    config_class = getattr(transformers, name).config_class
    expected = ModelShape.from_config(config_class(**keys).to_dict(), "config.json")
    assert ModelShape.from_config(keys, "config.json") == expected


@pytest.mark.parametrize("count", ["num_experts", "num_local_experts"])
def test_experts_of_qwen3(count: str) -> None:
    """transformers writes the number under another name than the model's makers."""
    keys = {**QWEN3_MOE, "num_experts_per_tok": 2, "norm_topk_prob": True}
    keys[count] = keys.pop("num_experts")
    found = ModelShape.from_config(config(**keys), "config.json")
    assert (found.num_experts, found.experts_per_token, found.renormalize) == (6, 2, 1)
    assert found.intermediate_size == 96
    plain = ModelShape.from_config(config(**{**keys, "norm_topk_prob": None}), "x")
    assert not plain.renormalize


def _in_files(model: Any, config: Any) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor; each expert has its own in files."""
    found = {}
    of_mlp = {"MixtralForCausalLM": ("block_sparse_moe", "w1", "w3", "w2")}
    usual = ("mlp", "gate_proj", "up_proj", "down_proj")
    mlp, gate, up, down = of_mlp.get(config.architectures[0], usual)
    for name, tensor in model.state_dict().items():
        block, experts, part = name.partition(".experts.")
        if not experts:
            found[name.replace(".mlp.", f".{mlp}.")] = tuple(tensor.shape)
            continue
        n, k = tensor.shape[1:]
        block = block.replace(".mlp", f".{mlp}")
        shapes = {down: (n, k)}
        if part == "gate_up_proj":
            shapes = {gate: (n // 2, k), up: (n // 2, k)}
        for expert in range(len(tensor)):
            for linear, size in shapes.items():
                found[f"{block}.experts.{expert}.{linear}.weight"] = size
    return found


@pytest.mark.parametrize(
    "keys",
    [
        {},
        {"num_key_value_heads": 4},
        {"num_key_value_heads": 1},
        {"head_dim": 128},
        {"attention_bias": True},
        {"mlp_bias": True, "num_hidden_layers": 1},
        {"tie_word_embeddings": True},
        MISTRAL,
        QWEN2,
        {**QWEN2, "tie_word_embeddings": True, "num_key_value_heads": 1},
        QWEN3,
        {**QWEN3, "head_dim": 32, "tie_word_embeddings": True},
        {**PHI3, "pad_token_id": None},
        {**PHI3, "pad_token_id": None, "num_key_value_heads": 1, "head_dim": 32},
        MIXTRAL,
        QWEN3_MOE,
        {**QWEN3_MOE, "tie_word_embeddings": True, "head_dim": 32},
        {**GEMMA2, "tie_word_embeddings": True, "attention_bias": True},
        {**GEMMA3, "tie_word_embeddings": False},
        {**OPT, "tie_word_embeddings": True},
        {**OPT, "tie_word_embeddings": False, "max_position_embeddings": 30},
        {**GPT2, "tie_word_embeddings": True, "n_positions": 40},
        {**GPT2, "tie_word_embeddings": False, "n_inner": 96},
    ],
)
def test_tensors_are_those_of_transformers(keys: dict[str, Any]) -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    keys = config(**keys) | {k: v for k, v in keys.items() if k == "pad_token_id"}
    model_class = getattr(transformers, keys["architectures"][0])
    hf_config = model_class.config_class(**keys)
    with torch.device("meta"):
        model = model_class(hf_config)
    expected = _in_files(model, hf_config)
    if keys.get("tie_word_embeddings"):
        assert model.lm_head.weight is model.get_input_embeddings().weight
        del expected["lm_head.weight"]
    read = ModelShape.from_config(hf_config.to_dict(), "config.json")
    assert read.plain_tensors() == expected
