# SPDX-License-Identifier: Apache-2.0
"""Attention over the packed 4-bit paged cache, as a vLLM attention backend."""

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig
from vllm.model_executor.layers.quantization.kv_cache import BaseKVCacheMethod
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionImpl,
    AttentionLayer,
    AttentionMetadata,
    AttentionMetadataBuilder,
    CommonAttentionMetadata,
)
from vllm.v1.attention.backends.registry import AttentionBackendEnum
from vllm.v1.kv_cache_interface import AttentionSpec, KVCacheLayout

from . import truth
from .errors import UnsupportedError
from .kernels import ops as _ops  # noqa: F401 (registers torch.ops.lowbit)
from .kernels.kv4_store.layout import HEAD_DIMS, bytes_per_token
from .schema import LowbitConfig


class KV4CacheMethod(BaseKVCacheMethod):
    """Gives a decoder attention layer the packed cache and its kernels."""

    def __init__(self, quant_config: QuantizationConfig, config: LowbitConfig) -> None:
        super().__init__(quant_config)
        self.config = config

    def create_weights(self, layer: Any) -> None:
        """Replace the layer's backend; called at the end of its constructor."""
        stock = layer.impl
        layer.attn_backend = backend_class()
        layer.backend = AttentionBackendEnum.CUSTOM
        layer.impl = layer.attn_backend.get_impl_cls()(
            layer.num_heads,
            layer.head_size,
            stock.scale,
            layer.num_kv_heads,
            sliding_window=layer.sliding_window,
            logits_soft_cap=getattr(stock, "logits_soft_cap", None) or None,
            sinks=stock.sinks if layer.has_sink else None,
            rotate=self.config.rotations.k is not None,
        )

    def process_weights_after_loading(self, layer: Any) -> None:
        """Nothing was loaded; confirm that the layer still is what was asked for."""
        if not isinstance(layer.impl, KV4AttentionImpl):
            raise UnsupportedError(
                f"layer {layer.layer_name} would run {type(layer.impl).__name__} "
                "instead of the 4-bit cache"
            )
        truth.attention_ready(self.config, layer)


def backend_class() -> type["KV4AttentionBackend"]:
    """The backend of the platform that vLLM runs on."""
    from vllm.platforms import current_platform

    if current_platform.device_type == "cuda":
        from .attention_cuda import KV4CudaAttentionBackend

        return KV4CudaAttentionBackend
    return KV4AttentionBackend


@dataclass
class KV4Metadata(AttentionMetadata):
    """What one step's attention needs; tensors as in ``kv4_attention``."""

    num_actual_tokens: int
    query_start_loc: torch.Tensor
    seq_lens: torch.Tensor
    block_table: torch.Tensor


