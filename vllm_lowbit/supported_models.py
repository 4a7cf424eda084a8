# SPDX-License-Identifier: Apache-2.0
"""The supported architectures, and what of their configs is not computed.

All are one decoder: RMSNorm, RoPE over whole heads in the half-split layout, grouped
query attention and a gated MLP or a mixture of them, with a norm before each of the
two. The table says in what each differs. Neither vLLM nor transformers is needed to
read it.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

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


@dataclass(frozen=True)
class Experts:
    """A mixture of experts in place of every MLP; a token's weights are a softmax.

    Attributes:
        count: key of the config with their number, or what transformers makes of it.
        size: key with the intermediate size of one.
        renormalize: key that says whether the weights of a token's experts are scaled
            to a sum of one; None where they always are.
    """

    count: tuple[str, ...]
    size: str
    renormalize: str | None = None


@dataclass(frozen=True)
class Architecture:
    """In what an architecture differs from the decoder they share.

    Attributes:
        name: in ``architectures`` of config.json.
        model_type: in config.json; the config class of transformers goes by it.
        biases: linears that have a bias whatever the config says.
        bias_keys: keys of the config and the linears that have one where it is true.
        qk_norm: whether RMSNorms of ``head_dim`` weights, shared by all heads, come
            between the projections of queries and keys and RoPE.
        window: what ``sliding_window`` does: it is the window of every layer; of those
            that ``layer_types`` says; nothing, as ``use_sliding_window`` has to be
            false; or there is no such key.
        full_every: without ``layer_types``, every so many layers one has no window.
        full_every_key: key of the config that says another number.
        fused: tensors of a plain checkpoint that stack those of several linears, by
            name after ``model.layers.N.``; lowbit checkpoints hold each by itself.
        rope_types: kinds of RoPE it may have.
        rope_by_type: whether layers of each type have RoPE parameters of their own.
        position_rows: of a table of learned positions, that come before the first
            token's; None where there is RoPE and no such table.
        whole_heads: whether the heads have to share hidden_size evenly.
        keys: of the config with sizes that others call as the mapping's keys.
        equal: keys of the config that may only say what another says.
        neutral: further keys by which something else would be computed, and the values
            (beside null) with which it is not.
        defaults: what keys mean that are not in config.json, where a null means
            something else.
        names: of modules, in files and in vLLM's model.
        experts: what stands in place of the MLP; None is the MLP.
        gated: whether the MLP has a gate; without one it is up, activation and down.
        layer_norm: whether norms subtract the mean and have biases.
        norm_eps: key of the config with what norms add to the variance, or that.
        norm_offset: added to the weight of every RMSNorm before it multiplies.
        mlp_norm: name of the norm before the MLP.
        output_norms: names of norms on what attention (``self_attn``) and MLP
            (``mlp``) add to the residual stream. No rotation of the stream can be
            folded through their weights.
        activation: of the MLP, of its gate where it has one; as transformers names it.
        activation_keys: of the config, that say so.
        scaled_embedding: whether looked-up rows are multiplied by the square root of
            hidden_size, rounded to the model's dtype.
        query_scalar: whether ``query_pre_attn_scalar`` takes the place of head_dim in
            the scale of attention's scores.
        attention_cap, logits_cap: keys with the soft caps, ``cap * tanh(x / cap)``,
            of attention's scores and of the logits; None where there is none.
        stock_vocabulary: whether vLLM's model takes no quantization of embedding and
            head, which stay in 16 bits and cannot be inside an online rotation.
    """

    name: str
    model_type: str
    biases: tuple[str, ...] = ()
    bias_keys: Mapping[str, tuple[str, ...]] = field(default_factory=dict, hash=False)
    qk_norm: bool = False
    window: Literal["every layer", "by layer", "switched off", "none"] = "none"
    full_every: int = 1
    full_every_key: str | None = None
    fused: Mapping[str, tuple[str, ...]] = field(default_factory=dict, hash=False)
    rope_types: tuple[str, ...] = ("default", "linear", "llama3", "yarn")
    rope_by_type: bool = False
    position_rows: int | None = None
    whole_heads: bool = False
    keys: Mapping[str, str] = field(default_factory=dict, hash=False)
    equal: Mapping[str, str] = field(default_factory=dict, hash=False)
    neutral: Mapping[str, tuple[object, ...]] = field(default_factory=dict, hash=False)
    defaults: Mapping[str, float] = field(default_factory=dict, hash=False)
    names: ModuleNames = ModuleNames()
    experts: Experts | None = None
    gated: bool = True
    layer_norm: bool = False
    norm_eps: str | float = "rms_norm_eps"
    norm_offset: float = 0.0
    mlp_norm: str = "post_attention_layernorm"
    output_norms: Mapping[str, str] = field(default_factory=dict, hash=False)
    activation: Literal["silu", "gelu_pytorch_tanh", "relu"] = "silu"
    activation_keys: tuple[str, ...] = ("hidden_act",)
    scaled_embedding: bool = False
    query_scalar: bool = False
    attention_cap: str | None = None
    logits_cap: str | None = None
    stock_vocabulary: bool = False

    @property
    def passes_up_scale(self) -> bool:
        """Whether positive scales of up's outputs come through to down's inputs."""
        return self.gated or self.activation == "relu"


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
