# SPDX-License-Identifier: Apache-2.0
"""A model in plain torch that computes what the server is asked to compute.

It runs the operators in the arithmetic that defines what every backend computes, one
sequence at a time. The served model is tested against it; perplexities "by the
reference" come from it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.nn import functional

from ..architecture import ROUTER, ModelShape
from ..checkpoint import check_plain_checkpoint
from ..errors import ConfigError
from ..kernels.kv4_attention.generic import kv4_attention
from ..kernels.kv4_store.generic import kv4_store
from ..kernels.kv4_store.layout import bytes_per_token
from ..lowbit_checkpoint import read_config
from ..manifest import require_headers
from ..placement import check_scheme, flag_only_rotations
from ..rotations import check_rotations
from ..schema import LowbitConfig, Scheme
from ..takeover.checkpoint import check_foreign_checkpoint, read_quantization
from ..takeover.foreign import ForeignFormat
from ..verification import Verification
from .elementwise import activated, embedding_scale, soft_capped
from .reference_weights import WeightReader
from .rotary import RotaryEmbedding, model_config, norm_eps
from .routing import route

_BLOCK_SIZE = 16
_KINDS = ("weight", "bias")


def load_time_config(model: str, scheme: Scheme) -> LowbitConfig:
    """The config the server resolves for a plain checkpoint and a scheme.

    Raises:
        UnsupportedError: as the server would.
    """
    source = f"{model}/config.json"
    shape = ModelShape.from_config(read_config(model)[0], source)
    check_scheme(shape, scheme, source)
    return LowbitConfig(
        scheme=scheme, rotations=flag_only_rotations(shape, scheme, source)
    )


@dataclass(frozen=True)
class Scores:
    """How attention's scores are made: a factor, a window, and a soft cap."""

    scale: float
    window: int | None
    cap: float | None


