# SPDX-License-Identifier: Apache-2.0
"""The supported architectures, and what of their configs is not computed.

All are one decoder: RMSNorm, RoPE over whole heads in the half-split layout, grouped
query attention and a gated MLP or a mixture of them, with a norm before each of the
two. The table says in what each differs, as OPT and GPT-2 do in LayerNorms, learned
positions and an MLP without gate. Neither vLLM nor transformers is needed to read it.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from .decoder import Architecture, Experts
from .errors import UnsupportedError
from .module_names import ModuleNames
from .rope_config import (
    FULL,
    LAYER_TYPES,
    SLIDING,
    Refused,
    not_positive,
    refused_rope,
    refused_ropes,
    same,
)
from .schema import shorten

_QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
_ATTENTION = (*_QKV, "self_attn.o_proj")
_MLP = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")


LLAMA = Architecture(
    name="LlamaForCausalLM",
    model_type="llama",
    bias_keys={"attention_bias": _ATTENTION, "mlp_bias": _MLP},
)
_GEMMA_2 = Architecture(
    name="Gemma2ForCausalLM",
    model_type="gemma2",
    window="by layer",
    full_every=2,
    bias_keys={"attention_bias": _ATTENTION},
    rope_types=("default",),
    # Its embedding is its head.
    neutral={"tie_word_embeddings": (True,)},
    defaults={
        "num_key_value_heads": 4,
        "head_dim": 256,
        "sliding_window": 4096,
        "query_pre_attn_scalar": 256,
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
        "tie_word_embeddings": True,
    },
    norm_offset=1.0,
    mlp_norm="pre_feedforward_layernorm",
    output_norms={
        "self_attn": "post_attention_layernorm",
        "mlp": "post_feedforward_layernorm",
    },
    activation="gelu_pytorch_tanh",
    activation_keys=("hidden_act", "hidden_activation"),
    scaled_embedding=True,
    query_scalar=True,
    attention_cap="attn_logit_softcapping",
    logits_cap="final_logit_softcapping",
    stock_vocabulary=True,
)
_OPT = Architecture(
    name="OPTForCausalLM",
    model_type="opt",
    biases=(*_ATTENTION, "mlp.up_proj", "mlp.down_proj"),
    rope_types=(),
    position_rows=2,
    whole_heads=True,
    keys={"intermediate_size": "ffn_dim"},
    # vLLM sizes the KV cache by the second, and its model does not read it.
    equal={
        "word_embed_proj_dim": "hidden_size",
        "num_key_value_heads": "num_attention_heads",
    },
    neutral={
        # False of opt-350m: its norms come after what they would be folded into.
        "do_layer_norm_before": (True,),
        "_remove_final_layer_norm": (False,),
        "enable_bias": (True,),
        "layer_norm_elementwise_affine": (True,),
    },
    defaults={"max_position_embeddings": 2048, "tie_word_embeddings": True},
    names=ModuleNames(
        (
            (".input_layernorm.", ".self_attn_layer_norm."),
            (".post_attention_layernorm.", ".final_layer_norm."),
            (".o_proj.", ".out_proj."),
            (".mlp.up_proj.", ".fc1."),
            (".mlp.down_proj.", ".fc2."),
            ("model.norm.", "model.final_layer_norm."),
            ("model.", "model.decoder."),
        ),
        left_out="model.",
    ),
    gated=False,
    layer_norm=True,
    norm_eps=1e-5,
    activation="relu",
    activation_keys=("activation_function",),
    stock_vocabulary=True,
)
_GPT2 = Architecture(
    name="GPT2LMHeadModel",
    model_type="gpt2",
    biases=_OPT.biases,
    fused={"self_attn.qkv_proj": _QKV},
    rope_types=(),
    position_rows=0,
    whole_heads=True,
    mlp_ratio=4,
    keys={
        "hidden_size": "n_embd",
        "num_hidden_layers": "n_layer",
        "num_attention_heads": "n_head",
        "intermediate_size": "n_inner",
        "max_position_embeddings": "n_positions",
    },
    equal={"num_key_value_heads": "n_head"},
    neutral={
        # What transformers takes for the keys above.
        "hidden_size": (),
        "num_hidden_layers": (),
        "num_attention_heads": (),
        "max_position_embeddings": (),
        "scale_attn_weights": (True,),
        "scale_attn_by_inverse_layer_idx": (False,),
        "reorder_and_upcast_attn": (False,),
        "add_cross_attention": (False,),
    },
    defaults={"n_positions": 1024, "tie_word_embeddings": True},
    names=ModuleNames(
        (
            (".input_layernorm.", ".ln_1."),
            (".post_attention_layernorm.", ".ln_2."),
            *((f".{part}.", ".attn.c_attn.") for part in _QKV),
            (".self_attn.o_proj.", ".attn.c_proj."),
            (".mlp.up_proj.", ".mlp.c_fc."),
            (".mlp.down_proj.", ".mlp.c_proj."),
            ("model.layers.", "transformer.h."),
            ("model.embed_tokens.", "transformer.wte."),
            ("model.embed_positions.", "transformer.wpe."),
            ("model.norm.", "transformer.ln_f."),
            # Last, so that it is what the name there stands for.
            (".self_attn.qkv_proj.", ".attn.c_attn."),
        ),
        left_out="transformer.",
    ),
    gated=False,
    layer_norm=True,
    norm_eps="layer_norm_epsilon",
    activation="gelu_new",
    activation_keys=("activation_function",),
    conv1d=True,
    # Masks.
    superfluous=(".attn.bias", ".attn.masked_bias"),
)
ARCHITECTURES = {
    architecture.name: architecture
    for architecture in (
        LLAMA,
        Architecture(
            name="MistralForCausalLM",
            model_type="mistral",
            window="every layer",
            defaults={"num_key_value_heads": 8, "sliding_window": 4096},
        ),
        Architecture(
            name="Qwen2ForCausalLM",
            model_type="qwen2",
            biases=_QKV,
            window="switched off",
            # vLLM does not read its head_dim.
            whole_heads=True,
            defaults={"num_key_value_heads": 32},
        ),
        Architecture(
            name="Qwen3ForCausalLM",
            model_type="qwen3",
            qk_norm=True,
            window="switched off",
            defaults={"num_key_value_heads": 32, "head_dim": 128},
        ),
        Architecture(
            name="Phi3ForCausalLM",
            model_type="phi3",
            window="every layer",
            fused={
                "self_attn.qkv_proj": _QKV,
                "mlp.gate_up_proj": ("mlp.gate_proj", "mlp.up_proj"),
            },
            # Its "longrope" is chosen by the length of the context in transformers, and
            # by the longest a server allows in vLLM.
            rope_types=("default",),
        ),
        Architecture(
            name="MixtralForCausalLM",
            model_type="mixtral",
            defaults={"num_key_value_heads": 8, "num_experts_per_tok": 2},
            experts=Experts(count=("num_local_experts",), size="intermediate_size"),
            names=ModuleNames(
                (
                    (".mlp.", ".block_sparse_moe."),
                    (".gate_proj.", ".w1."),
                    (".up_proj.", ".w3."),
                    (".down_proj.", ".w2."),
                )
            ),
        ),
        Architecture(
            name="Qwen3MoeForCausalLM",
            model_type="qwen3_moe",
            qk_norm=True,
            window="switched off",
            defaults={"num_key_value_heads": 4, "num_experts_per_tok": 8},
            experts=Experts(
                count=("num_experts", "num_local_experts"),
                size="moe_intermediate_size",
                renormalize="norm_topk_prob",
            ),
        ),
        _GEMMA_2,
        replace(
            _GEMMA_2,
            name="Gemma3ForCausalLM",
            model_type="gemma3_text",
            qk_norm=True,
            full_every=6,
            full_every_key="sliding_window_pattern",
            rope_types=("default", "linear"),
            rope_by_type=True,
            neutral={},
            defaults={
                key: value
                for key, value in _GEMMA_2.defaults.items()
                if not key.endswith("softcapping")
            },
            attention_cap=None,
            stock_vocabulary=False,
        ),
        _OPT,
        _GPT2,
    )
}

# Keys that vLLM's or transformers' models of these architectures compute something
# else by, and the values (beside null) with which they do not.
_NEUTRAL: dict[str, tuple[object, ...]] = {
    "is_causal": (True,),
    "use_bidirectional_attention": (False,),
    "attention_chunk_size": (),
    "dual_chunk_attention_config": (),
    "logit_scale": (1.0,),
    "bias": (False,),
    "qkv_bias": (False,),
    "qk_norm": (False,),
    "llama_4_scaling": (),
    "ada_rms_norm_t_cond": (False,),
    "partial_rotary_factor": (1.0,),
    "rotary_pct": (1.0,),
    "rotary_emb_fraction": (1.0,),
    "rotary_emb_base": (),
    # Of Gemma 3, whose models compute no such cap.
    "attn_logit_softcapping": (),
    # Of mixtures of experts.
    "mlp_only_layers": ([],),
    "decoder_sparse_step": (1,),
    "shared_expert_intermediate_size": (0,),
}
_BIAS_KEYS = ("attention_bias", "mlp_bias")


def architecture_of(config: Mapping[str, Any], source: str) -> Architecture:
    """The architecture of a config.json, once all it says is known to be computed.

    Args:
        config: config.json as a mapping, or transformers' config as one.
        source: file named in errors.

    Raises:
        UnsupportedError: naming the key, its value and what is supported.
    """
    names = config.get("architectures")
    if names not in [[name] for name in ARCHITECTURES]:
        raise UnsupportedError(
            f"{source}: architectures {names!r} is not supported; supported: "
            + ", ".join(ARCHITECTURES)
        )
    architecture = ARCHITECTURES[names[0]]
    for key, value, supported in _refused(config, architecture):
        raise UnsupportedError(
            f"{source}: {key} {shorten(value)} is not supported with "
            f"{architecture.name}; supported: {supported}"
        )
    return architecture


def _refused(config: Mapping[str, Any], architecture: Architecture) -> Refused:
    """Keys that ask for something else, their values, and what is supported."""
    model_type = config.get("model_type")
    if model_type not in (None, architecture.model_type):
        supported = repr(architecture.model_type)
        if model_type == "":
            # What vLLM makes of Mistral's own params.json, which it prefers.
            supported += "; where params.json was read, add --config-format hf"
        yield "model_type", model_type, supported
    neutral = _NEUTRAL | {
        key: (False,) for key in _BIAS_KEYS if key not in architecture.bias_keys
    }
    neutral |= dict.fromkeys(architecture.activation_keys, (architecture.activation,))
    neutral |= architecture.neutral
    neutral |= {key: (config.get(own),) for key, own in architecture.equal.items()}
    if architecture.attention_cap is not None:
        del neutral[architecture.attention_cap]
    if architecture.position_rows is not None:
        neutral |= dict.fromkeys(("rope_parameters", "rope_scaling", "rope_theta"), ())
    if architecture.window == "switched off":
        neutral["use_sliding_window"] = (False,)
    if architecture.window == "none":
        neutral["sliding_window"] = ()
    for key, values in neutral.items():
        value = config.get(key)
        if value is not None and not any(same(value, other) for other in values):
            supported = " or ".join([*map(_json, values), "null"])
            if key == "do_layer_norm_before":
                supported += ", norms before attention and MLP, unlike opt-350m"
            yield key, value, supported
    types = config.get("layer_types")
    if types is not None and architecture.window == "every layer":
        # vLLM and transformers disagree on which layers have the window then.
        yield "layer_types", types, "null"
    elif types is not None and architecture.window == "by layer":
        if [kind for kind in _listed(types) if kind in LAYER_TYPES] != types:
            yield "layer_types", types, f"a list of {FULL!r} and {SLIDING!r}, or null"
    elif types is not None and types != [FULL] * len(_listed(types)):
        yield "layer_types", types, "'full_attention' in every layer"
    parameters = config.get("rope_parameters")
    if architecture.rope_by_type:
        yield from refused_ropes(parameters, architecture.rope_types)
        yield from not_positive(
            "rope_local_base_freq", config.get("rope_local_base_freq")
        )
    else:
        yield from refused_rope("rope_parameters", parameters, architecture.rope_types)
    scaling = config.get("rope_scaling")
    yield from refused_rope("rope_scaling", scaling, architecture.rope_types)
    yield from not_positive("rope_theta", config.get("rope_theta"))


def _json(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else repr(value)


def _listed(value: object) -> list[Any]:
    return value if isinstance(value, list) else []
