# SPDX-License-Identifier: Apache-2.0
"""A Llama in plain torch that computes what the server is asked to compute.

It runs the reference operators, one sequence at a time. The served model is tested
against it; perplexities "by the reference" come from it.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from ..architecture import LlamaShape, check_scheme, flag_only_rotations
from ..checkpoint import check_plain_checkpoint, safetensors_files
from ..kernels.grid import IntGrid, kv_decode, kv_encode, kv_parameters
from ..kernels.hadamard.generic import hadamard
from ..kernels.hadamard_quantize.reference import hadamard_quantize, transform
from ..kernels.linear_w4a4.reference import linear_w4a4
from ..kernels.linear_wna16.reference import linear_wna16
from ..load_time import (
    FUSED,
    QuantizedWeight,
    fold_bias,
    quantize_linear,
    rotations_of,
)
from ..schema import LowbitConfig, Scheme

Linear = Callable[[torch.Tensor], torch.Tensor]
_LINEARS = (
    ("self_attn", "qkv_proj"),
    ("self_attn", "o_proj"),
    ("mlp", "gate_up_proj"),
    ("mlp", "down_proj"),
)


def read_tensors(directory: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor of a checkpoint's safetensors files, one at a time."""
    for path in safetensors_files(directory):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 (not a mapping)
                yield name, file.get_tensor(name)


def load_time_config(model: str, scheme: Scheme) -> LowbitConfig:
    """The config the server resolves for a plain checkpoint and a scheme.

    Raises:
        UnsupportedError: as the server would.
    """
    shape, source = _read_shape(model)
    check_scheme(shape, scheme, source)
    return LowbitConfig(
        scheme=scheme, rotations=flag_only_rotations(shape, scheme, source)
    )


@dataclass
class QuantizedLinear:
    """One linear on the reference operators.

    Attributes:
        weight: codes, scales and zero points, transforms folded.
        bias: ``[n]`` or None.
        order: Hadamard order of the online input transform, 1 for none.
        stride: its stride.
        activations: grid of the input, None to leave it unquantized.
    """

    weight: QuantizedWeight
    bias: torch.Tensor | None
    order: int
    stride: int
    activations: IntGrid | None

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        weight, dtype = self.weight, torch.float32
        if self.activations is None:
            rotated = transform(x, weight.input_scale, self.order, self.stride)
            return linear_wna16(
                rotated, weight.codes, weight.scale, weight.zero_point, self.bias, dtype
            )
        grid = self.activations
        codes, scale, zero_point = hadamard_quantize(
            x, weight.input_scale, self.order, self.stride, grid.bits, grid.symmetric
        )
        return linear_w4a4(
            codes,
            scale,
            zero_point,
            weight.codes,
            weight.scale,
            weight.zero_point,
            self.bias,
            dtype,
        )


