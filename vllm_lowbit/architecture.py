# SPDX-License-Identifier: Apache-2.0
"""What this package knows of a model: sizes and tensors.

Reads config.json; does not need vLLM.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .decoder import Architecture
from .errors import UnsupportedError
from .module_names import FUSED, ROLES, ModuleNames
from .rope_config import FULL, SLIDING
from .supported_models import LLAMA, architecture_of

# Of a mixture of experts, after ``model.layers.N.``; it is never quantized.
ROUTER = "mlp.gate"
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
POSITIONS = "model.embed_positions.weight"
MAX_SIZE = 1 << 20
MAX_LAYERS = 1 << 12
# In all layers.
MAX_EXPERTS = 1 << 16
MAX_WINDOW = (1 << 31) - 1


@dataclass(frozen=True)
class ModelShape:
    """Sizes of a model, in elements, and what its architecture adds to them.

    Attributes:
        intermediate_size: of the MLP, or of one expert.
        biases: linears that have one, by name after ``model.layers.N.``.
        positions: rows of the table of learned positions, 0 for none.
        sliding_window: tokens that a token attends to, itself included; None for all.
        full_layers: indices of those that attend to all nevertheless.
        query_scalar: attention's scores are divided by its square root; None is
            head_dim.
        attention_cap: soft cap of attention's scores, None for none.
        logits_cap: soft cap of the logits, None for none.
        num_experts: in place of the MLP of a layer; 0 for an MLP.
        experts_per_token: how many of them a token goes through.
        renormalize: whether the weights of those are scaled to a sum of one.
        architecture: in what it differs from others.
    """

    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    tie_word_embeddings: bool
    biases: frozenset[str] = frozenset()
    positions: int = 0
    sliding_window: int | None = None
    full_layers: frozenset[int] = frozenset()
    query_scalar: float | None = None
    attention_cap: float | None = None
    logits_cap: float | None = None
    num_experts: int = 0
    experts_per_token: int = 0
    renormalize: bool = True
    architecture: Architecture = LLAMA

    @classmethod
    def from_config(cls, config: Mapping[str, Any], source: str) -> "ModelShape":
        """Read the sizes from a Hugging Face config.

        Args:
            config: config.json as a mapping.
            source: file named in errors.

        Raises:
            UnsupportedError: for another architecture, sizes that cannot be, or a key
                that asks for what is not computed.
        """
        architecture = architecture_of(config, source)

        def size(key: str, derived: int | None = None, largest: int = MAX_SIZE) -> int:
            key = architecture.keys.get(key, key)
            value = config.get(key, architecture.defaults.get(key))
            value = derived if value is None else value
            if type(value) is not int or not 0 < value <= largest:
                raise UnsupportedError(
                    f"{source}: {key} must be an integer from 1 to {largest}, got "
                    f"{value!r}"
                )
            return value

        def number(key: str | None) -> float | None:
            if key is None:
                return None
            value = config.get(key, architecture.defaults.get(key))
            if value is not None and (
                type(value) not in (int, float) or not 0 < value < math.inf
            ):
                raise UnsupportedError(
                    f"{source}: {key} must be a number above 0 or null, got {value!r}"
                )
            return value

        def flag(key: str) -> bool:
            value = config.get(key, architecture.defaults.get(key))
            if value is not None and type(value) is not bool:
                raise UnsupportedError(
                    f"{source}: {key} must be true or false, got {value!r}"
                )
            return bool(value)

        hidden, heads = size("hidden_size"), size("num_attention_heads")
        kv_heads = size("num_key_value_heads", heads)
        if heads % kv_heads:
            raise UnsupportedError(
                f"{source}: num_attention_heads {heads} is not a multiple of "
                f"num_key_value_heads {kv_heads}"
            )
        head_dim = size("head_dim", hidden // heads)
        if heads * head_dim > MAX_SIZE:
            raise UnsupportedError(
                f"{source}: num_attention_heads {heads} * head_dim {head_dim} is "
                f"larger than {MAX_SIZE}"
            )
        if architecture.whole_heads and heads * head_dim != hidden:
            raise UnsupportedError(
                f"{source}: head_dim {head_dim} is not supported with "
                f"{architecture.name}; supported: hidden_size {hidden} / "
                f"num_attention_heads {heads}"
            )
        window = None
        given = config.get(
            "sliding_window", architecture.defaults.get("sliding_window")
        )
        by_layer = architecture.window == "by layer"
        if by_layer or (architecture.window == "every layer" and given is not None):
            window = size("sliding_window", largest=MAX_WINDOW)
        layers = size("num_hidden_layers", largest=MAX_LAYERS)
        types = config.get("layer_types") if by_layer else [SLIDING] * layers
        if types is None:
            key, every = architecture.full_every_key, architecture.full_every
            every = every if key is None else size(key, every)
            types = [SLIDING if (n + 1) % every else FULL for n in range(layers)]
        if len(types) != layers:
            raise UnsupportedError(
                f"{source}: layer_types has {len(types)} layers, num_hidden_layers is "
                f"{layers}"
            )
        experts, num_experts, per_token = architecture.experts, 0, 0
        if experts is not None:
            count = next((k for k in experts.count if k in config), experts.count[0])
            num_experts = size(count, largest=MAX_EXPERTS // layers)
            per_token = size("num_experts_per_tok", largest=num_experts)
        positions = 0
        if architecture.position_rows is not None:
            positions = size("max_position_embeddings") + architecture.position_rows
        keys = [key for key in architecture.bias_keys if flag(key)]
        biased = [name for key in keys for name in architecture.bias_keys[key]]
        return cls(
            hidden_size=hidden,
            intermediate_size=size(
                "intermediate_size" if experts is None else experts.size,
                architecture.mlp_ratio and architecture.mlp_ratio * hidden,
            ),
            num_layers=layers,
            num_heads=heads,
            num_kv_heads=kv_heads,
            head_dim=head_dim,
            vocab_size=size("vocab_size"),
            tie_word_embeddings=flag("tie_word_embeddings"),
            biases=frozenset((*architecture.biases, *biased)),
            positions=positions,
            sliding_window=window,
            full_layers=frozenset(n for n, kind in enumerate(types) if kind == FULL),
            query_scalar=number("query_pre_attn_scalar")
            if architecture.query_scalar
            else None,
            attention_cap=number(architecture.attention_cap),
            logits_cap=number(architecture.logits_cap),
            num_experts=num_experts,
            experts_per_token=per_token,
            renormalize=experts is None
            or experts.renormalize is None
            or flag(experts.renormalize),
            architecture=architecture,
        )

    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of every tensor of the model, no two of them stacked."""
        hidden = self.hidden_size
        kinds = ("weight", "bias") if self.architecture.layer_norm else ("weight",)
        names: dict[str, tuple[int, ...]] = {EMBEDDING: (self.vocab_size, hidden)}
        if self.positions:
            names[POSITIONS] = (self.positions, hidden)
        names |= {f"model.norm.{kind}": (hidden,) for kind in kinds}
        if not self.tie_word_embeddings:
            names[HEAD] = (self.vocab_size, hidden)
        for layer in range(self.num_layers):
            prefix = f"model.layers.{layer}."
            for norm in self.norms():
                names |= {f"{prefix}{norm}.{kind}": (hidden,) for kind in kinds}
            for name, (n, k) in self._linears().items():
                names[f"{prefix}{name}.weight"] = (n, k)
                if name in self.biases:
                    names[f"{prefix}{name}.bias"] = (n,)
            if self.num_experts:
                names[f"{prefix}{ROUTER}.weight"] = (self.num_experts, hidden)
            if self.architecture.qk_norm:
                names[prefix + "self_attn.q_norm.weight"] = (self.head_dim,)
                names[prefix + "self_attn.k_norm.weight"] = (self.head_dim,)
        return names

    def plain_tensors(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of every tensor a plain checkpoint must hold."""
        names: dict[str, tuple[int, ...]] = {}
        for name, size in self.tensors().items():
            file_name, rows = self.in_plain(name)
            if rows != slice(None):
                size = (rows.stop, *size[1:])
            names[file_name] = size[::-1] if self.is_transposed(name) else size
        return names

    def is_transposed(self, name: str) -> bool:
        """Whether a plain checkpoint holds a tensor with its dimensions exchanged.

        Args:
            name: one of :meth:`tensors`.
        """
        module, _, kind = name.rpartition(".")
        linear = kind == "weight" and module.rpartition(".")[2] in ROLES
        return linear and self.architecture.conv1d

    def in_plain(self, name: str) -> tuple[str, slice]:
        """Tensor of a plain checkpoint that holds one of the model, and its rows.

        Args:
            name: one of :meth:`tensors`.
        """
        module, _, kind = name.rpartition(".")
        for fused, parts in self.architecture.fused.items():
            for index, part in enumerate(parts):
                if not module.endswith(f".{part}"):
                    continue
                start = sum(self._rows(other) for other in parts[:index])
                rows = slice(start, start + self._rows(part))
                whole = f"{module.removesuffix(part)}{fused}.{kind}"
                return self.names.stored(whole), rows
        return self.names.stored(name), slice(None)

    def in_lowbit(self, name: str) -> tuple[str, slice]:
        """The same of a lowbit checkpoint, where what is quantized has other tensors.

        Args:
            name: as one of :meth:`tensors`, or with another last part.
        """
        stacked, rows = self.in_plain(name)
        own = self.names.stored(name)
        return own, rows if own == stacked else slice(None)

    @property
    def names(self) -> ModuleNames:
        """Of modules and tensors, in files and in vLLM's model."""
        return self.architecture.names

    def is_stock(self, stored: str) -> bool:
        """Whether a matrix of a checkpoint, by its name there, is held by a module of
        vLLM's own: a router, learned positions, or a vocabulary that takes no other
        method."""
        name = self.names.here(stored)
        if self.num_experts and name.endswith(f".{ROUTER}.weight"):
            return True
        vocabulary = (EMBEDDING, HEAD) if self.architecture.stock_vocabulary else ()
        return name in (POSITIONS, *vocabulary)

    def _rows(self, linear: str) -> int:
        return self._linears()[linear][0]

    def _linears(self) -> dict[str, tuple[int, int]]:
        """Rows and columns of the linears of a layer."""
        q, kv = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        hidden, intermediate = self.hidden_size, self.intermediate_size
        linears = {
            "self_attn.q_proj": (q, hidden),
            "self_attn.k_proj": (kv, hidden),
            "self_attn.v_proj": (kv, hidden),
            "self_attn.o_proj": (hidden, q),
        }
        for mlp in self.mlps():
            for part in self.mlp_readers:
                linears[f"{mlp}.{part}"] = (intermediate, hidden)
            linears[f"{mlp}.down_proj"] = (hidden, intermediate)
        return linears

    @property
    def longest(self) -> int | None:
        """Tokens that have a learned position; None where there are no such."""
        first = self.architecture.position_rows
        return None if first is None else self.positions - first

    @property
    def mlp_readers(self) -> tuple[str, ...]:
        """Linears that read the input of an MLP, in the order of their rows."""
        return FUSED[self.mlp_input]

    @property
    def mlp_input(self) -> str:
        """The linear that vLLM makes of them."""
        return "gate_up_proj" if self.architecture.gated else "up_proj"

    def norms(self) -> list[str]:
        """Norms of a layer over hidden_size, by name after ``model.layers.N.``."""
        own = self.architecture
        return ["input_layernorm", own.mlp_norm, *own.output_norms.values()]

    def layer_type(self, layer: int) -> str:
        """What ``layer_types`` of a config calls a layer."""
        windowed = self.sliding_window is not None and layer not in self.full_layers
        return SLIDING if windowed else FULL

    def window_of(self, layer: int) -> int | None:
        """Tokens that a token of a layer attends to, itself included; None for all."""
        return self.sliding_window if self.layer_type(layer) == SLIDING else None

    @property
    def attention_scale(self) -> float:
        """What attention's scores are multiplied by."""
        scalar = self.head_dim if self.query_scalar is None else self.query_scalar
        return float(scalar**-0.5)

    def mlps(self) -> list[str]:
        """The MLP of a layer, or its experts, by name after ``model.layers.N.``."""
        if not self.num_experts:
            return ["mlp"]
        return [f"mlp.experts.{expert}" for expert in range(self.num_experts)]
