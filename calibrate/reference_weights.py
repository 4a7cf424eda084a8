# SPDX-License-Identifier: Apache-2.0
"""Linears and vocabulary of the reference model, on the reference operators.

Built from a plain checkpoint, float or quantized as the server does while loading, or
read from a quantized one.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open

from ..architecture import POSITIONS, ROUTER, ModelShape
from ..checkpoint import safetensors_files
from ..kernels.grid import IntGrid
from ..kernels.hadamard.signs import random_signs
from ..kernels.hadamard_quantize.reference import hadamard_quantize, transform
from ..kernels.linear_w4a4.generic import prepare
from ..kernels.linear_w4a4.reference import linear_w4a4
from ..kernels.linear_wna16.generic import linear_wna16
from ..kernels.quantize_weight.reference import quantize_weight
from ..load_time import (
    QuantizedWeight,
    activation_grid,
    equalizing_scale,
    fold_bias,
    quantize_linear,
    rotations_of,
)
from ..lowbit_checkpoint import HEAD_SCALE, VOCABULARY, PackedWeight, residual_is_online
from ..module_names import FUSED
from ..schema import LowbitConfig, Rotation, Weights
from ..takeover.foreign import ForeignFormat

Linear = Callable[[torch.Tensor], torch.Tensor]
# Last parts of the names of tensors that hold a quantized matrix.
PACKED = ("weight_packed", "weight_scale", "weight_zero_point")
# Of 8-bit codes less their zero point, or of narrower ones.
_WEIGHT_MAX = 1 << 8


@dataclass(frozen=True)
class QuantizedLinear:
    """One linear on the reference operators.

    Attributes:
        weight: codes, scales and zero points, transforms folded.
        bias: ``[n]`` or None.
        order: Hadamard order of the online input transform, 1 for none.
        stride: its stride.
        activations: grid of the input, None to leave it unquantized.
        dtype: of the server.
    """

    weight: QuantizedWeight
    bias: torch.Tensor | None
    order: int
    stride: int
    activations: IntGrid | None
    dtype: torch.dtype

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        weight = self.weight
        if self.activations is None:
            rotated = transform(x, weight.input_scale, self.order, self.stride)
            return _weight_only(
                rotated,
                weight.codes,
                weight.scale,
                weight.zero_point,
                self.bias,
                self.dtype,
            )
        grid = self.activations
        codes, scale, zero_point = hadamard_quantize(
            x,
            weight.input_scale,
            self.order,
            self.stride,
            grid.bits,
            grid.symmetric,
            grid.clip_ratio,
            grid.group_size,
        )
        return linear_w4a4(
            codes,
            scale,
            zero_point,
            weight.codes,
            weight.scale,
            weight.zero_point,
            self.bias,
            torch.float32,
        )


@dataclass(frozen=True)
class VocabularyMatrix:
    """Embedding or head, one row per token id.

    Attributes:
        values: ``[vocabulary, hidden]``, float32 or the int8 codes of 8 bits.
        scale: float32 ``[vocabulary, 1]`` of codes, None for a float matrix.
    """

    values: torch.Tensor
    scale: torch.Tensor | None = None

    def rows(self, token_ids: torch.Tensor) -> torch.Tensor:
        """float32 ``[tokens, hidden]``."""
        rows = self.values[token_ids].float()
        return rows if self.scale is None else rows * self.scale[token_ids]

    def logits(self, x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """float32 ``[tokens, vocabulary]`` of ``x [tokens, hidden]``, for a server."""
        if self.scale is None:
            return torch.nn.functional.linear(x, self.values)
        return _weight_only(x, self.values, self.scale, None, None, dtype)


@dataclass(frozen=True)
class Vocabulary:
    """Embedding and head around the residual stream.

    Attributes:
        embedding: matrix of the look-up.
        head: matrix of the logits; the same object where they are tied.
        residual: transform between them where it is online.
        signs: of it, ``[hidden]``, None for none.
        head_scale: float32 ``[hidden]``, applied once it is undone.
    """

    embedding: VocabularyMatrix
    head: VocabularyMatrix
    residual: Rotation | None = None
    signs: torch.Tensor | None = None
    head_scale: torch.Tensor | None = None

    def look_up(self, token_ids: torch.Tensor) -> torch.Tensor:
        """float32 ``[tokens, hidden]``, not yet rounded to the server's dtype."""
        rows = self.embedding.rows(token_ids)
        if self.residual is None:
            return rows
        return transform(rows, self.signs, self.residual.order, self.residual.stride)

    def logits(self, x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """float32 ``[tokens, vocabulary]``; x is what the final norm returned.

        Args:
            dtype: of the server, in which it keeps the input of a 16-bit head.
        """
        if self.residual is None:
            return self.head.logits(x, dtype)
        order, stride = self.residual.order, self.residual.stride
        x = transform(x, None, order, stride, transpose=True)
        x = x if self.signs is None else x * self.signs
        x = x if self.head_scale is None else x * self.head_scale
        x = x if self.head.scale is not None else _round(x, dtype)
        return self.head.logits(x, dtype)


class WeightReader:
    """Hands out the weights of a checkpoint that was checked; each once.

    Args:
        directory: the checkpoint.
        shape: its sizes.
        config: scheme and rotations, None for the float model.
        stored: how the matrices in the files are quantized; None where they are not,
            and are quantized here.
        dtype: of the server, to which it rounds the float tensors it reads.
    """

    def __init__(
        self,
        directory: Path,
        shape: ModelShape,
        config: LowbitConfig | None,
        stored: LowbitConfig | ForeignFormat | None,
        dtype: torch.dtype,
    ) -> None:
        self._shape, self._config = shape, config
        self._stored, self._dtype = stored, dtype
        self._tensors: dict[str, torch.Tensor] = {}
        for path in safetensors_files(directory):
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118 (not a mapping)
                    here = shape.names.here(shape.names.whole(name))
                    self._tensors[here] = file.get_tensor(name)
        self._shared_scales: dict[str, torch.Tensor] = {}
        if not isinstance(stored, ForeignFormat):
            self._split()

    def _split(self) -> None:
        """Give each linear its own ``[outputs, inputs]``, also where files have not."""
        plain, here = self._stored is None, self._shape.names.here
        stacked = set()
        for name in self._shape.tensors():
            module, _, kind = name.rpartition(".")
            kinds = [kind] if plain or kind != "weight" else [kind, *PACKED]
            for one in (f"{module}.{kind}" for kind in kinds):
                where = self._shape.in_plain if plain else self._shape.in_lowbit
                stored, rows = where(one)
                file_name = one if rows == slice(None) else here(stored)
                if file_name not in self._tensors:
                    continue
                tensor = self._tensors[file_name]
                if plain and self._shape.is_transposed(name):
                    tensor = tensor.t()
                self._tensors[one] = tensor[rows].contiguous()
                if file_name != one:
                    stacked.add(file_name)
        for name in stacked:
            del self._tensors[name]

    def norms(self) -> dict[str, torch.Tensor]:
        """Weights and biases of the norms, float32 ``[hidden]``, by their names."""
        ends = ("norm.weight", "norm.bias")
        names = [name for name in self._tensors if name.endswith(ends)]
        return {name: self._float(name) for name in names}

    def positions(self) -> torch.Tensor | None:
        """Learned ones from that of the first token on, float32 ``[n, hidden]``."""
        if not self._shape.positions:
            return None
        return self._float(POSITIONS)[self._shape.architecture.position_rows :]

    def routers(self) -> dict[str, torch.Tensor]:
        """float32 ``[experts, hidden]`` of each layer, by the tensor's name."""
        names = [name for name in self._tensors if name.endswith(f".{ROUTER}.weight")]
        return {name: self._float(name) for name in names}

    def linears(self) -> dict[str, Linear]:
        """Every linear as vLLM fuses it, by the name of the fused module.

        Those of experts are named one by one.
        """
        of_mlp = (self._shape.mlp_input, "down_proj")
        blocks = [("self_attn", ("qkv_proj", "o_proj"))]
        blocks += [(mlp, of_mlp) for mlp in self._shape.mlps()]
        linears = {}
        for layer in range(self._shape.num_layers):
            prefix = f"model.layers.{layer}."
            if self._shape.num_experts and self._config and self._stored is None:
                self._shared_scales[prefix] = self._scale_of_experts(prefix)
            for block, names in blocks:
                for name in names:
                    module = f"{prefix}{block}.{name}"
                    linears[module] = self._linear(f"{prefix}{block}", name)
        return linears

    def vocabulary(self) -> Vocabulary:
        """Embedding and head."""
        embedding = self._matrix("model.embed_tokens")
        tied = self._shape.tie_word_embeddings
        head = embedding if tied else self._matrix("lm_head")
        if self._config is None or not residual_is_online(self._config):
            return Vocabulary(embedding, head)
        residual = self._config.rotations.residual
        assert residual is not None
        signs = None
        if residual.sign_seed is not None:
            signs = random_signs(residual.sign_seed, self._shape.hidden_size).float()
        return Vocabulary(
            embedding, head, residual, signs, self._tensors.pop(HEAD_SCALE)
        )

    def _float(self, name: str) -> torch.Tensor:
        return _round(self._tensors.pop(name), self._dtype)

    def _matrix(self, module: str) -> VocabularyMatrix:
        if self._config is None or self._config.scheme.vocab_bits == 16:
            return VocabularyMatrix(self._float(f"{module}.weight"))
        if self._stored is not None:
            weight = self._unpack(module, self._shape.hidden_size, VOCABULARY)
            return VocabularyMatrix(weight.codes, weight.scale)
        grid = IntGrid(VOCABULARY.bits, VOCABULARY.symmetric)
        codes, scale, _ = quantize_weight(self._float(f"{module}.weight"), grid, None)
        return VocabularyMatrix(codes, scale)

    def _linear(self, block: str, name: str) -> Linear:
        parts = FUSED[name]
        biases = [f"{block}.{part}.bias" for part in parts]
        found = [self._float(name) for name in biases if name in self._tensors]
        bias = torch.cat(found) if found else None
        if self._config is None:
            weights = [self._float(f"{block}.{part}.weight") for part in parts]
            weight = torch.cat(weights)
            return lambda x: torch.nn.functional.linear(x, weight, bias)
        if self._stored is not None:
            quantized = self._read(block, name)
        else:
            quantized, bias = self._quantize(block, name, bias)
        online = rotations_of(self._config.rotations, parts[0]).online_input
        return QuantizedLinear(
            weight=quantized,
            bias=bias,
            order=1 if online is None else online.order,
            stride=1 if online is None else online.stride,
            activations=activation_grid(self._config.scheme, f"{block}.{name}"),
            dtype=self._dtype,
        )

    def _quantize(
        self, block: str, name: str, bias: torch.Tensor | None
    ) -> tuple[QuantizedWeight, torch.Tensor | None]:
        """Fold and quantize the float weight as the server does while loading."""
        assert self._config is not None
        stack = [self._float(f"{block}.{part}.weight") for part in FUSED[name]]
        sizes = [len(rows) for rows in stack]
        around = [rotations_of(self._config.rotations, part) for part in FUSED[name]]
        weights = self._config.scheme.weights
        shared = None
        if name == "gate_up_proj":
            shared = self._shared_scales.get(block.partition("mlp.")[0])
        quantized = quantize_linear(torch.cat(stack), sizes, around, weights, shared)
        if bias is not None:
            # The server has it in its dtype, before and after.
            bias = fold_bias(bias.to(self._dtype), sizes, around).float()
        return quantized, bias

    def _scale_of_experts(self, prefix: str) -> torch.Tensor:
        """Of the input that all experts of a layer read, ``[hidden]``."""
        names = [
            f"{prefix}{expert}.{part}.weight"
            for expert in self._shape.mlps()
            for part in FUSED["gate_up_proj"]
        ]
        stack = [_round(self._tensors[name], self._dtype) for name in names]
        return equalizing_scale(torch.cat(stack))

    def _read(self, block: str, name: str) -> QuantizedWeight:
        assert self._config is not None
        columns = {
            "o_proj": self._shape.num_heads * self._shape.head_dim,
            "down_proj": self._shape.intermediate_size,
        }.get(name, self._shape.hidden_size)
        weights = self._config.scheme.weights
        parts = [
            self._convert(f"{block}.{part}", columns, self._stored)
            if isinstance(self._stored, ForeignFormat)
            else self._unpack(f"{block}.{part}", columns, weights)
            for part in FUSED[name]
        ]
        zero_points = [p.zero_point for p in parts if p.zero_point is not None]
        return QuantizedWeight(
            torch.cat([part.codes for part in parts]),
            torch.cat([part.scale for part in parts]),
            torch.cat(zero_points) if zero_points else None,
            None,
        )

    def _convert(
        self, module: str, columns: int, foreign: ForeignFormat
    ) -> QuantizedWeight:
        rows = self._shape.tensors()[f"{module}.weight"][0]
        tensors = {
            kind: self._tensors.pop(f"{module}.{kind}")
            for kind in foreign.layouts(rows, columns)
        }
        return foreign.convert(module, tensors, rows, columns)

    def _unpack(self, module: str, columns: int, weights: Weights) -> QuantizedWeight:
        stored = PackedWeight(
            self._tensors.pop(f"{module}.weight_packed"),
            self._tensors.pop(f"{module}.weight_scale"),
            self._tensors.pop(f"{module}.weight_zero_point", None),
        )
        codes = stored.codes(module, columns, weights)
        return QuantizedWeight(codes, stored.scale, stored.zero_point, None)


def _weight_only(
    x: torch.Tensor,
    codes: torch.Tensor,
    scale: torch.Tensor,
    zero_point: torch.Tensor | None,
    bias: torch.Tensor | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    """float32 ``[tokens, n]``, in the fixed point that a server of a dtype computes in.

    A 4-bit code of the KV cache, or a bfloat16 logit, may hang on its last bit.
    """
    weight = prepare(codes, zero_point)
    return linear_wna16(x, weight, scale, bias, _WEIGHT_MAX, dtype).float()


def _round(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return x.to(dtype).float()