class KV4MetadataBuilder(AttentionMetadataBuilder[KV4Metadata]):
    """Picks the operator's arguments out of vLLM's common metadata."""

    def __init__(
        self,
        kv_cache_spec: AttentionSpec,
        layer_names: list[str],
        vllm_config: object,
        device: torch.device,
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        width = bytes_per_token(kv_cache_spec.head_size)
        if kv_cache_spec.state_content_bytes != width:
            raise UnsupportedError(
                f"layer {layer_names[0]}: vLLM allocates "
                f"{kv_cache_spec.state_content_bytes} bytes per token and head, the "
                f"4-bit cache has {width}"
            )

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> KV4Metadata:
        common = common_attn_metadata
        if common.causal is not True:
            raise UnsupportedError("the 4-bit cache supports causal attention only")
        return KV4Metadata(
            num_actual_tokens=common.num_actual_tokens,
            query_start_loc=common.query_start_loc[: common.num_reqs + 1],
            seq_lens=common.seq_lens[: common.num_reqs],
            block_table=common.block_table_tensor[: common.num_reqs],
        )


class KV4AttentionBackend(AttentionBackend):
    """Pages of uint8 ``[blocks, num_kv_heads, block_size, head_dim + 8]``."""

    forward_includes_kv_cache_update = False
    supported_dtypes: ClassVar[list[torch.dtype]] = [
        torch.float32,
        torch.bfloat16,
        torch.float16,
    ]
    supported_kv_cache_dtypes: ClassVar[list[str]] = ["auto"]

    @staticmethod
    def get_name() -> str:
        return AttentionBackendEnum.CUSTOM.name

    @staticmethod
    def get_impl_cls() -> type["KV4AttentionImpl"]:
        return KV4AttentionImpl

    @staticmethod
    def get_builder_cls() -> type[KV4MetadataBuilder]:
        return KV4MetadataBuilder

    @staticmethod
    def get_supported_kernel_block_sizes(
        kv_cache_spec: object = None,
    ) -> list[int]:
        return [16, 32, 64, 128, 256]

    @classmethod
    def get_supported_head_sizes(cls) -> list[int]:
        return list(HEAD_DIMS)

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[KVCacheLayout, ...]:
        # Pages are planar per head: heads come before tokens.
        return (KVCacheLayout.LBHNC,)

    @classmethod
    def supports_sliding_window(cls) -> bool:
        return True

    @classmethod
    def supports_sink(cls) -> bool:
        return True

    @classmethod
    def supports_kv_connector(cls) -> bool:
        return False

    @classmethod
    def customize_spec(cls, spec: AttentionSpec) -> AttentionSpec:
        """Size vLLM's block pool for packed pages."""
        return replace(
            spec,
            dtype=torch.uint8,
            state_content_bytes=bytes_per_token(spec.head_size),
        )


class KV4AttentionImpl(AttentionImpl):
    """Stores into and attends over the packed pages of one layer."""

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int,
        sliding_window: int | None,
        logits_soft_cap: float | None,
        sinks: torch.Tensor | None,
        rotate: bool,
    ) -> None:
        self.num_heads = num_heads
        self.head_size = head_size
        self.scale = scale
        self.num_kv_heads = num_kv_heads
        self.sliding_window = sliding_window
        self.logits_soft_cap = logits_soft_cap
        # The model's parameter, for this rank's heads: it is loaded later.
        self.model_sinks = self.sinks = sinks
        self.rotate = rotate

    def process_weights_after_loading(self, act_dtype: torch.dtype) -> None:
        """Take the loaded sinks in float32; later ones in place, for CUDA graphs."""
        if self.sinks is None or self.model_sinks is None:
            return
        loaded = self.model_sinks.detach().float()
        if self.sinks is self.model_sinks:
            self.sinks = loaded
        else:
            self.sinks.copy_(loaded)

    def do_kv_cache_update(
        self,
        layer: Attention,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        slot_mapping: torch.Tensor,
    ) -> None:
        """Quantize the step's K and V ``[tokens, num_kv_heads, head_size]``."""
        tokens = slot_mapping.shape[0]
        torch.ops.lowbit.kv4_store(
            key[:tokens], value[:tokens], kv_cache, slot_mapping, self.rotate
        )

    def forward(
        self,
        layer: AttentionLayer,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: KV4Metadata | None,
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Attend ``query [tokens, num_heads, head_size]`` into ``output``.

        Without metadata (vLLM's profiling run) the output is zero.
        """
        if output_scale is not None or output_block_scale is not None:
            raise UnsupportedError("fused output quantization is not supported")
        if attn_metadata is None:
            return output.zero_()
        tokens = attn_metadata.num_actual_tokens
        output[:tokens] = torch.ops.lowbit.kv4_attention(
            query[:tokens],
            kv_cache,
            attn_metadata.block_table,
            attn_metadata.query_start_loc,
            attn_metadata.seq_lens,
            self.scale,
            self.sliding_window,
            self.logits_soft_cap,
            self.sinks,
            self.rotate,
        )
        return output
