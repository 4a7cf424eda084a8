# SPDX-License-Identifier: Apache-2.0
"""Decode attention over a long context: 4-bit pages against vLLM's own cache.

Every layer of a model reads another cache, so the calls rotate through enough of them
to exceed the last-level cache.
"""

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from .linear import ROTATION_BYTES
from .options import Options

NAME = "attention"
NUM_HEADS = 32
NUM_KV_HEADS = 8
BLOCK_SIZE = 128
HEAD_DIMS = (64, 128)
CONTEXTS = (8192, 32768)
BATCHES = (1, 8)
STOCK_BF16, STOCK_FP8, OURS = "vLLM bf16", "vLLM fp8", "lowbit KV4"
CACHE_DTYPES = {STOCK_BF16: "auto", STOCK_FP8: "fp8_e4m3"}
CALL_SECONDS = 1.5
MIN_CALLS = 5

# query bf16 [batch, heads, head_dim] and a cache -> the shape of query
Attend = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
# Tokens stored at a time.
CHUNK = 1 << 14


def cells(options: Options) -> list[str]:
    """One for each kind of cache and head size."""
    kinds = (STOCK_BF16, STOCK_FP8, OURS)
    return [f"{kind}, head size {size}" for size in HEAD_DIMS for kind in kinds]


def measure(cell: str, options: Options) -> dict[str, Any]:
    """Seconds of one call, by ``context x batch``."""
    kind, _, size = cell.rpartition(", head size ")
    contexts = CONTEXTS if not options.quick else (512, 1024)
    return {
        f"{context} x {batch}": _case(kind, int(size), context, batch, options)
        for context in contexts
        for batch in BATCHES
    }


def _case(
    kind: str, head_dim: int, context: int, batch: int, options: Options
) -> dict[str, Any]:
    make = _lowbit if kind == OURS else _stock
    attend, cache = make(kind, head_dim, context, batch)
    rotation = ROTATION_BYTES >> 5 * options.quick
    copies = max(1, -(-rotation // cache.nbytes))
    caches = [cache] + [cache.clone() for _ in range(copies - 1)]
    generator = torch.Generator().manual_seed(1)
    shape = (batch, NUM_HEADS, head_dim)
    query = torch.randn(shape, generator=generator).bfloat16()
    limit = CALL_SECONDS if not options.quick else 0.05
    attend(query, caches[-1])
    calls: list[float] = []
    while len(calls) < MIN_CALLS or sum(calls) < limit:
        cache = caches[len(calls) % copies]
        started = time.perf_counter()
        attend(query, cache)
        calls.append(time.perf_counter() - started)
    calls.sort()
    return {
        "head_dim": head_dim,
        "context": context,
        "batch": batch,
        "cache_bytes": cache.nbytes,
        "copies": copies,
        "median": statistics.median(calls),
        "p10": calls[len(calls) // 10],
        "p90": calls[len(calls) * 9 // 10],
        "calls": len(calls),
    }


def _pages(context: int, batch: int) -> torch.Tensor:
    """Block table int32 ``[batch, blocks]``: pages in the order they were taken.

    Sequences that grow together take their pages in turns.
    """
    blocks = context // BLOCK_SIZE
    return torch.arange(blocks * batch, dtype=torch.int32).view(blocks, batch).t()


def _step(context: int, batch: int) -> tuple[torch.Tensor, ...]:
    """Block table, query_start_loc and seq_lens of one decode step."""
    return (
        _pages(context, batch).contiguous(),
        torch.arange(batch + 1, dtype=torch.int32),
        torch.full((batch,), context, dtype=torch.int32),
    )


def _stock(
    kind: str, head_dim: int, context: int, batch: int
) -> tuple[Attend, torch.Tensor]:
    """vLLM's kernel, called as its backend does; the metadata is one of a step."""
    from vllm import _custom_ops as ops
    from vllm import envs
    from vllm.v1.attention.backends.cpu_attn import _get_attn_isa

    cache_dtype = CACHE_DTYPES[kind]
    isa = _get_attn_isa(torch.bfloat16, BLOCK_SIZE, head_dim, cache_dtype)
    table, starts, lengths = _step(context, batch)
    shape = (table.numel(), NUM_KV_HEADS, 2 * BLOCK_SIZE, head_dim)
    cache = torch.zeros(shape, dtype=torch.bfloat16)
    if kind == STOCK_FP8:
        cache = torch.zeros(shape, dtype=torch.uint8)
    keys, values = cache.chunk(2, dim=2)
    for slots in torch.arange(table.numel() * BLOCK_SIZE).split(CHUNK):
        rows = torch.randn(2, len(slots), NUM_KV_HEADS, head_dim).bfloat16()
        ops.cpu_attn_reshape_and_cache(
            rows[0], rows[1], keys, values, slots, isa, kv_cache_dtype=cache_dtype
        )
    metadata = ops.cpu_attn_get_scheduler_metadata(
        num_reqs=batch,
        num_heads=NUM_HEADS,
        num_kv_heads=NUM_KV_HEADS,
        head_dim=head_dim,
        seq_lens=lengths,
        dtype=torch.bfloat16,
        query_start_loc=starts,
        causal=True,
        sliding_window_size=-1,
        isa=isa,
        enable_kv_split=envs.VLLM_CPU_ATTN_SPLIT_KV,
        kv_cache_dtype=cache_dtype,
    )

    def attend(query: torch.Tensor, cache: torch.Tensor) -> torch.Tensor:
        out = torch.empty_like(query)
        keys, values = cache.chunk(2, dim=2)
        ops.cpu_attention_with_kv_cache(
            query=query,
            key_cache=keys,
            value_cache=values,
            output=out,
            query_start_loc=starts,
            seq_lens=lengths,
            scale=head_dim**-0.5,
            causal=True,
            alibi_slopes=None,
            sliding_window=-1,
            block_table=table,
            softcap=0.0,
            scheduler_metadata=metadata,
            s_aux=None,
            kv_cache_dtype=cache_dtype,
        )
        return out

    return attend, cache


def _lowbit(
    kind: str, head_dim: int, context: int, batch: int
) -> tuple[Attend, torch.Tensor]:
    """Ours, over pages that its own operator stored."""
    from vllm_lowbit.kernels import ops as _ops  # noqa: F401 (registers the operators)
    from vllm_lowbit.kernels.kv4_store.layout import bytes_per_token

    table, starts, lengths = _step(context, batch)
    shape = (table.numel(), NUM_KV_HEADS, BLOCK_SIZE, bytes_per_token(head_dim))
    cache = torch.zeros(shape, dtype=torch.uint8)
    for slots in torch.arange(table.numel() * BLOCK_SIZE).split(CHUNK):
        rows = torch.randn(2, len(slots), NUM_KV_HEADS, head_dim).bfloat16()
        torch.ops.lowbit.kv4_store(rows[0], rows[1], cache, slots, True)

    def attend(query: torch.Tensor, cache: torch.Tensor) -> torch.Tensor:
        return torch.ops.lowbit.kv4_attention(
            query,
            cache,
            table,
            starts,
            lengths,
            head_dim**-0.5,
            None,
            None,
            None,
            True,
        )

    return attend, cache
