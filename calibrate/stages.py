# SPDX-License-Identifier: Apache-2.0
"""A decoder layer in stages, in any float dtype, with quantizers that can be off.

Calibration runs it over many windows at once, and gradients pass through its
quantizers. It uses the serving grids but float GEMMs; ``reference_model.py`` is the
bit-exact mirror of the server.
"""

import copy
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch.nn import functional
from transformers import PreTrainedConfig

from ..architecture import ROUTER, ModelShape
from ..kernels.grid import IntGrid
from .elementwise import activated, soft_capped
from .rotary import RotaryEmbedding, norm_eps
from .rotations import Orthogonal
from .routing import route
from .straight_through import fake_quantize, through_cache

# The two that end in a sum into the residual stream.
RESIDUAL_STAGES = ("o_input", "down_input")
Observer = Callable[[str, torch.Tensor], None]


def stages_of(shape: ModelShape) -> dict[str, tuple[str, ...]]:
    """Linears of a layer that read the same input, in the order they run.

    Each expert has its own ``EXPERT.mlp_input`` and ``EXPERT.down_input`` where there
    are experts.
    """
    stages: dict[str, tuple[str, ...]] = {
        "attn_input": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        "o_input": ("self_attn.o_proj",),
    }
    for mlp in shape.mlps():
        prefix = f"{mlp}." if shape.num_experts else ""
        readers = tuple(f"{mlp}.{part}" for part in shape.mlp_readers)
        stages[f"{prefix}mlp_input"] = readers
        stages[f"{prefix}down_input"] = (f"{mlp}.down_proj",)
    return stages


def linears_of(shape: ModelShape) -> tuple[str, ...]:
    """Linears of a layer, in the order they run."""
    return tuple(name for names in stages_of(shape).values() for name in names)


@dataclass(frozen=True)
class Online:
    """What the server does to activations.

    Attributes:
        activations: grid of every linear's input, None to leave it unquantized.
        kv4: whether keys and values go through the 4-bit cache.
        key: rotation of queries and keys, after RoPE where there is any.
        down: rotation of down_proj's input.
        attn_input: rotation of the input of q, k and v.
        mlp_input: rotation of the input of gate and up.
        clip_ratios: by layer and stage, in place of the grid's; filled in while layers
            are quantized.
    """

    activations: IntGrid | None = None
    kv4: bool = False
    key: Orthogonal | None = None
    down: Orthogonal | None = None
    attn_input: Orthogonal | None = None
    mlp_input: Orthogonal | None = None
    clip_ratios: defaultdict[int, dict[str, float]] = field(
        default_factory=lambda: defaultdict(dict)
    )


