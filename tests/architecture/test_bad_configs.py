# SPDX-License-Identifier: Apache-2.0
"""A config.json that is not supported: the key and its value are named."""

import pytest

from vllm_lowbit.architecture import MAX_EXPERTS, MAX_LAYERS, MAX_SIZE, ModelShape
from vllm_lowbit.errors import UnsupportedError

from .configs import FULL, GEMMA2, MIXTRAL, SIZES, SLIDING, config


@pytest.mark.parametrize(
    "architectures",
    [
        None,
        [],
        ["GPTNeoForCausalLM"],
        ["LlamaForSequenceClassification"],
        ["Qwen2ForCausalLM", "LlamaForCausalLM"],
        ["Qwen2MoeForCausalLM"],
        "LlamaForCausalLM",
        5,
        True,
        [["LlamaForCausalLM"]],
        {"LlamaForCausalLM": 1},
    ],
)
def test_other_architectures(architectures: object) -> None:
    with pytest.raises(UnsupportedError) as error:
        ModelShape.from_config(config(architectures=architectures), "m/config.json")
    assert str(error.value) == (
        f"m/config.json: architectures {architectures!r} is not supported; "
        "supported: LlamaForCausalLM, MistralForCausalLM, Qwen2ForCausalLM, "
        "Qwen3ForCausalLM, Phi3ForCausalLM, MixtralForCausalLM, Qwen3MoeForCausalLM, "
        "Gemma2ForCausalLM, Gemma3ForCausalLM, OPTForCausalLM, GPT2LMHeadModel"
    )


@pytest.mark.parametrize(
    ("key", "value", "largest"),
    [
        ("num_local_experts", 0, MAX_EXPERTS // 2),
        ("num_local_experts", MAX_EXPERTS, MAX_EXPERTS // 2),
        ("num_local_experts", None, MAX_EXPERTS // 2),
        ("num_local_experts", True, MAX_EXPERTS // 2),
        ("num_experts_per_tok", 5, 4),
        ("num_experts_per_tok", "2", 4),
    ],
)
def test_impossible_experts(key: str, value: object, largest: int) -> None:
    keys = {**MIXTRAL, key: value}
    with pytest.raises(UnsupportedError) as error:
        ModelShape.from_config(config(**keys), "m/config.json")
    assert str(error.value) == (
        f"m/config.json: {key} must be an integer from 1 to {largest}, got {value!r}"
    )


@pytest.mark.parametrize("key", ["query_pre_attn_scalar", "attn_logit_softcapping"])
@pytest.mark.parametrize("value", [0, -1.0, True, "50", float("inf"), float("nan")])
def test_impossible_number(key: str, value: object) -> None:
    with pytest.raises(UnsupportedError) as error:
        ModelShape.from_config(config(**{**GEMMA2, key: value}), "m/config.json")
    message = f"m/config.json: {key} must be a number above 0 or null, got {value!r}"
    assert str(error.value) == message


def test_types_of_every_layer() -> None:
    keys = {**GEMMA2, "layer_types": [FULL, SLIDING, FULL]}
    with pytest.raises(UnsupportedError, match="layer_types has 3 layers, num_hidden_"):
        ModelShape.from_config(config(**keys), "m/config.json")


@pytest.mark.parametrize("key", SIZES)
@pytest.mark.parametrize("value", [0, -1, True, 64.0, "64", [64], {}, 1 << 60])
def test_impossible_size(key: str, value: object) -> None:
    with pytest.raises(UnsupportedError) as error:
        ModelShape.from_config(config(**{key: value}), "m/config.json")
    largest = MAX_LAYERS if key == "num_hidden_layers" else MAX_SIZE
    assert str(error.value) == (
        f"m/config.json: {key} must be an integer from 1 to {largest}, got {value!r}"
    )


@pytest.mark.parametrize(
    "key", sorted(set(SIZES) - {"num_key_value_heads", "head_dim"})
)
def test_missing_size(key: str) -> None:
    with pytest.raises(UnsupportedError, match=f"config.json: {key} must be .*None"):
        ModelShape.from_config(config(**{key: None}), "config.json")


@pytest.mark.parametrize("key", ["attention_bias", "mlp_bias", "tie_word_embeddings"])
@pytest.mark.parametrize("value", ["false", 1, 0.0, []])
def test_flag_is_a_boolean(key: str, value: object) -> None:
    with pytest.raises(UnsupportedError) as error:
        ModelShape.from_config(config(**{key: value}), "config.json")
    message = f"config.json: {key} must be true or false, got {value!r}"
    assert str(error.value) == message


def test_kv_heads_must_divide_heads() -> None:
    with pytest.raises(UnsupportedError) as error:
        ModelShape.from_config(config(num_key_value_heads=3), "config.json")
    assert "num_attention_heads 4 is not a multiple of num_key_value_heads 3" in str(
        error.value
    )
