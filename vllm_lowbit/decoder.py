# SPDX-License-Identifier: Apache-2.0
"""In what an architecture may differ from the decoder that all of them share.

Which there are is in ``supported_models.py``.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from .module_names import ModuleNames


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
            name after ``model.layers.N.``. Lowbit checkpoints hold each by itself, but
            where ``names`` has one name for all: vLLM's model knows no other.
        rope_types: kinds of RoPE it may have.
        rope_by_type: whether layers of each type have RoPE parameters of their own.
        position_rows: of a table of learned positions, that come before the first
            token's; None where there is RoPE and no such table.
        whole_heads: whether the heads have to share hidden_size evenly.
        mlp_ratio: intermediate size, in hidden sizes, where the config says none.
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
        conv1d: whether files hold the weights of linears as ``[inputs, outputs]``.
        superfluous: ends of names of tensors that files may hold and no model reads.
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
    mlp_ratio: int | None = None
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
    activation: Literal["silu", "gelu_pytorch_tanh", "relu", "gelu_new"] = "silu"
    activation_keys: tuple[str, ...] = ("hidden_act",)
    scaled_embedding: bool = False
    query_scalar: bool = False
    attention_cap: str | None = None
    logits_cap: str | None = None
    conv1d: bool = False
    superfluous: tuple[str, ...] = ("rotary_emb.inv_freq",)
    stock_vocabulary: bool = False

    @property
    def passes_up_scale(self) -> bool:
        """Whether positive scales of up's outputs come through to down's inputs."""
        return self.gated or self.activation == "relu"