class ReferenceLlama:
    """Llama forward over one sequence; ``config`` None is the float model.

    Everything is computed in float32; what a server holds in its dtype between two
    operators is rounded to ``dtype``, once, at the places where a compiled model
    rounds.

    Args:
        model: local directory of a plain checkpoint.
        config: scheme and rotations, as resolved by :func:`load_time_config`.
        dtype: of the server that is mirrored.

    Raises:
        CheckpointError, UnsupportedError: as the server would.
    """

    def __init__(
        self,
        model: str,
        config: LowbitConfig | None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.shape, _ = _read_shape(model)
        check_plain_checkpoint(model, self.shape)
        self.config, self.dtype = config, dtype
        hf_config = LlamaConfig.from_pretrained(model)
        self.eps = float(hf_config.rms_norm_eps)
        self.rotary = LlamaRotaryEmbedding(hf_config)
        self.tensors = {k: v.float() for k, v in read_tensors(Path(model))}
        head = "model.embed_tokens" if self.shape.tie_word_embeddings else "lm_head"
        self.head = self.tensors[f"{head}.weight"]
        self.linears = {
            f"model.layers.{layer}.{block}.{name}": self._linear(
                f"model.layers.{layer}.{block}", name
            )
            for layer in range(self.shape.num_layers)
            for block, name in _LINEARS
        }

    def _linear(self, block: str, name: str) -> Linear:
        """A linear as vLLM fuses it; its float weights are released if quantized."""
        parts = FUSED[name]
        stack = [self.tensors.pop(f"{block}.{part}.weight") for part in parts]
        weight = torch.cat(stack)
        names = [f"{block}.{part}.bias" for part in parts]
        biases = [self.tensors[name] for name in names if name in self.tensors]
        if self.config is None:
            bias = torch.cat(biases) if biases else None
            return lambda x: torch.nn.functional.linear(x, weight, bias)
        sizes = [len(rows) for rows in stack]
        around = [rotations_of(self.config.rotations, part) for part in parts]
        online = around[0].online_input
        activations = self.config.scheme.activations
        return QuantizedLinear(
            weight=quantize_linear(weight, sizes, around, self.config.scheme.weights),
            bias=fold_bias(torch.cat(biases), sizes, around) if biases else None,
            order=1 if online is None else online.order,
            stride=1 if online is None else online.stride,
            activations=None
            if activations.bits == 16
            else IntGrid(activations.bits, activations.symmetric),
        )

    @torch.no_grad()
    def __call__(self, token_ids: torch.Tensor) -> torch.Tensor:
        """Logits float32 ``[tokens, vocabulary]`` of token_ids ``[tokens]``."""
        x = self.tensors["model.embed_tokens.weight"][token_ids]
        positions = torch.arange(len(token_ids)).unsqueeze(0)
        cos, sin = (self._round(t[0]) for t in self.rotary(x, positions))
        residual = torch.zeros_like(x)
        for layer in range(self.shape.num_layers):
            prefix = f"model.layers.{layer}."
            h, residual = self._add_norm(x, residual, prefix + "input_layernorm")
            h = self._attention(h, prefix, cos, sin)
            x = self._run(prefix + "self_attn.o_proj", h)
            h, residual = self._add_norm(
                x, residual, prefix + "post_attention_layernorm"
            )
            h = self._run(prefix + "mlp.gate_up_proj", h)
            x = self._run(prefix + "mlp.down_proj", self._silu_and_mul(h))
        h, _ = self._add_norm(x, residual, "model.norm")
        return self._round(torch.nn.functional.linear(h, self.head))

    def _round(self, x: torch.Tensor) -> torch.Tensor:
        return x.to(self.dtype).float()

    def _run(self, linear: str, x: torch.Tensor) -> torch.Tensor:
        return self._round(self.linears[linear](x))

    def _add_norm(
        self, x: torch.Tensor, residual: torch.Tensor, name: str
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """RMSNorm of ``x + residual``, and that sum as the new residual.

        The norm sees the sum before it is rounded into the residual stream.
        """
        x = x + residual
        variance = x.pow(2).mean(dim=-1, keepdim=True)
        normed = x * torch.rsqrt(variance + self.eps)
        return self._round(normed * self.tensors[f"{name}.weight"]), self._round(x)

    def _silu_and_mul(self, gate_up: torch.Tensor) -> torch.Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        return self._round(torch.nn.functional.silu(gate) * up)

    def _rope(
        self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
    ) -> torch.Tensor:
        """Rotary embedding, half-split layout, of ``x [tokens, heads, head_dim]``."""
        low, high = x.chunk(2, dim=-1)
        rotated = torch.cat((-high, low), dim=-1)
        return self._round(x * cos.unsqueeze(1) + rotated * sin.unsqueeze(1))

    def _attention(
        self, h: torch.Tensor, prefix: str, cos: torch.Tensor, sin: torch.Tensor
    ) -> torch.Tensor:
        shape = self.shape
        qkv = self._run(prefix + "self_attn.qkv_proj", h)
        q, k, v = qkv.unflatten(-1, (-1, shape.head_dim)).split(
            [shape.num_heads, shape.num_kv_heads, shape.num_kv_heads], dim=1
        )
        q, k = (self._rope(t, cos, sin) for t in (q, k))
        if self.config is not None and self.config.rotations.k is not None:
            q, k = hadamard(q, shape.head_dim), hadamard(k, shape.head_dim)
        if self.config is not None and self.config.scheme.kv_cache.bits == 4:
            k, v = _through_cache(k), _through_cache(v)
        group = shape.num_heads // shape.num_kv_heads
        k, v = (t.repeat_interleave(group, dim=1).double() for t in (k, v))
        scores = torch.einsum("qhd,thd->hqt", q.double(), k) * shape.head_dim**-0.5
        hidden = torch.ones(scores.shape[1:], dtype=torch.bool).triu(1)
        probabilities = scores.masked_fill(hidden, -torch.inf).softmax(dim=-1)
        attended = torch.einsum("hqt,thd->qhd", probabilities, v)
        return self._round(attended.flatten(1))


def _through_cache(x: torch.Tensor) -> torch.Tensor:
    scale, zero = kv_parameters(x)
    return kv_decode(kv_encode(x, scale, zero), scale, zero)


def _read_shape(model: str) -> tuple[LlamaShape, str]:
    source = f"{model}/config.json"
    config: dict[str, Any] = json.loads(Path(source).read_text())
    return LlamaShape.from_config(config, source), source
