# SPDX-License-Identifier: Apache-2.0
"""Mutations of config.json: the quantization in it, and the model around it."""

import json
from collections.abc import Iterator
from typing import Any

from .edits import DROP, put
from .mutation import CONFIG, DOWN, EMBEDDING, K, Mutation, Q

QUANTIZATION = "quantization_config"
BOTH = (False, True)
HUGE = 10**30
DOWN_0 = DOWN.replace("layers.1", "layers.0")

_PLACES = ("attn_input", "o_input", "mlp_input", "down_input")


def _clip_ratios(place: str, values: list[Any]) -> dict[str, Any]:
    """One for each input of the two layers here, but for one place."""
    others = dict.fromkeys(_PLACES, [0.9, 0.875])
    return {place: values} | others | {place: values}


# Impossible whatever the manifest says. Keys below quantization_config, value; the
# last key is named.
IMPOSSIBLE: list[tuple[str, Any]] = [
    ("quant_methods", "lowbit"),
    ("format_version", 2),
    ("format_version", 0),
    ("format_version", "1"),
    ("format_version", True),
    ("scheme", DROP),
    ("scheme", "w4a4kv4"),
    ("scheme", None),
    ("scheme/extra", 1),
    ("scheme/vocab_bits", 4),
    ("scheme/vocab_bits", "8"),
    ("scheme/weights", DROP),
    ("scheme/weights/actorder", False),
    ("scheme/weights/bits", 5),
    ("scheme/weights/bits", 0),
    ("scheme/weights/bits", -4),
    ("scheme/weights/bits", HUGE),
    ("scheme/weights/bits", True),
    ("scheme/weights/bits", "4"),
    ("scheme/weights/bits", None),
    ("scheme/weights/bits", 4.5),
    ("scheme/weights/symmetric", 1),
    ("scheme/weights/symmetric", "true"),
    ("scheme/weights/group_size", 0),
    ("scheme/weights/group_size", -1),
    ("scheme/weights/group_size", 48),
    ("scheme/weights/group_size", HUGE),
    ("scheme/weights/group_size", True),
    ("scheme/weights/group_size", 256),
    ("scheme/activations", []),
    ("scheme/activations/bits", 3),
    ("scheme/activations/bits", True),
    ("scheme/activations/dynamic", True),
    ("scheme/activations/symmetric", 0),
    ("scheme/activations/group_size", 48),
    ("scheme/activations/group_size", 64),  # of weights without groups
    ("scheme/activations/group_size", True),
    ("scheme/activations/clip_ratio", 0.4),
    ("scheme/activations/clip_ratio", 1.5),
    ("scheme/activations/clip_ratio", [0.9, 0.9]),
    ("scheme/activations/clip_ratios", 0.9),
    ("scheme/activations/clip_ratios", {"o_input": [0.9, 0.9]}),
    ("scheme/activations/clip_ratios", _clip_ratios("k", [0.9, 0.9])),
    ("scheme/activations/clip_ratios", _clip_ratios("o_input", [0.9])),
    ("scheme/activations/clip_ratios", _clip_ratios("o_input", [0.9, 0.4])),
    ("scheme/activations/clip_ratios", _clip_ratios("o_input", [0.9, True])),
    ("scheme/kv_cache", 4),
    ("scheme/kv_cache/bits", 8),
    ("scheme/kv_cache/bits", False),
    ("scheme/kv_cache/group_size", 64),
    ("rotations", DROP),
    ("rotations/q", None),
    ("rotations/max_tensor_parallel_size", 0),
    ("rotations/max_tensor_parallel_size", -1),
    ("rotations/max_tensor_parallel_size", HUGE),
    ("rotations/max_tensor_parallel_size", True),
    ("rotations/max_tensor_parallel_size", 3),
    ("rotations/max_tensor_parallel_size", 2),
    ("rotations/residual/apply", "online"),
    ("rotations/residual/apply", "never"),
    ("rotations/residual/kind", "learned"),
    ("rotations/residual/order", 0),
    ("rotations/residual/order", -128),
    ("rotations/residual/order", HUGE),
    ("rotations/residual/order", 128.5),
    ("rotations/residual/order", 3),
    ("rotations/residual/block", 96),
    ("rotations/residual/sign_seed", -1),
    ("rotations/residual/sign_seed", 1 << 64),
    ("rotations/residual/sign_seed", "3"),
    ("rotations/residual/sign_seed", True),
    ("rotations/residual/scaled", True),
    ("rotations/attn_input/apply", "folded"),
    ("rotations/attn_input/kind", "orthogonal"),
    ("rotations/attn_input/sign_seed", 1),
    ("rotations/attn_input/block", 256),
    ("rotations/k/order", 32),
    ("rotations/k/apply", "folded"),
    ("rotations/v/apply", "online"),
    ("rotations/v/block", 128),
    ("rotations/o_input/order", 3),
    ("rotations/mlp_input/order", 8192),
    ("rotations/down_input/order", 24),
    ("rotations/down_input/seed", 1),
    ("provenance/recipe_sha256", "0"),
    ("provenance/author", "x"),
]
# Possible, and another function of the same tensors: only the manifest knows.
OTHER_FUNCTION: list[tuple[str, Any]] = [
    ("scheme/activations/bits", 8),
    ("scheme/activations/symmetric", True),
    ("scheme/activations/clip_ratio", 0.9),
    ("scheme/activations/clip_ratios", _clip_ratios("o_input", [0.9, 0.9])),
    ("rotations/residual", None),
    ("rotations/residual/sign_seed", 4),
    ("rotations/attn_input", None),
    ("rotations/attn_input/order", 128),
    ("rotations/k", None),
    ("rotations/v", None),
    ("rotations/o_input", None),
    ("rotations/o_input", {"apply": "online", "order": 2, "block": 128}),
    ("rotations/mlp_input", None),
    ("rotations/down_input", None),
    ("rotations/down_input/order", 128),
]
ADDED_ROTATIONS: list[tuple[str, str, Any]] = [
    ("sharded", "mlp_input", {"apply": "online", "order": 128, "block": 128}),
    ("sharded", "v", {"apply": "folded", "order": 64, "block": 64}),
    ("grouped", "o_input", {"apply": "online", "order": 4, "block": 256}),
    ("tied", "attn_input", {"apply": "online", "order": 64, "block": 64}),
]
# Widths that the files do not hold. The manifest, written anew, agrees; the shapes of
# the tensors do not, and one of them is named.
OTHER_WIDTHS: list[tuple[str, str, Any, str]] = [
    ("rotated", "weights/bits", 8, f"{Q}.weight_packed"),
    ("rotated", "weights/bits", 3, f"{Q}.weight_packed"),
    ("rotated", "weights/symmetric", False, f"{Q}.weight_zero_point"),
    ("rotated", "weights/group_size", 64, f"{Q}.weight_scale"),
    ("rotated", "vocab_bits", 8, f"{EMBEDDING}.weight_packed"),
    ("grouped", "weights/bits", 3, f"{Q}.weight_packed"),
    ("grouped", "weights/symmetric", True, f"{DOWN_0}.weight_zero_point"),
    ("grouped", "weights/group_size", None, f"{Q}.weight_scale"),
    ("grouped", "weights/group_size", 128, f"{Q}.weight_scale"),
    ("grouped", "vocab_bits", 16, f"{EMBEDDING}.weight"),
]
# Top-level keys of the model that its tensors contradict, and what is named when the
# manifest agrees with them.
OTHER_SIZES: list[tuple[str, str, Any, str]] = [
    ("rotated", "hidden_size", 512, f"{EMBEDDING}.weight"),
    ("rotated", "intermediate_size", 512, "model.layers.0.mlp.gate_proj.weight_packed"),
    ("rotated", "num_attention_heads", 8, f"{Q}.weight_packed"),
    ("rotated", "num_key_value_heads", 4, f"{K}.weight_packed"),
    ("rotated", "num_key_value_heads", 1, f"{K}.weight_packed"),
    ("rotated", "head_dim", 128, "rotations.k"),
    ("rotated", "vocab_size", 512, f"{EMBEDDING}.weight"),
    ("rotated", "vocab_size", 255, f"{EMBEDDING}.weight"),
    ("rotated", "num_hidden_layers", 3, "model.layers.2.input_layernorm.weight"),
    ("rotated", "num_hidden_layers", 1, f"{DOWN}.weight_scale"),
    ("rotated", "tie_word_embeddings", True, "rotations.residual"),
    ("rotated", "attention_bias", True, f"{Q}.bias"),
    ("grouped", "attention_bias", False, f"{K}.bias"),
    ("grouped", "mlp_bias", False, f"{DOWN_0}.bias"),
    ("tied", "tie_word_embeddings", False, "rotations.residual"),
]
# Of the model; no tensor's shape depends on them.
OTHER_MODEL: list[tuple[str, Any]] = [
    ("rope_parameters/rope_theta", 500000.0),
    (
        "rope_parameters",
        {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0},
    ),
    ("rope_parameters", DROP),
    ("rms_norm_eps", 1e-3),
    ("rms_norm_eps", DROP),
    ("hidden_act", "gelu"),
    ("max_position_embeddings", 512),
    ("bos_token_id", 7),
    ("eos_token_id", 7),
    ("dtype", "float32"),
    ("sliding_window", 16),
    ("partial_rotary_factor", 0.5),
    ("pretraining_tp", 2),
    ("attention_bias", DROP),
    ("unheard_of", {"a": [1]}),
]
# Key, value, and the key that is named.
ARCHITECTURES: list[tuple[str, Any, str]] = [
    ("architectures", ["MistralForCausalLM"], "model_type"),
    ("architectures", ["GPT2LMHeadModel"], "model_type"),
    ("architectures", ["LlamaForCausalLM", "LlamaForCausalLM"], "architectures"),
    ("model_type", "mistral", "model_type"),
]


