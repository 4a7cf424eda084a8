# SPDX-License-Identifier: Apache-2.0
"""The 4-bit cache: against its reference, then against bf16 attention and copies."""

from collections.abc import Iterator
from functools import partial
from itertools import product
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from vllm_lowbit.kernels.gpu.target import INTERPRETED, processors
from vllm_lowbit.kernels.kv4_attention import reference
from vllm_lowbit.kernels.kv4_attention.triton import (
    PROGRAMS_PER_PROCESSOR,
    kv4_attention,
    kv4_attention_out,
    workspace_elements,
)
from vllm_lowbit.kernels.kv4_store import generic as store_generic
from vllm_lowbit.kernels.kv4_store.layout import HEAD_DIMS
from vllm_lowbit.kernels.kv4_store.triton import kv4_store
from vllm_lowbit.kernels.rope_kv4_store import reference as rope_reference
from vllm_lowbit.kernels.rope_kv4_store.triton import rope_kv4_store

from . import bf16_attention
from .activations import copies_of
from .case import Arm, Calls, Check, Count, Prepare, Row, same_twice

# Attention of Llama 3 8B and Qwen3 8B.
HEADS, KV_HEADS, HEAD_DIM, PAGE = 32, 8, 128, 64
BATCHES = (1, 16)
CONTEXTS = tuple(1024 << i for i in range(8))
STORED = (16, 256, 8192)
# vLLM fuses RoPE with the store up to here.
ROTATED = (16, 256)
# fp16 queries and weights (see kv4_attention/triton.py), and half an ulp of bf16
# results of up to 4, twice.
TOLERANCE = 2e-2
BASELINE = "bf16 attention"
LIBRARIES = {
    "bf16 SDPA flash": SDPBackend.FLASH_ATTENTION,
    "bf16 SDPA cuDNN": SDPBackend.CUDNN_ATTENTION,
    "bf16 SDPA efficient": SDPBackend.EFFICIENT_ATTENTION,
}
# Where the aim is, and what it is.
AIM = {(16, 32768): 1.6}
# Decodes; decodes, a chunk behind a prefix and a whole prompt.
BATCH_FORMS = {"decode": (1, 1, 1), "chunks": (1, 30, 10)}


def checks(device: torch.device) -> Iterator[Check]:
    """Pages byte for byte, and attention by the reference, for every head size."""
    for head_dim in HEAD_DIMS[:1] if INTERPRETED else HEAD_DIMS:
        for rotate in (True, False):
            name = f"head {head_dim}" + " rotated" * rotate
            run = partial(_compare_pages, device, head_dim, rotate)
            yield Check("kv4_store", name, run)
            run = partial(_compare_rope, device, head_dim, rotate)
            yield Check("rope_kv4_store", name, run)
        for form, window in product(BATCH_FORMS, (None, 100)):
            name = f"head {head_dim} {form} window {window}"
            run_attention = partial(_compare_attention, device, head_dim, form, window)
            yield Check("kv4_attention", name, run_attention)
    if not INTERPRETED:
        run_replay = partial(_compare_replay, device)
        yield Check("kv4_attention", "a graph with other lengths", run_replay)
    for context in (70, 1000):
        run_baseline = partial(_compare_baseline, device, context)
        yield Check(BASELINE, f"context {context}", run_baseline)


