# SPDX-License-Identifier: Apache-2.0
"""KV4 attention by the compiled kernels, bit-equal to ``generic``."""

from ctypes import byref

import torch

from ..cpu import library
from ..cpu.library import (
    AttentionArguments,
    optional_pointer,
    pointer,
    type_code,
)
from ..hadamard.cpu import arguments as transform_arguments
from ..kv4_store.cpu import head_strides
from ..kv4_store.layout import check_cache
from .generic import score_factors, split_size
from .reference import check_heads

_NO_WINDOW = 1 << 40


def kv4_attention(
    query: torch.Tensor,
    kv_cache: torch.Tensor,
    block_table: torch.Tensor,
    query_start_loc: torch.Tensor,
    seq_lens: torch.Tensor,
    softmax_scale: float,
    sliding_window: int | None,
    logits_soft_cap: float | None,
    sinks: torch.Tensor | None,
    rotate_query: bool,
) -> torch.Tensor:
    """As ``generic``, of which it computes every bit.

    Raises:
        ValueError: as generic; for pages whose size is not a multiple of 16; for
            arguments of another form, and for a sequence with a page that the cache
            lacks.
    """
    check_heads(query, kv_cache)
    cached = check_cache(kv_cache)
    blocks, kv_heads, block_size, _ = kv_cache.shape
    split_size(block_size)
    if block_size % 16:
        raise ValueError(f"block_size must be a multiple of 16, got {block_size}")
    tokens, heads, head_dim = query.shape
    if head_dim != cached:
        raise ValueError(f"query has head_dim {head_dim}, kv_cache {cached}")
    table = block_table.to(torch.int32)
    table = table if table.stride(1) == 1 else table.contiguous()
    starts = query_start_loc.to(torch.int32).contiguous()
    lengths = seq_lens.to(torch.int32).contiguous()
    num_seqs = lengths.shape[0]
    factor, cap_factor = score_factors(softmax_scale, logits_soft_cap)
    out = torch.empty(query.shape, dtype=query.dtype)
    arguments = AttentionArguments(
        query=query.data_ptr(),
        query_strides=head_strides(query, "query"),
        type=type_code(query.dtype, "query"),
        cache=kv_cache.data_ptr(),
        num_blocks=blocks,
        num_kv_heads=kv_heads,
        block_size=block_size,
        head_dim=head_dim,
        block_stride=kv_cache.stride(0),
        head_stride=kv_cache.stride(1),
        block_table=table.data_ptr(),
        table_stride=table.stride(0),
        table_width=table.shape[1],
        starts=pointer(starts, "query_start_loc", torch.int32, (num_seqs + 1,)),
        seq_lens=lengths.data_ptr(),
        num_seqs=num_seqs,
        num_heads=heads,
        window=_NO_WINDOW if sliding_window is None else sliding_window,
        score_factor=factor,
        cap_factor=cap_factor,
        capped=logits_soft_cap is not None,
        sinks=optional_pointer(sinks, "sinks", torch.float32, (heads,)),
        out=out.data_ptr(),
    )
    transform = byref(transform_arguments(head_dim, 1, False)) if rotate_query else None
    if not library.functions().kv4_attention(byref(arguments), transform):
        raise ValueError(f"block_table names pages outside of the {blocks} of kv_cache")
    return out