class DecoderStages:
    """The pieces of one decoder layer; weights are given with each call.

    It is that of the first layer; :meth:`at` gives the others, which differ from it in
    some models.

    Args:
        config: of the model.
        shape: its sizes.
        online: quantizers and rotations; the default computes the float model.
        device: where activations live.
    """

    def __init__(
        self,
        config: PreTrainedConfig,
        shape: ModelShape,
        online: Online | None = None,
        device: str = "cpu",
    ) -> None:
        self.shape, self.stages = shape, stages_of(shape)
        self.online = online or Online()
        self.eps = norm_eps(config, shape)
        self.rotary: RotaryEmbedding | None = None
        if not shape.positions:
            self.rotary = RotaryEmbedding(config, shape).to(device)
        self.layer, self.window = 0, shape.window_of(0)
        self.clip_ratios: Mapping[str, float | torch.Tensor]
        self.clip_ratios = self.online.clip_ratios[0]

    def at(self, layer: int) -> "DecoderStages":
        """The pieces of another layer, by its index."""
        other = copy.copy(self)
        other.layer, other.window = layer, self.shape.window_of(layer)
        other.clip_ratios = self.online.clip_ratios[layer]
        return other

    def clipped(self, ratios: Mapping[str, torch.Tensor]) -> "DecoderStages":
        """The same with clip ratios of this layer that carry gradients, by stage."""
        other = copy.copy(self)
        other.clip_ratios = ratios
        return other

    def input_of(
        self,
        stage: str,
        weights: Mapping[str, torch.Tensor],
        x: torch.Tensor,
        sent: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """What the linears of a stage read, before quantization.

        Args:
            stage: one of ``self.stages``.
            weights: of the layer, by name after ``model.layers.N.``.
            x: ``[windows, tokens, hidden]``, the residual stream before attention
                for ``attn_input`` and ``o_input``, after it for the others.
            sent: bool ``[windows, tokens]``, for a stage of an expert: the tokens it
                gets, None for those that :meth:`sent` says.

        Returns:
            ``[windows, tokens, inputs]``, of an expert ``[its tokens, inputs]``.
        """
        expert, _, stage = stage.rpartition(".")
        if expert:
            x = x[self.sent(expert, weights, x) if sent is None else sent]
            h = rotated(self._mlp_norm(weights, x), self.online.mlp_input)
            return h if stage == "mlp_input" else self._gated(expert, weights, h)
        match stage:
            case "attn_input":
                h = self._named_norm("input_layernorm", weights, x)
                return rotated(h, self.online.attn_input)
            case "o_input":
                h = self.input_of("attn_input", weights, x)
                return self._attend(weights, *self.linears("attn_input", weights, h))
            case "mlp_input":
                return rotated(self._mlp_norm(weights, x), self.online.mlp_input)
            case "down_input":
                h = self.input_of("mlp_input", weights, x)
                return self._gated("mlp", weights, h)
        raise ValueError(f"no stage {stage!r}")

    def linears(
        self, stage: str, weights: Mapping[str, torch.Tensor], h: torch.Tensor
    ) -> list[torch.Tensor]:
        """Outputs of a stage's linears for their unquantized input h."""
        return self._linears(stage, self.stages[stage], weights, h)

    def sent(
        self, expert: str, weights: Mapping[str, torch.Tensor], x: torch.Tensor
    ) -> torch.Tensor:
        """bool ``[windows, tokens]``: the tokens that go through an expert.

        Args:
            expert: such as ``mlp.experts.3``.
            weights: of the layer.
            x: the residual stream after attention.
        """
        return self.goes_to(expert, self.chosen(weights, x))

    def chosen(
        self, weights: Mapping[str, torch.Tensor], x: torch.Tensor
    ) -> torch.Tensor:
        """Indices of every token's experts, ``[windows, tokens, experts_per_token]``.

        Arguments as for :meth:`sent`.
        """
        return self._route(weights, self._mlp_norm(weights, x))[1]

    def goes_to(self, expert: str, chosen: torch.Tensor) -> torch.Tensor:
        """bool ``[windows, tokens]``: the tokens that chose an expert."""
        return (chosen == int(expert.rpartition(".")[2])).any(dim=-1)

    def update(
        self,
        stage: str,
        weights: Mapping[str, torch.Tensor],
        x: torch.Tensor,
        observe: Observer | None = None,
    ) -> torch.Tensor:
        """The residual stream x after attention (``o_input``) or MLP (``down_input``).

        Args:
            observe: called with the stage and the unquantized input of its linear.
        """
        if stage == "down_input" and self.shape.num_experts:
            out = self._mixture(weights, x, observe)
        else:
            h = self.input_of(stage, weights, x)
            if observe is not None:
                observe(stage, h)
            out = self.linears(stage, weights, h)[0]
        return self.added(stage, weights, x, out)

    def added(
        self,
        stage: str,
        weights: Mapping[str, torch.Tensor],
        x: torch.Tensor,
        out: torch.Tensor,
    ) -> torch.Tensor:
        """The residual stream x after the output of a stage that ends in it."""
        block = "self_attn" if stage == "o_input" else "mlp"
        norm = self.shape.architecture.output_norms.get(block)
        return x + (out if norm is None else self._named_norm(norm, weights, out))

    def norm(
        self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        """A norm with weight and bias as checkpoints hold them."""
        normed = self.normalized(x) * (weight + self.shape.architecture.norm_offset)
        return normed if bias is None else normed + bias

    def normalized(self, x: torch.Tensor) -> torch.Tensor:
        """A norm without weight and bias."""
        if self.shape.architecture.layer_norm:
            x = x - x.mean(dim=-1, keepdim=True)
        variance = x.square().mean(dim=-1, keepdim=True)
        return x * torch.rsqrt(variance + self.eps)

    def quantized(self, stage: str, x: torch.Tensor) -> torch.Tensor:
        """The input x of a stage on the activation grid."""
        grid = self.online.activations
        ratio = self.clip_ratios.get(stage.rpartition(".")[2])
        return x if grid is None else fake_quantize(x, grid, ratio)

    def _linears(
        self,
        stage: str,
        names: Sequence[str],
        weights: Mapping[str, torch.Tensor],
        h: torch.Tensor,
    ) -> list[torch.Tensor]:
        h = self.quantized(stage, h)
        return [
            functional.linear(h, weights[f"{name}.weight"], weights.get(f"{name}.bias"))
            for name in names
        ]

    def _gated(
        self, mlp: str, weights: Mapping[str, torch.Tensor], h: torch.Tensor
    ) -> torch.Tensor:
        """Input of down, from that of gate and up, or of up alone."""
        names = [f"{mlp}.{part}" for part in self.shape.mlp_readers]
        first, *up = self._linears("mlp_input", names, weights, h)
        out = activated(first, self.shape)
        return rotated(out * up[0] if up else out, self.online.down)

    def _mlp_norm(
        self, weights: Mapping[str, torch.Tensor], x: torch.Tensor
    ) -> torch.Tensor:
        """What MLP, router and experts read, before any rotation."""
        return self._named_norm(self.shape.architecture.mlp_norm, weights, x)

    def _named_norm(
        self, name: str, weights: Mapping[str, torch.Tensor], x: torch.Tensor
    ) -> torch.Tensor:
        return self.norm(x, weights[f"{name}.weight"], weights.get(f"{name}.bias"))

    def _route(
        self, weights: Mapping[str, torch.Tensor], h: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Weights and indices of the experts of every token."""
        return route(functional.linear(h, weights[f"{ROUTER}.weight"]), self.shape)

    def _mixture(
        self,
        weights: Mapping[str, torch.Tensor],
        x: torch.Tensor,
        observe: Observer | None,
    ) -> torch.Tensor:
        """What the experts make of the residual stream x."""
        normed = self._mlp_norm(weights, x)
        of_choice, chosen = self._route(weights, normed)
        total = torch.zeros_like(x)
        for index, expert in enumerate(self.shape.mlps()):
            hit = chosen == index
            sent = hit.any(dim=-1)
            h = rotated(normed[sent], self.online.mlp_input)
            h = self._gated(expert, weights, h)
            if observe is not None:
                observe(f"{expert}.down_input", h)
            names = (f"{expert}.down_proj",)
            out = self._linears("down_input", names, weights, h)[0]
            weight = (of_choice * hit).sum(dim=-1, keepdim=True)
            total[sent] += out * weight[sent]
        return total

    def _attend(
        self,
        weights: Mapping[str, torch.Tensor],
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
    ) -> torch.Tensor:
        """Causal attention from projections ``[windows, tokens, heads * head_dim]``."""
        q, k, v = (t.unflatten(-1, (-1, self.shape.head_dim)) for t in (q, k, v))
        if self.shape.architecture.qk_norm:
            q = self.norm(q, weights["self_attn.q_norm.weight"])
            k = self.norm(k, weights["self_attn.k_norm.weight"])
        q, k = self._rope(q), self._rope(k)
        q, k = rotated(q, self.online.key), rotated(k, self.online.key)
        if self.online.kv4:
            k, v = through_cache(k), through_cache(v)
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        return self._attended(q, k, v).transpose(1, 2).flatten(2)

    def _attended(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
    ) -> torch.Tensor:
        """Values for every query, ``[windows, heads, tokens, head_dim]``."""
        tokens, scale = q.shape[2], self.shape.attention_scale
        if self.shape.attention_cap is None:
            whole = self.window is None or self.window >= tokens
            mask = None if whole else self._mask(tokens, q.device)
            return functional.scaled_dot_product_attention(
                q, k, v, mask, is_causal=whole, scale=scale, enable_gqa=True
            )
        group = self.shape.num_heads // self.shape.num_kv_heads
        k, v = (t.repeat_interleave(group, dim=1) for t in (k, v))
        scores = soft_capped(q @ k.mT * scale, self.shape.attention_cap)
        hidden = ~self._mask(tokens, q.device)
        return scores.masked_fill(hidden, -torch.inf).softmax(dim=-1) @ v

    def _mask(self, tokens: int, device: torch.device) -> torch.Tensor:
        """bool ``[tokens, tokens]``, what is attended to."""
        seen = torch.ones(tokens, tokens, dtype=torch.bool, device=device).tril()
        return seen if self.window is None else seen.triu(1 - self.window)

    def _rope(self, x: torch.Tensor) -> torch.Tensor:
        if self.rotary is None:
            return x
        positions = torch.arange(x.shape[1], device=x.device).unsqueeze(0)
        cos, sin = (t[0].unsqueeze(1) for t in self.rotary(x, positions, self.layer))
        low, high = x.chunk(2, dim=-1)
        return x * cos + torch.cat((-high, low), dim=-1) * sin


def rotated(x: torch.Tensor, rotation: Orthogonal | None) -> torch.Tensor:
    """x with a rotation, if there is one."""
    return x if rotation is None else rotation.right(x)