def config_mutations() -> Iterator[Mutation]:
    """Grouped by what finds them: the schema, the manifest, or the tensors."""
    yield from _of_the_quantization()
    for variant, missing in (("rotated", f"{Q}.weight"), ("tied", EMBEDDING)):
        edit, flag = put(CONFIG, QUANTIZATION, DROP), (("quantization", "lowbit"),)
        kind = "served as a plain checkpoint"
        yield Mutation(kind, variant, edit, missing, arguments=flag)
    for variant, key, value, misfit in OTHER_SIZES:
        for agree in BOTH:
            edit, named = put(CONFIG, key, value), misfit if agree else key
            detail = f"{key} {value}"
            yield Mutation("wrong sizes", variant, edit, named, detail, agree)
    for keys, value in OTHER_MODEL:
        edit, named = put(CONFIG, keys, value), keys.replace("/", ".")
        yield Mutation("other model config", "rotated", edit, named, _shown(value))
    for key, value, named in ARCHITECTURES:
        for agree in BOTH:
            edit, detail = put(CONFIG, key, value), _shown(value)
            yield Mutation("other architecture", "rotated", edit, named, detail, agree)


def _of_the_quantization() -> Iterator[Mutation]:
    for keys, value in IMPOSSIBLE:
        edit, named = put(CONFIG, f"{QUANTIZATION}/{keys}", value), keys.split("/")[-1]
        detail = f"{keys} {_shown(value)}"
        for agree in BOTH:
            yield Mutation("impossible key", "rotated", edit, named, detail, agree)
    for keys, value in OTHER_FUNCTION:
        edit = put(CONFIG, f"{QUANTIZATION}/{keys}", value)
        named = ".".join((QUANTIZATION, *keys.split("/")[:2]))
        detail = f"{keys} {_shown(value)}"
        yield Mutation("other function", "rotated", edit, named, detail)
    for variant, key, value in ADDED_ROTATIONS:
        edit = put(CONFIG, f"{QUANTIZATION}/rotations/{key}", value)
        named = f"{QUANTIZATION}.rotations.{key}"
        yield Mutation("other function", variant, edit, named, "added")
    for variant, keys, value, misfit in OTHER_WIDTHS:
        edit = put(CONFIG, f"{QUANTIZATION}/scheme/{keys}", value)
        for agree in BOTH:
            named = misfit if agree else "scheme." + keys.replace("/", ".")
            detail = f"{keys} {value}"
            yield Mutation("other widths", variant, edit, named, detail, agree)


def _shown(value: Any) -> str:
    return "deleted" if value is DROP else json.dumps(value)[:40]
