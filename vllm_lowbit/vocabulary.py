# SPDX-License-Identifier: Apache-2.0
"""The vocabulary, embedding and head: in 16 bits, in 8, and inside a rotation."""

from typing import Any

import torch
from torch.nn import Parameter
from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase
from vllm.model_executor.layers.vocab_parallel_embedding import (
    ParallelLMHead,
    UnquantizedEmbeddingMethod,
)
from vllm.model_executor.utils import set_weight_attrs

from . import truth
from .errors import UnsupportedError
from .kernels import dispatch
from .kernels import ops as _ops  # noqa: F401 (registers torch.ops.lowbit)
from .kernels.grid import IntGrid
from .kernels.hadamard.signs import random_signs
from .kernels.implementations import IMPLEMENTATIONS, implementation
from .linear_kernels import KERNELS, LinearSpec
from .load_time import check_finite
from .lowbit_checkpoint import HEAD_SCALE, VOCABULARY, residual_is_online
from .parameters import (
    check_loaded,
    create_float,
    create_packed,
    take_packed,
)
from .schema import LowbitConfig
from .worker_metrics import load_time

# vLLM gives the embedding of a Llama no name.
_EMBEDDING = "model.embed_tokens"
_GRID = IntGrid(VOCABULARY.bits, VOCABULARY.symmetric)


def vocabulary_method(
    config: LowbitConfig, plain: bool, prefix: str
) -> QuantizeMethodBase:
    """The method of the embedding, or of the head.

    Args:
        config: what the model runs.
        plain: quantize a plain checkpoint while it loads; else read a lowbit one.
        prefix: name of the layer, empty for the embedding.

    Raises:
        UnsupportedError: when no backend runs it here.
    """
    name = prefix or _EMBEDDING
    method: EmbeddingMethod | Int8VocabularyMethod
    if config.scheme.vocab_bits == 16:
        method = EmbeddingMethod(config, name)
    elif plain:
        method = LoadTimeVocabularyMethod(config, name)
    else:
        method = CheckpointVocabularyMethod(config, name)
    return RotatedVocabularyMethod(method) if residual_is_online(config) else method


def _select_backend(config: LowbitConfig, name: str) -> str:
    bits = config.scheme.vocab_bits
    operator = "linear_tiled" if bits == 16 else "linear_wna16"
    case = {} if bits == 16 else {"weight_bits": bits}
    try:
        device = torch.get_default_device().type
        return dispatch.select(operator, device, **case).backend
    except ValueError as error:
        raise UnsupportedError(f"layer {name}: {error}") from None


