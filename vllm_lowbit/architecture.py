# SPDX-License-Identifier: Apache-2.0
"""What this package knows of a model: sizes, tensors and where rotations go.

Reads config.json; does not need vLLM.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .errors import UnsupportedError
from .kernels.hadamard.matrices import exists, largest_order
from .kernels.kv4_store.layout import HEAD_DIMS
from .rope_config import FULL, SLIDING
from .schema import Rotation, Rotations, Scheme
from .supported_models import LLAMA, Architecture, architecture_of

MIN_BLOCK = 16
# Of a mixture of experts, after ``model.layers.N.``; it is never quantized.
ROUTER = "mlp.gate"
EMBEDDING = "model.embed_tokens.weight"
# Tensor parallel sizes that one model may be served with, largest first.
PARALLEL_SIZES = (8, 4, 2, 1)
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
        keys = [key for key in architecture.bias_keys if flag(key)]
        biased = [name for key in keys for name in architecture.bias_keys[key]]
        return cls(
            hidden_size=hidden,
            intermediate_size=size(
                "intermediate_size" if experts is None else experts.size
            ),
            num_layers=layers,
            num_heads=heads,
            num_kv_heads=kv_heads,
            head_dim=head_dim,
            vocab_size=size("vocab_size"),
            tie_word_embeddings=flag("tie_word_embeddings"),
            biases=frozenset((*architecture.biases, *biased)),
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
        names: dict[str, tuple[int, ...]] = {
            EMBEDDING: (self.vocab_size, hidden),
            "model.norm.weight": (hidden,),
        }
        if not self.tie_word_embeddings:
            names["lm_head.weight"] = (self.vocab_size, hidden)
        for layer in range(self.num_layers):
            prefix = f"model.layers.{layer}."
            for norm in self.norms():
                names[f"{prefix}{norm}.weight"] = (hidden,)
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
            if rows == slice(None):
                names[file_name] = size
            else:
                names[file_name] = (rows.stop, *size[1:])
        return names

    def in_plain(self, name: str) -> tuple[str, slice]:
        """Tensor of a plain checkpoint that holds one of the model, and its rows.

        Args:
            name: one of :meth:`tensors`.
        """
        if self.num_experts:
            return self.stored(name), slice(None)
        module, _, kind = name.rpartition(".")
        for fused, parts in self.architecture.fused.items():
            for index, part in enumerate(parts):
                if not module.endswith(f".{part}"):
                    continue
                start = sum(self._rows(other) for other in parts[:index])
                rows = slice(start, start + self._rows(part))
                return f"{module.removesuffix(part)}{fused}.{kind}", rows
        return name, slice(None)

    def stored(self, name: str) -> str:
        """Name of a tensor in the files of a checkpoint."""
        for here, there in self._renamed():
            name = name.replace(here, there)
        return name

    def named_here(self, stored: str) -> str:
        """What :meth:`stored` is the other way round of."""
        for here, there in self._renamed():
            stored = stored.replace(there, here)
        return stored

    def is_stock(self, stored: str) -> bool:
        """Whether a matrix of a checkpoint, by its name there, is held by a module of
        vLLM's own: weights of experts, or a vocabulary that takes no other method."""
        name = self.named_here(stored)
        router = bool(self.num_experts) and name.endswith(f".{ROUTER}.weight")
        return router or (self.architecture.stock_vocabulary and name == EMBEDDING)

    def _renamed(self) -> Iterable[tuple[str, str]]:
        experts = self.architecture.experts
        return () if experts is None else experts.names.items()

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
            linears[f"{mlp}.gate_proj"] = linears[f"{mlp}.up_proj"] = (
                intermediate,
                hidden,
            )
            linears[f"{mlp}.down_proj"] = (hidden, intermediate)
        return linears

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