def _pages(
    head_dim: int, tokens: int, rotate: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Key, value, slots and the pages that the reference makes of them."""
    random = torch.Generator().manual_seed(head_dim)
    key, value = torch.randn(2, tokens, 2, head_dim, generator=random).bfloat16()
    slots = torch.randperm(tokens, generator=random)
    blocks = -(-tokens // PAGE)
    pages = torch.full((blocks, 2, PAGE, head_dim + 8), 255, dtype=torch.uint8)
    store_generic.kv4_store(key, value, pages, slots, rotate)
    return key, value, slots, pages


def _compare_pages(device: torch.device, head_dim: int, rotate: bool) -> str | None:
    key, value, slots, pages = _pages(head_dim, 100 if INTERPRETED else 5000, rotate)
    inputs = [tensor.to(device) for tensor in (key, value)]

    def store() -> torch.Tensor:
        written = torch.full(pages.shape, 255, dtype=torch.uint8, device=device)
        kv4_store(*inputs, written, slots.to(device), rotate)
        return written

    written = same_twice(store)
    differ = int((written.cpu() != pages).sum())
    return f"{differ} bytes differ" if differ else None


def _compare_rope(device: torch.device, head_dim: int, rotate: bool) -> str | None:
    """Queries, keys and pages."""
    arguments = _rope_arguments(device, 100, 8, 2, head_dim, rotate)
    inputs = [a.cpu().clone() if torch.is_tensor(a) else a for a in arguments]
    rope_reference.rope_kv4_store(*inputs)

    def run() -> tuple[Any, ...]:
        own = [a.clone() if torch.is_tensor(a) else a for a in arguments]
        rope_kv4_store(*own)
        return own[0], own[1], own[5]

    written = same_twice(run)
    changed = {"queries": inputs[0], "keys": inputs[1], "pages": inputs[5]}
    for (name, expected), tensor in zip(changed.items(), written, strict=True):
        differ = int((tensor.cpu() != expected).sum())
        if differ:
            return f"{differ} elements of {name} differ"
    return None


def _rope_arguments(
    device: torch.device,
    tokens: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    rotate: bool,
) -> tuple[Any, ...]:
    """Those of ``rope_kv4_store``, in bf16."""
    random = torch.Generator().manual_seed(head_dim)
    shape = (tokens, heads + 2 * kv_heads, head_dim)
    qkv = torch.randn(shape, generator=random).bfloat16().to(device)
    angles = torch.rand(1000, head_dim, generator=random).mul(6.28)
    positions = torch.randint(1000, (tokens,), generator=random)
    blocks = -(-tokens // PAGE)
    pages = torch.full((blocks, kv_heads, PAGE, head_dim + 8), 255, dtype=torch.uint8)
    slots = torch.randperm(blocks * PAGE, generator=random)[:tokens]
    return (
        *qkv.split([heads, kv_heads, kv_heads], dim=1),
        positions.to(device),
        angles.cos().bfloat16().to(device),
        pages.to(device),
        slots.to(device),
        rotate,
    )


def _compare_attention(
    device: torch.device, head_dim: int, form: str, window: int | None
) -> str | None:
    *_, pages = _pages(head_dim, 700 if not INTERPRETED else 320, True)
    counts = BATCH_FORMS[form]
    random = torch.Generator().manual_seed(0)
    query = torch.randn(sum(counts), 8, head_dim, generator=random).bfloat16()
    tokens = PAGE * (len(pages) - 1)
    inputs = (
        query,
        pages,
        torch.arange(len(pages), dtype=torch.int32).repeat(3, 1),
        torch.tensor((0, *counts)).cumsum(0).int(),
        torch.tensor((tokens, tokens // 2, 10), dtype=torch.int32),
    )
    options = (head_dim**-0.5, window, 20.0 if window else None)
    sinks = torch.linspace(-2, 4, 8) if window else None
    expected = reference.kv4_attention(*inputs, *options, sinks, True).float()
    there = [tensor.to(device) for tensor in inputs]
    sinks = None if sinks is None else sinks.to(device)
    actual = same_twice(lambda: kv4_attention(*there, *options, sinks, True))
    error = float((actual.cpu().float() - expected).abs().max())
    return None if error <= TOLERANCE else f"off by {error:.1e}"


def _compare_replay(device: torch.device) -> str | None:
    """A graph that was captured for short contexts, then run for others."""
    *_, pages = _pages(HEAD_DIM, 2000, True)
    # The last page is not full.
    blocks, batch = len(pages) - 1, 4
    most = PAGE * blocks
    random = torch.Generator().manual_seed(1)
    query = torch.randn(batch, 8, HEAD_DIM, generator=random).bfloat16()
    table = torch.arange(blocks, dtype=torch.int32).repeat(batch, 1)
    starts = torch.arange(batch + 1, dtype=torch.int32)
    lengths = torch.ones(batch, dtype=torch.int32)
    there = [t.to(device) for t in (query, pages, table, starts, lengths)]
    out = torch.empty_like(there[0])
    elements = workspace_elements(batch, 8, 2, HEAD_DIM, most, device)
    workspace = torch.empty(elements, dtype=torch.float32, device=device)
    options = (HEAD_DIM**-0.5, None, None)
    call = partial(kv4_attention_out, *there, *options, None, True, out, workspace)
    call()
    torch.cuda.synchronize(device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    for other in ((1, 1, 1, 1), (most, 3, 700, 65), (64, most, 1, most - 1)):
        lengths = torch.tensor(other, dtype=torch.int32)
        table = torch.stack(
            [torch.randperm(blocks, generator=random).int() for _ in range(batch)]
        )
        there[2].copy_(table)
        there[4].copy_(lengths)
        graph.replay()
        inputs = (query, pages, table, starts, lengths)
        expected = reference.kv4_attention(*inputs, *options, None, True).float()
        error = float((out.cpu().float() - expected).abs().max())
        if not error <= TOLERANCE:
            return f"off by {error:.1e} at lengths {other}"
    return None


def _compare_baseline(device: torch.device, context: int) -> str | None:
    # The interpreter's products of bf16 are wrong.
    dtype = torch.float32 if INTERPRETED else torch.bfloat16
    random = torch.Generator().manual_seed(context)
    key, value = torch.randn(2, 3, 2, context, HEAD_DIM, generator=random).to(dtype)
    query = torch.randn(3, 8, HEAD_DIM, generator=random).to(dtype)
    expected = F.scaled_dot_product_attention(
        query.view(3, 2, 4, HEAD_DIM).double(), key.double(), value.double()
    ).view(query.shape)
    there = [tensor.to(device) for tensor in (query, key, value)]
    workspace = torch.empty(bf16_attention.workspace_elements(query), device=device)
    out = torch.empty_like(there[0])
    bf16_attention.decode(*there, out, workspace, programs=100)
    error = float((out.cpu() - expected).abs().max())
    return None if error <= TOLERANCE else f"off by {error:.1e}"


def rows(device: torch.device) -> Iterator[Row]:
    """Decode attention by batch and context, then the store."""
    for batch, context in sorted(product(BATCHES, CONTEXTS), reverse=True):
        arms = _Attention(device, batch, context)
        yield Row(
            "kv4_attention",
            f"decode, {HEADS} heads over {KV_HEADS} of {HEAD_DIM}, batch {batch}",
            {"batch": batch, "context": context},
            {"triton": Arm(arms.kv4, arms.packed)}
            | {
                name: Arm(partial(arms.sdpa, backend), arms.plain, baseline=True)
                for name, backend in LIBRARIES.items()
            }
            | {"bf16 Triton": Arm(arms.bf16, arms.plain, baseline=True, spare=True)},
            needs=("kv4_store", BASELINE),
            aims={"triton": AIM[batch, context]} if (batch, context) in AIM else {},
        )
    for tokens in STORED:
        moved = tokens * KV_HEADS * (5 * HEAD_DIM + 8)
        yield Row(
            "kv4_store",
            f"{KV_HEADS} heads of {HEAD_DIM}",
            {"m": tokens},
            _with_copy(device, partial(_store, device, tokens), moved),
        )
    for tokens in ROTATED:
        moved = tokens * (HEADS * 4 * HEAD_DIM + KV_HEADS * (7 * HEAD_DIM + 8))
        yield Row(
            "rope_kv4_store",
            f"{HEADS} heads over {KV_HEADS} of {HEAD_DIM}",
            {"m": tokens},
            _with_copy(device, partial(_rope, device, tokens, moved), moved),
        )


def _with_copy(device: torch.device, prepare: Prepare, moved: int) -> dict[str, Arm]:
    copy = partial(copies_of, device, moved)
    return {"triton": Arm(prepare, moved), "copy": Arm(copy, moved, baseline=True)}


class _Attention:
    """The arms of one batch and context.

    A context's bf16 K and V are four times its pages, so each arm has as many copies
    as its own bytes need.
    """

    def __init__(self, device: torch.device, batch: int, context: int) -> None:
        self.device, self.batch, self.context = device, batch, context
        self.packed = batch * context * KV_HEADS * (HEAD_DIM + 8)
        self.plain = batch * context * KV_HEADS * HEAD_DIM * 4
        shape = (batch, HEADS, HEAD_DIM)
        self.query = torch.randn(shape, dtype=torch.bfloat16)

    def kv4(self, copies: Count) -> Calls:
        """Shuffled pages, a cache and a table for every call."""
        device, tokens = self.device, self.batch * self.context
        query = self.query.to(device)
        starts = torch.arange(self.batch + 1, dtype=torch.int32, device=device)
        lengths = torch.full_like(starts[1:], self.context)
        sizes = (self.batch, HEADS, KV_HEADS, HEAD_DIM, self.context)
        elements = workspace_elements(*sizes, device)
        workspace = torch.empty(elements, dtype=torch.float32, device=device)
        out = torch.empty_like(query)
        calls: Calls = []
        for _ in range(copies(self.packed)):
            table = torch.randperm(tokens // PAGE, device=device).int()
            calls.append(
                partial(
                    kv4_attention_out,
                    query,
                    self._cache(),
                    table.view(self.batch, -1),
                    starts,
                    lengths,
                    HEAD_DIM**-0.5,
                    None,
                    None,
                    None,
                    True,
                    out,
                    workspace,
                )
            )
        return calls

    def _cache(self) -> torch.Tensor:
        """Random keys and values, stored a part at a time."""
        device, blocks = self.device, self.batch * self.context // PAGE
        shape = (blocks, KV_HEADS, PAGE, HEAD_DIM + 8)
        cache = torch.empty(shape, dtype=torch.uint8, device=device)
        for slots in torch.arange(blocks * PAGE, device=device).split(1 << 16):
            rows = (2, len(slots), KV_HEADS, HEAD_DIM)
            key, value = torch.randn(rows, dtype=torch.bfloat16, device=device)
            kv4_store(key, value, cache, slots, True)
        return cache

    def _operands(self, copies: Count) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        shape = (2, self.batch, KV_HEADS, self.context, HEAD_DIM)
        for _ in range(copies(self.plain)):
            key, value = torch.randn(shape, dtype=torch.bfloat16, device=self.device)
            yield key, value

    def sdpa(self, backend: SDPBackend, copies: Count) -> Calls:
        """A group's heads are the rows of one query, so that K and V are read once."""
        shape = (self.batch, KV_HEADS, HEADS // KV_HEADS, HEAD_DIM)
        query = self.query.to(self.device).view(shape)

        def call(key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(query, key, value)

        return [partial(call, key, value) for key, value in self._operands(copies)]

    def bf16(self, copies: Count) -> Calls:
        query = self.query.to(self.device)
        elements = bf16_attention.workspace_elements(query)
        workspace = torch.empty(elements, dtype=torch.float32, device=self.device)
        programs = PROGRAMS_PER_PROCESSOR * processors(self.device)
        out = torch.empty_like(query)
        return [
            partial(bf16_attention.decode, query, k, v, out, workspace, programs)
            for k, v in self._operands(copies)
        ]


def _store(device: torch.device, tokens: int, copies: Count) -> Calls:
    blocks = -(-tokens // PAGE)
    calls: Calls = []
    for _ in range(copies(tokens * KV_HEADS * (5 * HEAD_DIM + 8))):
        shape = (2, tokens, KV_HEADS, HEAD_DIM)
        key, value = torch.randn(shape, dtype=torch.bfloat16, device=device)
        pages = (blocks, KV_HEADS, PAGE, HEAD_DIM + 8)
        cache = torch.empty(pages, dtype=torch.uint8, device=device)
        slots = torch.randperm(blocks * PAGE, device=device)[:tokens]
        calls.append(partial(kv4_store, key, value, cache, slots, True))
    return calls


def _rope(device: torch.device, tokens: int, moved: int, copies: Count) -> Calls:
    sizes = (tokens, HEADS, KV_HEADS, HEAD_DIM, True)
    return [
        partial(rope_kv4_store, *_rope_arguments(device, *sizes))
        for _ in range(copies(moved))
    ]