class EmbeddingMethod(UnquantizedEmbeddingMethod):
    """vLLM's embedding in the model's dtype, with two differences.

    The head's logits do not depend on the batch, and no second, repacked copy of the
    matrix is kept.
    """

    def __init__(self, config: LowbitConfig, name: str) -> None:
        self.config, self.name = config, name
        self.backend = _select_backend(config, name)
        self.linear = IMPLEMENTATIONS["linear_tiled", self.backend]

    @load_time
    def process_weights_after_loading(self, layer: Any) -> None:
        """Raise CheckpointError for a non-finite weight."""
        check_finite(layer.weight.data, f"{self.name}.weight")
        truth.vocabulary_ready(self.config, self.backend)

    def apply(
        self,
        layer: Any,
        x: torch.Tensor,
        bias: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Logits ``[tokens, vocabulary]`` of ``x [tokens, hidden]``."""
        return self.logits(layer, x, x.dtype, bias)

    def look_up(self, layer: Any, token_ids: torch.Tensor) -> torch.Tensor:
        """Rows ``[tokens, hidden]`` in the dtype of the weight."""
        return self.embedding(layer, token_ids)

    def logits(
        self, layer: Any, x: torch.Tensor, dtype: torch.dtype, bias: torch.Tensor | None
    ) -> torch.Tensor:
        """Logits of float x, rounded to the activation dtype first."""
        return self.linear(x.to(dtype), layer.weight, bias)


class Int8VocabularyMethod(QuantizeMethodBase):
    """8-bit codes with one scale per row; subclasses create and load them.

    On the layer once it is loaded: the matrix in the form of the backend (see
    ``linear_kernels``). Rows that pad the vocabulary are 0. A tied head has none and
    reads the embedding's.
    """

    def __init__(self, config: LowbitConfig, name: str) -> None:
        self.config, self.name = config, name
        self.backend = _select_backend(config, name)
        self.tied_to: Any = None
        self.loaded = False

    def embedding(self, layer: Any, input_: torch.Tensor) -> torch.Tensor:
        """Rows ``[tokens, hidden]`` of token ids, in the activation dtype."""
        return self.look_up(layer, input_).to(layer.params_dtype)

    def apply(
        self,
        layer: Any,
        x: torch.Tensor,
        bias: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Logits ``[tokens, vocabulary]`` of ``x [tokens, hidden]``."""
        return self.logits(layer, x, x.dtype, bias)

    def tie_weights(self, layer: Any, embed_tokens: Any) -> Any:
        """Let the head read the embedding's codes, whenever they are loaded."""
        self.tied_to = embed_tokens
        for name in ("weight", "weight_packed", "weight_scale"):
            if hasattr(layer, name):
                delattr(layer, name)
        return layer

    def look_up(self, layer: Any, token_ids: torch.Tensor) -> torch.Tensor:
        """float32 rows ``[tokens, hidden]``."""
        return self.kernel.rows(layer, token_ids)

    def logits(
        self, layer: Any, x: torch.Tensor, dtype: torch.dtype, bias: torch.Tensor | None
    ) -> torch.Tensor:
        """Logits of float x in the activation dtype; x itself is not rounded."""
        source = layer if self.tied_to is None else self.tied_to
        return self.kernel.multiply(source, x, None, bias, dtype)

    def _prepare(self, rows: int, hidden_size: int) -> None:
        """Choose the kernel for a matrix ``[rows, hidden_size]`` of this shard."""
        self.kernel = KERNELS[self.backend](LinearSpec(rows, hidden_size, _GRID))

    def _keep(self, layer: Any, codes: torch.Tensor, scale: torch.Tensor) -> None:
        self.kernel.keep(layer, codes, scale, None)
        self.loaded = True
        truth.vocabulary_ready(self.config, self.backend)


class LoadTimeVocabularyMethod(Int8VocabularyMethod):
    """Quantizes the float matrix of a plain checkpoint once it is loaded."""

    uses_meta_device = True

    def create_weights(
        self,
        layer: Any,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: object,
    ) -> None:
        """Declare the float matrix."""
        rows = sum(output_partition_sizes)
        self._prepare(rows, input_size_per_partition)
        create_float(
            layer, rows, input_size_per_partition, params_dtype, extra_weight_attrs
        )

    @load_time
    def process_weights_after_loading(self, layer: Any) -> None:
        """Quantize the loaded matrix.

        Raises:
            CheckpointError: when part of it was never loaded, or it is not finite.
        """
        if self.tied_to is not None or self.loaded:
            return
        weight = layer.weight.data
        loaded = layer.shard_indices.num_org_elements * weight.shape[1]
        check_loaded(layer, f"layer {self.name}", loaded)
        check_finite(weight, f"{self.name}.weight")
        quantize = implementation("quantize_weight", weight.device.type)
        codes, scale, _ = quantize(weight, _GRID, None)
        self._keep(layer, codes, scale)


class CheckpointVocabularyMethod(Int8VocabularyMethod):
    """Unpacks the matrix of a lowbit checkpoint, and checks it on the way."""

    def create_weights(
        self,
        layer: Any,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: object,
    ) -> None:
        """Declare the packed tensors."""
        self.hidden_size = input_size_per_partition
        rows = sum(output_partition_sizes)
        self._prepare(rows, self.hidden_size)
        create_packed(layer, rows, self.hidden_size, VOCABULARY, extra_weight_attrs)

    @load_time
    def process_weights_after_loading(self, layer: Any) -> None:
        """Unpack the loaded matrix.

        Raises:
            CheckpointError: naming the tensor with a value its grid does not have.
        """
        if self.tied_to is not None:
            return
        stored = take_packed(layer)
        # vLLM fills the rows that pad the vocabulary with zero words and scales.
        real = slice(0, layer.shard_indices.num_org_elements)
        codes = stored.packed.new_zeros(
            len(stored.packed), self.hidden_size, dtype=torch.int8
        )
        codes[real] = stored.rows(real).codes(self.name, self.hidden_size, VOCABULARY)
        self._keep(layer, codes, stored.scale)


class RotatedVocabularyMethod(QuantizeMethodBase):
    """Another method of the vocabulary inside the residual stream's online rotation.

    The look-up is followed by ``x -> H(signs * x)``; the head undoes it and multiplies
    by ``input_scale``, what the final norm's weight was. Both in float32. It is no
    UnquantizedEmbeddingMethod because vLLM passes by the methods of those: it fuses
    the look-up, and multiplies by the head's weight itself for a ``head_dtype``.
    """

    def __init__(self, inner: EmbeddingMethod | Int8VocabularyMethod) -> None:
        rotation = inner.config.rotations.residual
        assert rotation is not None
        self.inner, self.rotation = inner, rotation

    def create_weights(
        self,
        layer: Any,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        """Declare the weights of the inner method, the signs and the head's scale."""
        self.inner.create_weights(
            layer,
            input_size_per_partition,
            output_partition_sizes,
            input_size,
            output_size,
            params_dtype,
            **extra_weight_attrs,
        )
        hidden_size, seed = input_size_per_partition, self.rotation.sign_seed
        signs = torch.ones(hidden_size, dtype=torch.float32)
        if seed is not None:
            signs.copy_(random_signs(seed, hidden_size))
        layer.register_buffer("signs", signs, persistent=False)
        if isinstance(layer, ParallelLMHead):
            scale = Parameter(
                torch.full((hidden_size,), torch.nan, dtype=torch.float32),
                requires_grad=False,
            )
            set_weight_attrs(scale, extra_weight_attrs)
            layer.register_parameter("input_scale", scale)

    def process_weights_after_loading(self, layer: Any) -> None:
        """As the inner method's; the head's scale has to be finite."""
        if isinstance(layer, ParallelLMHead):
            check_finite(layer.input_scale.data, HEAD_SCALE)
        self.inner.process_weights_after_loading(layer)

    def tie_weights(self, layer: Any, embed_tokens: Any) -> Any:
        """As the inner method's."""
        return self.inner.tie_weights(layer, embed_tokens)

    def embedding(self, layer: Any, input_: torch.Tensor) -> torch.Tensor:
        """Rotated rows ``[tokens, hidden]`` of token ids, in the activation dtype."""
        rows = self.inner.look_up(layer, input_)
        order, stride = self.rotation.order, self.rotation.stride
        rotated = torch.ops.lowbit.hadamard(rows, layer.signs, order, stride)
        return rotated.to(layer.params_dtype)

    def apply(
        self,
        layer: Any,
        x: torch.Tensor,
        bias: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Logits ``[tokens, vocabulary]`` of rotated ``x [tokens, hidden]``."""
        order, stride = self.rotation.order, self.rotation.stride
        undone = torch.ops.lowbit.hadamard(x, None, order, stride, transpose=True)
        undone = undone * layer.signs * layer.input_scale
        return self.inner.logits(layer, undone, x.dtype, bias)
