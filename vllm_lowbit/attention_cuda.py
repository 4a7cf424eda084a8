# SPDX-License-Identifier: Apache-2.0
"""The packed 4-bit cache on CUDA and ROCm: workspace, CUDA graphs, decodes apart."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from vllm.config import VllmConfig
from vllm.v1.attention.backend import (
    AttentionCGSupport,
    AttentionLayer,
    CommonAttentionMetadata,
)
from vllm.v1.attention.backends.utils import split_decodes_and_prefills
from vllm.v1.kv_cache_interface import AttentionSpec

from .attention import (
    KV4AttentionBackend,
    KV4AttentionImpl,
    KV4Metadata,
    KV4MetadataBuilder,
)
from .errors import UnsupportedError
from .kernels.kv4_attention.triton import workspace_elements
from .kernels.kv4_store.triton import rotation_table

# A page of this size is one tile of the attention kernel.
PREFERRED_BLOCK_SIZE = 64


@dataclass
class KV4CudaMetadata(KV4Metadata):
    """One step's decodes, which come first in the batch, and the rest.

    Attributes:
        num_decodes: sequences of up to the reorder threshold's query tokens.
        num_decode_tokens: their tokens.
        prefill_start_loc: ``query_start_loc`` of the others, from 0 on; None without.
        workspace: of the kernels, shared by all layers.
    """

    num_decodes: int
    num_decode_tokens: int
    prefill_start_loc: torch.Tensor | None
    workspace: torch.Tensor


class KV4CudaMetadataBuilder(KV4MetadataBuilder):
    """Separates decodes from prefills and holds the workspace.

    A CUDA graph is captured for batches of decodes alone: launches depend on their
    number and not on lengths, and the tensors are vLLM's persistent ones.
    """

    _cudagraph_support: ClassVar[AttentionCGSupport] = AttentionCGSupport.UNIFORM_BATCH

    def __init__(
        self,
        kv_cache_spec: AttentionSpec,
        layer_names: list[str],
        vllm_config: VllmConfig,
        device: torch.device,
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        self._init_reorder_batch_threshold(1, supports_spec_as_decode=True)
        model, parallel = vllm_config.model_config, vllm_config.parallel_config
        scheduler = vllm_config.scheduler_config
        compilation = vllm_config.compilation_config
        block_size = kv_cache_spec.block_size
        self.max_blocks = -(-model.max_model_len // block_size)
        elements = workspace_elements(
            max(
                scheduler.max_num_batched_tokens,
                compilation.max_cudagraph_capture_size or 0,
            ),
            model.get_num_attention_heads(parallel),
            kv_cache_spec.num_kv_heads,
            kv_cache_spec.head_size,
            self.max_blocks * block_size,
            device,
        )
        self.workspace = torch.empty(elements, dtype=torch.float32, device=device)

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> KV4CudaMetadata:
        base = super().build(common_prefix_len, common_attn_metadata, fast_build)
        # From vLLM's copy of the lengths on the host: nothing waits for the device.
        decodes, prefills, decode_tokens, _ = split_decodes_and_prefills(
            common_attn_metadata, self.reorder_batch_threshold or 1
        )
        starts = base.query_start_loc
        return KV4CudaMetadata(
            base.num_actual_tokens,
            starts,
            base.seq_lens,
            # The workspace has room for the longest context, not for a wider table.
            base.block_table[:, : self.max_blocks],
            decodes,
            decode_tokens,
            starts[decodes:] - decode_tokens if prefills else None,
            self.workspace,
        )

    def build_for_cudagraph_capture(
        self, common_attn_metadata: CommonAttentionMetadata
    ) -> KV4CudaMetadata:
        """As build, of the shortest contexts there are: capture runs the kernels."""
        common = common_attn_metadata
        common.seq_lens.fill_(common.max_query_len)
        return self.build(0, common)


class KV4CudaAttentionBackend(KV4AttentionBackend):
    """As the base, with Triton kernels."""

    @staticmethod
    def get_impl_cls() -> type["KV4CudaAttentionImpl"]:
        return KV4CudaAttentionImpl

    @staticmethod
    def get_builder_cls() -> type[KV4CudaMetadataBuilder]:
        return KV4CudaMetadataBuilder

    @classmethod
    def get_preferred_block_size(cls, default_block_size: int) -> int:
        return PREFERRED_BLOCK_SIZE


class KV4CudaAttentionImpl(KV4AttentionImpl):
    """Stores into and attends over the packed pages of one layer on a GPU."""

    def prepare(self, device: torch.device) -> None:
        """Copy what kernels read to the device, before any graph is captured."""
        rotation_table(self.head_size, device)

    def fused_rope_kvcache_supported(self) -> bool:
        return True

    def do_rope_and_kv_cache_update(
        self,
        layer: AttentionLayer,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        positions: torch.Tensor,
        cos_sin_cache: torch.Tensor,
        is_neox: bool,
        kv_cache: torch.Tensor,
        layer_slot_mapping: torch.Tensor,
    ) -> None:
        """Rotate the step's queries and keys in place and quantize K and V.

        Called in place of RoPE and :meth:`do_kv_cache_update` where vLLM fuses them.
        """
        if not is_neox or cos_sin_cache.shape[1] != self.head_size:
            pairs = "halves" if is_neox else "neighbours"
            raise UnsupportedError(
                f"pass_config.fuse_rope_kvcache: RoPE over {cos_sin_cache.shape[1]} of "
                f"{self.head_size} elements that are paired as {pairs}; the fused "
                "kernel rotates whole heads paired as halves: leave the option off"
            )
        torch.ops.lowbit.rope_kv4_store(
            query,
            key,
            value,
            positions,
            cos_sin_cache,
            kv_cache,
            layer_slot_mapping,
            self.rotate,
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
            self.prepare(query.device)
            return output.zero_()
        if not isinstance(attn_metadata, KV4CudaMetadata):
            raise UnsupportedError(
                f"attention metadata of type {type(attn_metadata).__name__} on a GPU, "
                "expected KV4CudaMetadata"
            )
        metadata, split = attn_metadata, attn_metadata.num_decode_tokens
        first = metadata.num_decodes
        parts = []
        if split:
            starts = metadata.query_start_loc[: first + 1]
            parts.append((slice(0, split), slice(0, first), starts))
        if metadata.prefill_start_loc is not None:
            rows = slice(split, metadata.num_actual_tokens)
            parts.append((rows, slice(first, None), metadata.prefill_start_loc))
        for rows, sequences, starts in parts:
            torch.ops.lowbit.kv4_attention_out(
                query[rows],
                kv_cache,
                metadata.block_table[sequences],
                starts,
                metadata.seq_lens[sequences],
                self.scale,
                self.sliding_window,
                self.logits_soft_cap,
                self.sinks,
                self.rotate,
                output[rows],
                metadata.workspace,
            )
        return output