class ReferenceModel:
    """Forward over one sequence, or several side by side.

    Everything is computed in float32; what a server holds in its dtype between two
    operators is rounded to ``dtype``, once, at the places where a compiled model
    rounds.

    Args:
        model: local directory of a plain checkpoint, or of one that is quantized in
            any way the server runs.
        config: scheme and rotations for a plain one, as resolved by
            :func:`load_time_config`; None is the float model. A quantized checkpoint
            has its own.
        dtype: of the server that is mirrored.

    Attributes:
        scheme_name: ``float``, or the name of the scheme.
        config: what is run, None for the float model.

    Raises:
        ConfigError, CheckpointError, UnsupportedError: as the server would.
    """

    def __init__(
        self,
        model: str,
        config: LowbitConfig | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        source = f"{model}/config.json"
        data, stored = read_quantization(model)
        self.shape = ModelShape.from_config(data, source)
        if stored is None:
            check_plain_checkpoint(model, self.shape)
        elif config is not None:
            raise ConfigError(
                f"{source}: the checkpoint has its own scheme {stored.scheme.name}; no "
                "other can be chosen"
            )
        elif isinstance(stored, ForeignFormat):
            config = stored.resolve(self.shape, source)
            check_foreign_checkpoint(model, self.shape, stored)
        else:
            config = stored
            check_scheme(self.shape, stored.scheme, source)
            check_rotations(self.shape, stored, source)
            require_headers(Path(model), self.shape, stored)
            Verification(Path(model)).finish()
        self.config, self.dtype = config, dtype
        self.scheme_name = self.config.scheme.name if self.config else "float"
        hf_config = model_config(model, self.shape)
        self.eps = norm_eps(hf_config, self.shape)
        self.rotary: RotaryEmbedding | None = None
        if not self.shape.positions:
            self.rotary = RotaryEmbedding(hf_config, self.shape)
        self.own = self.shape.architecture
        reader = WeightReader(Path(model), self.shape, self.config, stored, dtype)
        self.tensors = reader.norms() | reader.routers()
        self.vocabulary, self.positions = reader.vocabulary(), reader.positions()
        self.linears = reader.linears()

    @torch.no_grad()
    def __call__(
        self, token_ids: torch.Tensor, lengths: Sequence[int] | None = None
    ) -> torch.Tensor:
        """Logits float32 ``[tokens, vocabulary]`` of token_ids ``[tokens]``.

        Args:
            lengths: of the sequences that lie one after the other in token_ids; None
                is a single one.
        """
        lengths = [len(token_ids)] if lengths is None else list(lengths)
        x = self.look_up(token_ids, lengths)
        residual = torch.zeros_like(x)
        for layer in range(self.shape.num_layers):
            prefix = f"model.layers.{layer}."
            h, residual = self._add_norm(x, residual, prefix + "input_layernorm")
            x = self._attention(h, layer, lengths)
            h, residual = self._add_norm(x, residual, prefix + self.own.mlp_norm)
            x = self._feed_forward(h, prefix)
        h, _ = self._add_norm(x, residual, "model.norm")
        logits = self.vocabulary.logits(h, self.dtype).to(self.dtype)
        return soft_capped(logits, self.shape.logits_cap).float()

    def look_up(
        self, token_ids: torch.Tensor, lengths: Sequence[int] | None = None
    ) -> torch.Tensor:
        """What the residual stream starts with, float32 ``[tokens, hidden]``.

        An RMSNorm sees it before it is rounded into the stream.

        Args:
            token_ids: int64 ``[tokens]``.
            lengths: as for a call.

        Raises:
            ConfigError: for a sequence longer than the table of positions.
        """
        rows = self._round(self.vocabulary.look_up(token_ids))
        rows = rows * embedding_scale(self.shape, self.dtype)
        if self.positions is None:
            return rows
        lengths, most = lengths or [len(token_ids)], len(self.positions)
        if max(lengths) > most:
            raise ConfigError(
                f"a sequence of {max(lengths)} tokens: the model has {most} positions"
            )
        return rows + torch.cat([self.positions[:n] for n in lengths])

    def block(self, name: str, stream: torch.Tensor) -> torch.Tensor:
        """What one block adds to the residual stream of one sequence.

        Args:
            name: such as ``model.layers.0.self_attn`` or ``model.layers.0.mlp``.
            stream: float32 ``[tokens, hidden]``, before the block's norm.
        """
        module, _, kind = name.rpartition(".")
        prefix, start = f"{module}.", torch.zeros_like(stream)
        if kind == "self_attn":
            h, _ = self._add_norm(stream, start, prefix + "input_layernorm")
            lengths, layer = [len(stream)], int(module.rpartition(".")[2])
            return self._attention(h, layer, lengths)
        h, _ = self._add_norm(stream, start, prefix + self.own.mlp_norm)
        return self._feed_forward(h, prefix)

    def _feed_forward(self, h: torch.Tensor, prefix: str) -> torch.Tensor:
        """What the MLP of a layer adds, or its experts, each for its own tokens."""
        if not self.shape.num_experts:
            out = self._mlp(h, prefix + "mlp")
        else:
            out = self._mixture(h, prefix)
        return self._output_norm(out, prefix, "mlp")

    def _output_norm(self, x: torch.Tensor, prefix: str, block: str) -> torch.Tensor:
        """x after the norm of what a block adds to the stream, where there is one.

        The sum that follows sees it before it is rounded.
        """
        norm = self.own.output_norms.get(block)
        return x if norm is None else self._normed(x, prefix + norm)

    def _routed(
        self, h: torch.Tensor, prefix: str
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Weights and indices of the experts of every token."""
        router = self.tensors[f"{prefix}{ROUTER}.weight"]
        return route(self._round(functional.linear(h, router)), self.shape)

    def _mixture(self, h: torch.Tensor, prefix: str) -> torch.Tensor:
        weights, chosen = self._routed(h, prefix)
        out = h.new_empty(*chosen.shape, h.shape[1])
        for expert, mlp in enumerate(self.shape.mlps()):
            token, choice = (chosen == expert).nonzero(as_tuple=True)
            if len(token):
                out[token, choice] = self._mlp(h[token], prefix + mlp)
        total = torch.zeros_like(h)
        for nth in range(chosen.shape[1]):
            total = total + out[:, nth] * weights[:, nth : nth + 1]
        return self._round(total)

    def _mlp(self, h: torch.Tensor, name: str) -> torch.Tensor:
        out = self._run(f"{name}.{self.shape.mlp_input}", h)
        return self._run(f"{name}.down_proj", self._activated(out))

    def _cos_sin(
        self, rotary: RotaryEmbedding, layer: int, lengths: list[int]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Of every position in a layer, ``[tokens, head_dim]`` each."""
        positions = torch.cat([torch.arange(n) for n in lengths]).unsqueeze(0)
        cos, sin = rotary(torch.empty(0), positions, layer)
        return self._round(cos[0]), self._round(sin[0])

    def _round(self, x: torch.Tensor) -> torch.Tensor:
        return x.to(self.dtype).float()

    def _run(self, linear: str, x: torch.Tensor) -> torch.Tensor:
        return self._round(self.linears[linear](x))

    def _add_norm(
        self, x: torch.Tensor, residual: torch.Tensor, name: str
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Norm of ``x + residual``, and that sum as the new residual.

        An RMSNorm sees the sum before it is rounded into the residual stream, a
        LayerNorm after.
        """
        total = x + residual
        rounded = self._round(total)
        return self._norm(rounded if self.own.layer_norm else total, name), rounded

    def _norm(self, x: torch.Tensor, name: str) -> torch.Tensor:
        """A norm over the last dimension."""
        return self._round(self._normed(x, name))

    def _normed(self, x: torch.Tensor, name: str) -> torch.Tensor:
        """The same before it is rounded."""
        if self.own.layer_norm:
            weight, bias = (self.tensors[f"{name}.{kind}"] for kind in _KINDS)
            return functional.layer_norm(x, x.shape[-1:], weight, bias, self.eps)
        variance = x.pow(2).mean(dim=-1, keepdim=True)
        return x * torch.rsqrt(variance + self.eps) * self._gain(name)

    def _gain(self, name: str) -> torch.Tensor:
        """What a norm multiplies by, float32."""
        return self.tensors[f"{name}.weight"] + self.own.norm_offset

    def _activated(self, out: torch.Tensor) -> torch.Tensor:
        """Input of down, from the output of gate and up, or of up alone."""
        if not self.own.gated:
            return self._round(activated(out, self.shape))
        gate, up = out.chunk(2, dim=-1)
        return self._round(activated(gate, self.shape) * up)

    def _rope(
        self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
    ) -> torch.Tensor:
        """Rotary embedding, half-split layout, of ``x [tokens, heads, head_dim]``."""
        low, high = x.chunk(2, dim=-1)
        rotated = torch.cat((-high, low), dim=-1)
        return self._round(x * cos.unsqueeze(1) + rotated * sin.unsqueeze(1))

    def _attention(
        self, h: torch.Tensor, layer: int, lengths: list[int]
    ) -> torch.Tensor:
        """What the attention of a layer adds to the stream."""
        shape, prefix = self.shape, f"model.layers.{layer}."
        qkv = self._run(prefix + "self_attn.qkv_proj", h)
        q, k, v = qkv.unflatten(-1, (-1, shape.head_dim)).split(
            [shape.num_heads, shape.num_kv_heads, shape.num_kv_heads], dim=1
        )
        if shape.architecture.qk_norm:
            q = self._norm(q, prefix + "self_attn.q_norm")
            k = self._norm(k, prefix + "self_attn.k_norm")
        if self.rotary is not None:
            cos, sin = self._cos_sin(self.rotary, layer, lengths)
            q, k = (self._rope(t, cos, sin) for t in (q, k))
        of_scores = Scores(
            shape.attention_scale, shape.window_of(layer), shape.attention_cap
        )
        sequences = zip(
            q.split(lengths), k.split(lengths), v.split(lengths), strict=True
        )
        attended = torch.cat([self._attend(*each, of_scores) for each in sequences])
        out = self._run(prefix + "self_attn.o_proj", self._round(attended.flatten(1)))
        return self._output_norm(out, prefix, "self_attn")

    def _attend(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, of_scores: Scores
    ) -> torch.Tensor:
        """Attention of one sequence: ``[tokens, heads, head_dim]``."""
        if self.config is None or self.config.scheme.kv_cache.bits == 16:
            return _attend_in_float64(q, k, v, of_scores)
        rotate = self.config.rotations.k is not None
        return _attend_through_cache(q, k, v, of_scores, rotate)


def _attend_in_float64(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, of_scores: Scores
) -> torch.Tensor:
    """Causal attention of one sequence: ``[tokens, heads, head_dim]``."""
    group = q.shape[1] // k.shape[1]
    k, v = (t.repeat_interleave(group, dim=1).double() for t in (k, v))
    scores = torch.einsum("qhd,thd->hqt", q.double(), k) * of_scores.scale
    scores, window = soft_capped(scores, of_scores.cap), of_scores.window
    hidden = torch.ones(scores.shape[1:], dtype=torch.bool).triu(1)
    if window is not None:
        hidden |= torch.ones_like(hidden).tril(-window)
    probabilities = scores.masked_fill(hidden, -torch.inf).softmax(dim=-1)
    return torch.einsum("hqt,thd->qhd", probabilities, v)


def _attend_through_cache(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, of_scores: Scores, rotate: bool
) -> torch.Tensor:
    """The same over packed pages, by the operators that are served.

    Their fixed point is part of what runs: a 4-bit code of the next layer may hang on
    its last bit.
    """
    tokens, head_dim = len(q), q.shape[2]
    blocks = -(-tokens // _BLOCK_SIZE)
    cache = torch.zeros(
        blocks, k.shape[1], _BLOCK_SIZE, bytes_per_token(head_dim), dtype=torch.uint8
    )
    kv4_store(k, v, cache, torch.arange(tokens), rotate)
    table = torch.arange(blocks, dtype=torch.int32).unsqueeze(0)
    starts = torch.tensor([0, tokens], dtype=torch.int32)
    lengths = starts[1:]
    scale, window, cap = of_scores.scale, of_scores.window, of_scores.cap
    return kv4_attention(
        q, cache, table, starts, lengths, scale, window, cap, None, rotate
    )
