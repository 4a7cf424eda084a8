# SPDX-License-Identifier: Apache-2.0
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
"""Baseline of the KV4 decode: split-KV attention over bf16 K and V, in Triton.

Contexts of one length, contiguous, without pages: it reads what any bf16 decode must
read, and nothing else.
"""

import torch
import triton
import triton.language as tl


@triton.jit
def attend(
    query_ptr,
    key_ptr,
    value_ptr,
    partial_ptr,
    stats_ptr,
    scale,
    length,
    split,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    TILE: tl.constexpr,
):
    """Grid ``[batch * kv_heads, splits]``; scale is in base 2."""
    pair = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    row, column = tl.arange(0, ROWS), tl.arange(0, HEAD_DIM)
    live = (row < GROUP)[:, None]
    query_row = pair * GROUP + row
    at = query_row[:, None] * HEAD_DIM + column[None, :]
    query = tl.load(query_ptr + at, mask=live, other=0.0)
    peak = tl.full((ROWS,), -float("inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    value = tl.zeros((ROWS, HEAD_DIM), tl.float32)
    base = pair * length * HEAD_DIM
    for first in range(part * split, tl.minimum((part + 1) * split, length), TILE):
        token = first + tl.arange(0, TILE)
        there = token < length
        at = base + token[:, None] * HEAD_DIM + column[None, :]
        k = tl.load(key_ptr + at, mask=there[:, None], other=0.0)
        v = tl.load(value_ptr + at, mask=there[:, None], other=0.0)
        score = tl.dot(query, k.T) * scale
        score = tl.where(there[None, :], score, -float("inf"))
        new = tl.maximum(peak, tl.max(score, axis=1))
        p = tl.exp2(score - new[:, None])
        keep = tl.exp2(peak - new)
        total = total * keep + tl.sum(p, axis=1)
        value = tl.dot(p.to(v.dtype), v, value * keep[:, None])
        peak = new
    place = query_row * tl.num_programs(1) + part
    at = place[:, None] * HEAD_DIM + column[None, :]
    tl.store(partial_ptr + at, value, mask=live)
    tl.store(stats_ptr + 2 * place, peak, mask=row < GROUP)
    tl.store(stats_ptr + 2 * place + 1, total, mask=row < GROUP)


@triton.jit
def merge(
    partial_ptr,
    stats_ptr,
    out_ptr,
    splits,
    SPLITS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
):
    """Grid ``[batch * heads]``."""
    row = tl.program_id(0).to(tl.int64)
    part, column = tl.arange(0, SPLITS), tl.arange(0, HEAD_DIM)
    live = part < splits
    place = row * splits + part
    peak = tl.load(stats_ptr + 2 * place, mask=live, other=-float("inf"))
    total = tl.load(stats_ptr + 2 * place + 1, mask=live, other=0.0)
    take = tl.exp2(peak - tl.max(peak, axis=0))
    at = place[:, None] * HEAD_DIM + column[None, :]
    value = tl.load(partial_ptr + at, mask=live[:, None], other=0.0)
    out = tl.sum(value * take[:, None], axis=0) / tl.sum(total * take, axis=0)
    tl.store(out_ptr + row * HEAD_DIM + column, out.to(out_ptr.dtype.element_ty))


MOST_SPLITS = 64


def workspace_elements(query: torch.Tensor) -> int:
    """float32 elements that ``decode`` needs for ``[batch, heads, head_dim]``."""
    batch, heads, head_dim = query.shape
    return batch * heads * MOST_SPLITS * (head_dim + 2)


def decode(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    out: torch.Tensor,
    workspace: torch.Tensor,
    programs: int,
) -> None:
    """Attention of one token a sequence.

    Args:
        query: ``[batch, heads, head_dim]``, bf16 (any float type in the interpreter).
        key, value: ``[batch, kv_heads, length, head_dim]``.
        out: as query.
        workspace: float32, ``workspace_elements`` of them.
        programs: that fill the device.
    """
    batch, heads, head_dim = query.shape
    kv_heads, length = key.shape[1:3]
    pairs = batch * kv_heads
    splits = max(1, min(MOST_SPLITS, -(-length // 256), -(-programs // pairs)))
    split = -(-length // splits // 64) * 64
    splits = -(-length // split)
    rows = batch * heads * splits
    partial, stats = workspace[: rows * (head_dim + 2)].split(
        (rows * head_dim, rows * 2)
    )
    attend[(pairs, splits)](
        query,
        key,
        value,
        partial,
        stats,
        head_dim**-0.5 * 1.4426950408889634,
        length,
        split,
        GROUP=heads // kv_heads,
        ROWS=max(16, triton.next_power_of_2(heads // kv_heads)),
        HEAD_DIM=head_dim,
        TILE=64,
        num_warps=4,
        num_stages=3,
    )
    merge[(batch * heads,)](
        partial,
        stats,
        out,
        splits,
        SPLITS=triton.next_power_of_2(splits),
        HEAD_DIM=head_dim,
        num_warps=2,
    )
