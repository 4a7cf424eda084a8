# SPDX-License-Identifier: Apache-2.0
"""KV4 attention in plain torch, with sums that do not depend on the batch.

Flash-attention style: splits of SPLIT tokens at fixed positions, merged in ascending
order. Inside a split the two products run on integer codes as exact float64 GEMMs
(queries and probabilities rounded to 30-bit fixed point per row), and the remaining
sums are halving trees of fixed shape. A row is therefore bitwise the same for any
batch, chunk, page table or thread count. Only the codes of one split are unpacked at
a time.
"""

import torch

from ..exact import fixed_point
from ..hadamard.generic import hadamard
from ..kv4_store.layout import Planes, planes, unpack_nibbles

SPLIT = 256
QUERY_BLOCK = 128
FRACTION_BITS = 30


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
    cache = planes(kv_cache)
    num_kv_heads, block_size = kv_cache.shape[1:3]
    rotated = hadamard(query, query.shape[-1]) if rotate_query else query.float()
    # [num_kv_heads, tokens, group, head_dim]
    q = rotated.unflatten(1, (num_kv_heads, -1)).transpose(0, 1)
    out = torch.empty_like(query)
    starts = query_start_loc.tolist()
    for i, seq_len in enumerate(seq_lens.tolist()):
        first, last = starts[i], starts[i + 1]
        for begin in range(first, last, QUERY_BLOCK):
            end = min(begin + QUERY_BLOCK, last)
            positions = torch.arange(begin, end) + (seq_len - last)
            mask = _Mask(positions, seq_len, sliding_window)
            attended = _attend(
                q[:, begin:end],
                cache,
                block_table[i].long(),
                block_size,
                mask,
                softmax_scale,
                logits_soft_cap,
            )
            out[begin:end] = attended.transpose(0, 1).flatten(1, 2).to(query.dtype)
    return out


class _Mask:
    """Which tokens the rows of a query block see."""

    def __init__(
        self, positions: torch.Tensor, seq_len: int, window: int | None
    ) -> None:
        self.positions, self.window = positions, window
        first, last = int(positions[0]), int(positions[-1])
        oldest = 0 if window is None else max(0, first - window + 1)
        self.splits = range(oldest // SPLIT * SPLIT, min(last + 1, seq_len), SPLIT)
        self.seq_len = seq_len

    def hidden(self, tokens: torch.Tensor) -> torch.Tensor:
        """bool ``[rows, tokens]``."""
        position = self.positions.unsqueeze(-1)
        hidden = tokens > position
        if self.window is not None:
            hidden |= tokens <= position - self.window
        return hidden


def _attend(
    q: torch.Tensor,
    cache: Planes,
    blocks: torch.Tensor,
    block_size: int,
    mask: _Mask,
    softmax_scale: float,
    soft_cap: float | None,
) -> torch.Tensor:
    """Attention of ``q [heads, rows, group, head_dim]``; returns the same shape."""
    shape = q.shape
    group = shape[2]
    q_codes, q_unit = fixed_point(q.flatten(1, 2), FRACTION_BITS)
    q_sum = q_codes.sum(-1, keepdim=True)
    peak = torch.full_like(q_unit, -torch.inf)
    total = torch.zeros_like(q_unit)
    attended = torch.zeros_like(q_codes)
    for start in mask.splits:
        tokens = torch.arange(start, start + SPLIT)
        live = tokens < mask.seq_len
        where = torch.where(live, tokens, start)
        block, offset = blocks[where // block_size], where % block_size

        def read(
            plane: torch.Tensor,
            block: torch.Tensor = block,
            offset: torch.Tensor = offset,
        ) -> torch.Tensor:
            return plane[block, :, offset].transpose(0, 1).double()

        def codes(
            plane: torch.Tensor,
            block: torch.Tensor = block,
            offset: torch.Tensor = offset,
        ) -> torch.Tensor:
            return unpack_nibbles(plane[block, :, offset]).transpose(0, 1).double()

        products = q_codes @ codes(cache.k_codes).transpose(1, 2)
        k_scale, k_zero = read(cache.k_scale), read(cache.k_zero)
        scores = products - q_sum * k_zero.unsqueeze(1)
        scores = scores * (k_scale.unsqueeze(1) * softmax_scale) * q_unit
        if soft_cap is not None:
            scores = soft_cap * torch.tanh(scores / soft_cap)
        hidden = mask.hidden(tokens).repeat_interleave(group, dim=0)
        scores = scores.masked_fill(hidden, -torch.inf)

        new_peak = torch.maximum(peak, scores.amax(dim=-1, keepdim=True))
        shift = torch.where(new_peak == -torch.inf, 0.0, new_peak)
        keep = torch.exp(peak - shift)
        p = torch.exp(scores - shift)
        v_scale, v_zero = read(cache.v_scale), read(cache.v_zero)
        v_scale = torch.where(live, v_scale, 0.0).unsqueeze(1)
        v_zero = torch.where(live, v_zero, 0.0).unsqueeze(1)
        weights, unit = fixed_point(p * v_scale, FRACTION_BITS)
        values = weights @ codes(cache.v_codes) - _tree_sum(weights * v_zero)
        attended = attended * keep + values * unit
        total = total * keep + _tree_sum(p)
        peak = new_peak
    return (attended / total).view(shape)


def _tree_sum(x: torch.Tensor) -> torch.Tensor:
    """Sum of the last dimension (SPLIT long) by halving, keepdim."""
    while x.shape[-1] > 1:
        low, high = x.chunk(2, dim=-1)
        x = low + high
    return x
