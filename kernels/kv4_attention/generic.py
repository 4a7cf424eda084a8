# SPDX-License-Identifier: Apache-2.0
"""KV4 attention in plain torch, with sums that do not depend on the batch.

Flash-attention style: splits of SPLIT tokens at fixed positions, merged in ascending
order. Inside a split every sum is one of integers that float64 holds exactly (queries
and probabilities in two parts of 28-bit fixed point, codes minus zeros being multiples
of 1/64), so a row is bitwise the same for any batch, chunk, page table or thread count.
Decoding sequences run together; only one split of each is unpacked at a time.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from ..exact import fixed_point, order_free_matmul
from ..hadamard.generic import hadamard
from ..kv4_store.layout import planes, unpack_nibbles
from .reference import check_heads

SPLIT = 256
QUERY_BLOCK = 128
FRACTION_BITS = 28
# Sums of SPLIT terms without a factor may be finer.
SUM_BITS = 44
# Cached elements of K unpacked at a time, over all sequences of a batch.
_BATCH_ELEMENTS = 1 << 22


def kv4_attention(
    query: torch.Tensor,
    kv_cache: torch.Tensor,
    block_table: torch.Tensor,
    query_start_loc: torch.Tensor,
    seq_lens: torch.Tensor,
    softmax_scale: float,
    sliding_window: int | None,
    logits_soft_cap: float | None,
    rotate_query: bool,
) -> torch.Tensor:
    """As the reference."""
    check_heads(query, kv_cache)
    num_kv_heads, block_size = kv_cache.shape[1:3]
    if block_size > SPLIT:
        raise ValueError(f"block_size must be at most {SPLIT}, got {block_size}")
    rotated = hadamard(query, query.shape[-1]) if rotate_query else query.float()
    q = rotated.unflatten(1, (num_kv_heads, -1))
    out = torch.empty_like(query)
    widest = SPLIT * num_kv_heads * query.shape[-1]
    for batch in _batches(query_start_loc, seq_lens, max(1, _BATCH_ELEMENTS // widest)):
        rows = batch.first_row.unsqueeze(1) + torch.arange(batch.num_rows)
        attended = _attend(
            q[rows],
            kv_cache,
            block_table[batch.sequence].long(),
            batch,
            softmax_scale,
            sliding_window,
            logits_soft_cap,
        )
        out[rows] = attended.flatten(2, 3).to(query.dtype)
    return out


@dataclass(frozen=True)
class _Batch:
    """Equally many query rows of several sequences.

    Attributes:
        num_rows: rows of each.
        sequence: int64 ``[items]``, index of the sequence.
        first_row: int64 ``[items]``, first row in the query.
        first_position: int64 ``[items]``, its position in the sequence.
        seq_len: int64 ``[items]``, cached tokens.
    """

    num_rows: int
    sequence: torch.Tensor
    first_row: torch.Tensor
    first_position: torch.Tensor
    seq_len: torch.Tensor

    def positions(self) -> torch.Tensor:
        """int64 ``[items, num_rows, 1]``."""
        rows = torch.arange(self.num_rows).unsqueeze(1)
        return self.first_position.view(-1, 1, 1) + rows


def _batches(
    query_start_loc: torch.Tensor, seq_lens: torch.Tensor, most: int
) -> Iterator[_Batch]:
    """Query blocks, those of one row gathered into batches of at most ``most``."""
    starts = query_start_loc.tolist()
    blocks: dict[int, list[tuple[int, int, int, int]]] = {}
    for i, seq_len in enumerate(seq_lens.tolist()):
        end = starts[i + 1]
        for row in range(starts[i], end, QUERY_BLOCK):
            num_rows = min(QUERY_BLOCK, end - row)
            item = (i, row, seq_len - (end - row), seq_len)
            blocks.setdefault(num_rows, []).append(item)
    for num_rows, items in blocks.items():
        step = most if num_rows == 1 else 1
        for first in range(0, len(items), step):
            yield _Batch(num_rows, *torch.tensor(items[first : first + step]).unbind(1))


def _attend(
    q: torch.Tensor,
    kv_cache: torch.Tensor,
    tables: torch.Tensor,
    batch: _Batch,
    softmax_scale: float,
    window: int | None,
    soft_cap: float | None,
) -> torch.Tensor:
    """Attention of ``q [items, rows, heads, group, head_dim]``; same shape."""
    items, rows, heads, group, head_dim = q.shape
    q = q.transpose(1, 2).reshape(items, heads, rows * group, head_dim)
    q = q.double()
    peak = torch.full_like(q[..., :1], -torch.inf)
    total = torch.zeros_like(peak)
    attended = torch.zeros_like(q)
    positions = batch.positions()
    for start, size in _splits(kv_cache.shape[2], batch, window):
        tokens = torch.arange(start, start + size)
        live = (tokens < batch.seq_len.unsqueeze(1)).view(items, 1, 1, size)
        k, k_scale, v, v_scale = _read(kv_cache, tables, start, size, batch.seq_len)

        hidden = tokens > positions
        if window is not None:
            hidden |= tokens <= positions - window
        hidden = hidden.repeat_interleave(group, dim=1).unsqueeze(1)
        products = order_free_matmul(q, k.transpose(2, 3), FRACTION_BITS)
        scores = products * (k_scale * softmax_scale)
        if soft_cap is not None:
            scores = soft_cap * torch.tanh(scores / soft_cap)
        scores = scores.masked_fill_(hidden, -torch.inf)

        new_peak = torch.maximum(peak, scores.amax(dim=-1, keepdim=True))
        shift = new_peak.masked_fill(new_peak == -torch.inf, 0.0)
        keep = torch.exp(peak - shift)
        p = torch.exp(scores - shift)
        # 0 * NaN is NaN: what a row does not see is cleared before it is multiplied.
        bad = ~torch.isfinite(v_scale + v[..., :1].transpose(2, 3)) & live
        usable = live & ~bad
        weights = p * v_scale.where(usable, 0.0)
        v = v.where(usable.transpose(2, 3), 0.0)
        attended = attended * keep + order_free_matmul(weights, v, FRACTION_BITS)
        if bool(bad.any()):
            seen = (bad & ~hidden).any(dim=-1, keepdim=True)
            attended = attended.masked_fill(seen, torch.nan)
        p_codes, p_unit = fixed_point(p, SUM_BITS)
        total = total * keep + p_codes.sum(dim=-1, keepdim=True) * p_unit
        peak = new_peak
    out = (attended / total).view(items, heads, rows, group, head_dim)
    return out.transpose(1, 2)


def _splits(
    block_size: int, batch: _Batch, window: int | None
) -> Iterator[tuple[int, int]]:
    """Start and length of the splits some row of the batch sees, ascending."""
    # Whole pages: SPLIT itself for every block size that divides it.
    size = -(-SPLIT // block_size) * block_size
    oldest = 0
    if window is not None:
        oldest = max(0, int(batch.first_position.min()) - window + 1)
    for start in range(oldest // size * size, int(batch.seq_len.max()), size):
        yield start, size


def _read(
    kv_cache: torch.Tensor,
    tables: torch.Tensor,
    start: int,
    size: int,
    seq_len: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """One split of every item, float64: codes minus zero, and scale, of K and V.

    Returns:
        k ``[items, heads, size, head_dim]``, k_scale ``[items, heads, 1, size]``, and
        v and v_scale alike. Tokens from seq_len on hold anything.
    """
    block_size = kv_cache.shape[2]
    columns = torch.arange(start // block_size, (start + size) // block_size)
    used = columns * block_size < seq_len.unsqueeze(1)
    blocks = tables[:, columns.clamp(max=tables.shape[1] - 1)].where(used, 0)
    items, pages = blocks.shape
    cache = planes(kv_cache[blocks.flatten()])

    def gather(plane: torch.Tensor) -> torch.Tensor:
        """Join the pages: ``[items * pages, heads, block_size, ...]`` in,
        ``[items, heads, size, ...]`` out."""
        return plane.unflatten(0, (items, pages)).transpose(1, 2).flatten(2, 3)

    def side(
        codes: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        unpacked = unpack_nibbles(gather(codes)).double()
        centred = unpacked.sub_(gather(zero).unsqueeze(-1))
        return centred, gather(scale).unsqueeze(2).double()

    k, k_scale = side(cache.k_codes, cache.k_scale, cache.k_zero)
    v, v_scale = side(cache.v_codes, cache.v_scale, cache.v_zero)
    return k, k_scale, v, v_scale