def check_scheme(shape: ModelShape, scheme: Scheme, source: str) -> None:
    """Raise UnsupportedError where the scheme does not fit the model's sizes."""
    group_size = scheme.weights.group_size
    if shape.architecture.stock_vocabulary and scheme.vocab_bits != 16:
        raise UnsupportedError(
            f"{source}: vocab_bits {scheme.vocab_bits} is not supported with "
            f"{shape.architecture.name}, whose embedding vLLM holds by itself; "
            "supported: 16"
        )
    if shape.head_dim < 2 or not exists(shape.head_dim):
        raise UnsupportedError(
            f"{source}: head_dim {shape.head_dim} has no Hadamard matrix"
        )
    if scheme.kv_cache.bits != 16 and shape.head_dim not in HEAD_DIMS:
        raise UnsupportedError(
            f"{source}: head_dim {shape.head_dim} has no {scheme.kv_cache.bits}-bit "
            f"cache, supported: {', '.join(map(str, HEAD_DIMS))}; choose a scheme "
            "without kv, such as w4a4"
        )
    inputs = {
        "hidden_size": shape.hidden_size,
        "num_attention_heads * head_dim": shape.num_heads * shape.head_dim,
        "intermediate_size": shape.intermediate_size,
    }
    for name, size in inputs.items():
        if group_size is not None and size % group_size:
            raise UnsupportedError(
                f"{source}: group_size {group_size} does not divide {name} {size}"
            )
    for name, ratios in scheme.activations.clip_ratios or ():
        if len(ratios) != shape.num_layers:
            raise UnsupportedError(
                f"{source}: scheme.activations.clip_ratios.{name} has {len(ratios)} "
                f"values; supported: one for each of the {shape.num_layers} layers"
            )


def flag_only_rotations(shape: ModelShape, scheme: Scheme, source: str) -> Rotations:
    """The rotations of a plain checkpoint quantized while loading.

    Every linear gets an online Hadamard on its input (o_proj's mixes heads, where
    their number has a Hadamard order). Those of o_proj and down_proj stay inside one
    of T blocks, T being 8 or the largest divisor of it that leaves a
    Hadamard order, so that any tensor parallel size that divides T computes the same
    function.

    Args:
        shape: sizes of the model.
        scheme: what is quantized; keys are rotated for a quantized cache only.
        source: file named in errors.

    Raises:
        UnsupportedError: when no Hadamard block of at least MIN_BLOCK elements
            divides a size.
    """
    heads, head_parallel = order_per_shard(shape.num_heads, 2)
    down, down_parallel = order_per_shard(shape.intermediate_size, MIN_BLOCK)
    across_heads = None
    if heads > 1:
        across_heads = Rotation(
            apply="online", order=heads, block=heads * shape.head_dim
        )
    head = Rotation(apply="folded", order=shape.head_dim, block=shape.head_dim)
    hidden = _block("hidden_size", shape.hidden_size, source)
    return Rotations(
        attn_input=hidden,
        k=head.model_copy(update={"apply": "online"})
        if scheme.kv_cache.bits != 16
        else None,
        v=head,
        o_input=across_heads,
        mlp_input=hidden,
        down_input=_block("intermediate_size", shape.intermediate_size, source, down),
        max_tensor_parallel_size=min(head_parallel, down_parallel),
    )


def order_per_shard(
    size: int, smallest: int, parallel_sizes: Sequence[int] = PARALLEL_SIZES
) -> tuple[int, int]:
    """Hadamard order and T: the largest T whose shard is one Hadamard.

    Args:
        size: elements of the whole.
        smallest: order allowed. Where there is none, the result is the largest order
            that divides the whole, and T = 1.
        parallel_sizes: T to try, largest first.
    """
    for parallel in parallel_sizes:
        order, rest = divmod(size, parallel)
        if not rest and order >= smallest and exists(order):
            return order, parallel
    return largest_order(size), 1


def _block(name: str, size: int, source: str, order: int | None = None) -> Rotation:
    order = largest_order(size) if order is None else order
    if order < MIN_BLOCK:
        raise UnsupportedError(
            f"{source}: {name} {size} has no Hadamard block: the largest order that "
            f"divides it is {order}, at least {MIN_BLOCK} is supported"
        )
    return Rotation(apply="online", order=order, block=order, scaled=True)
