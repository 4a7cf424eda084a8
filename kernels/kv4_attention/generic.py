# SPDX-License-Identifier: Apache-2.0
"""KV4 attention in plain torch: the arithmetic every backend repeats bit for bit.

The reference is the mathematics; this is the definition of what is computed. All
operations are IEEE float32 unless said otherwise, each rounded by itself (no fused
multiply-add), and all sums are of integers and exact. So a row is bitwise the same for
any batch, chunk, page table, thread count and vector width, and integer dot products
of bytes compute it. ``u`` is a cached code, ``zero' = zero - 8`` (exact).

1. A query row of one head, rotated in float32, becomes 16-bit codes: ``s_q = max|q| /
   32512`` (1 below TINY), ``X = round(q * (1 / s_q))``. 32512 is 127 * 256, so that X
   is two signed bytes. Scores are in base 2: ``factor = s_q * f`` with ``f`` the
   float32 of ``softmax_scale * log2(e)``.
2. ``c = sum X (u - 8)`` and ``S = sum X`` are exact, c rounded once;
   ``score = ((c - zero' * S) * k_scale) * factor``. With a soft cap
   ``f = softmax_scale / cap`` and ``score = tanh(score) * (cap * log2(e))``.
3. The context is cut into splits at fixed positions, and each is computed from its own
   largest visible score m: ``p = exp2(score - m)``, 0 where hidden;
   ``total = sum round(p * 2^22)``, exact and rounded once, over 2^22;
   ``w = p * v_scale``, ``s_w = max w / 65535`` and ``W = round(w * (1 / s_w))``, two
   unsigned bytes. With ``A = sum W (u - 8)`` and ``Z = sum W zero'`` exact and rounded
   once, the split's value is ``(A - Z) * s_w``.
4. Splits are merged in ascending order, those without a visible token left out:
   ``m' = max(m, m_s)``, ``a = exp2(m - m')``, ``b = exp2(m_s - m')``, and
   ``value * a + value_s * b``, the total likewise.
5. A sink is one more part, with the peak ``m_s = sink * log2(e)``, a total of 1 and no
   value: ``value * a`` and ``total * a + b``; -inf is left out. The result is
   value / total.

A row is NaN when a visible token has parameters that the store does not write for
finite values (a scale that is not positive and finite, a zero not within 1024), when
its factor is not below 2^64: a query that is not finite, or one so large that a score
might not be, or when the peak of its sink is NaN or inf in float32. Sums are exact
because zeros are multiples of 1/64.

Rounding moves a query element by at most ``max|q| / 65024``, a weight by at most 1 /
131070 of its split's largest: about 1e-5 of the values at usual lengths, where bfloat16
keeps 4e-3. A weight has no use for a sign, hence 65535 and not 32512. Each split has
its own scale, so tokens that are small beside the largest of another split keep their
16 bits.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from ..grid import KV_MAX_ZERO, TINY
from ..hadamard.generic import hadamard
from ..kv4_store.layout import planes, unpack_nibbles
from .exponential import exp2, tanh
from .reference import check_heads, check_sinks

SPLIT = 256
QUERY_BLOCK = 128
QUERY_MAX = 127 * 256
WEIGHT_MAX = 255 * 257
LOG2_E = 1.0 / math.log(2.0)
DIGIT = 256
CENTRE = 8
TOTAL_UNIT = 2.0**-22
FACTOR_LIMIT = 2.0**64
# Cached elements of K unpacked at a time, over all sequences of a batch.
_BATCH_ELEMENTS = 1 << 22


def split_size(block_size: int) -> int:
    """Tokens of a split: whole pages, SPLIT itself when the page size divides it.

    Raises:
        ValueError: for pages of more than SPLIT tokens, where a sum of
            ``split_size * 2^22`` would not fit 31 bits.
    """
    if block_size > SPLIT:
        raise ValueError(f"block_size must be at most {SPLIT}, got {block_size}")
    return -(-SPLIT // block_size) * block_size


def score_factors(softmax_scale: float, soft_cap: float | None) -> tuple[float, float]:
    """The constants of step 2: ``f``, and the factor on tanh (1 without a cap).

    Both are rounded to float32 where they are used.
    """
    if soft_cap is None:
        return softmax_scale * LOG2_E, 1.0
    return softmax_scale / soft_cap, soft_cap * LOG2_E


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
    """As the reference, of which it computes the 16-bit fixed-point version above.

    Raises:
        ValueError: as the reference, and for pages of more than SPLIT tokens.
    """
    check_heads(query, kv_cache)
    check_sinks(sinks, query.shape[1])
    size = split_size(kv_cache.shape[2])
    num_kv_heads = kv_cache.shape[1]
    rotated = hadamard(query, query.shape[-1]) if rotate_query else query.float()
    q = rotated.unflatten(1, (num_kv_heads, -1))
    out = torch.empty_like(query)
    widest = size * num_kv_heads * query.shape[-1]
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
            sinks,
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

    def hidden(
        self, start: int, size: int, window: int | None, group: int
    ) -> torch.Tensor:
        """Which tokens of a split a row does not see.

        Returns:
            bool ``[items, 1, num_rows * group, size]``.
        """
        rows = torch.arange(self.num_rows).unsqueeze(1)
        positions = self.first_position.view(-1, 1, 1) + rows
        tokens = torch.arange(start, start + size)
        hidden = tokens > positions
        if window is not None:
            hidden |= tokens <= positions - window
        return hidden.repeat_interleave(group, dim=1).unsqueeze(1)


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
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """Attention of float32 ``q [items, rows, heads, group, head_dim]``; same shape."""
    items, rows, heads, group, head_dim = q.shape
    q = q.transpose(1, 2).reshape(items, heads, rows * group, head_dim)
    to_base_2, cap = score_factors(softmax_scale, soft_cap)
    codes, q_scale = _codes(q, q.abs().amax(dim=-1, keepdim=True), QUERY_MAX)
    digits, code_sum = _digits(codes), codes.sum(dim=-1, keepdim=True)
    factor = q_scale * to_base_2
    poisoned = ~(factor.abs() < FACTOR_LIMIT)
    peak = torch.full_like(factor, -torch.inf)
    total = torch.zeros_like(peak)
    value = torch.zeros_like(q)
    for start, size in _splits(kv_cache.shape[2], batch, window):
        hidden = batch.hidden(start, size, window, group)
        split = _read(kv_cache, tables, start, size, batch.seq_len)
        if split.bad is not None:
            poisoned |= (split.bad & ~hidden).any(dim=-1, keepdim=True)

        products = _multiply(digits, split.k.transpose(2, 3))
        scores = products.sub_(split.k_zero * code_sum).mul_(split.k_scale).mul_(factor)
        if soft_cap is not None:
            scores = tanh(scores).mul_(cap)
        scores.masked_fill_(hidden, -torch.inf)

        seen = ~hidden.all(dim=-1, keepdim=True)
        split_peak = scores.amax(dim=-1, keepdim=True)
        p = exp2(scores.sub_(split_peak))
        p_codes = (p * (1.0 / TOTAL_UNIT)).round_()
        split_total = p_codes.sum(dim=-1, keepdim=True, dtype=torch.float64).float()
        weights = p.mul_(split.v_scale)
        weights, unit = _codes(weights, weights.amax(dim=-1, keepdim=True), WEIGHT_MAX)
        zeros = (weights.double() @ split.v_zero.double().transpose(2, 3)).float()
        split_value = _multiply(_digits(weights), split.v).sub_(zeros).mul_(unit)

        new_peak = torch.maximum(peak, split_peak)
        keep, take = exp2(peak - new_peak), exp2(split_peak - new_peak)
        value = torch.where(seen, value * keep + split_value * take, value)
        split_total = split_total.mul_(TOTAL_UNIT).mul_(take)
        total = torch.where(seen, total * keep + split_total, total)
        peak = torch.where(seen, new_peak, peak)
    if sinks is not None:
        # A row is one token and head of the group, heads inner.
        sink = sinks.view(heads, group).repeat(1, rows).unsqueeze(-1) * LOG2_E
        poisoned |= ~(sink < torch.inf)
        there = sink > -torch.inf
        new_peak = torch.maximum(peak, sink)
        keep = exp2(peak - new_peak)
        value = torch.where(there, value * keep, value)
        total = torch.where(there, total * keep + exp2(sink - new_peak), total)
    out = value.div_(total).masked_fill_(poisoned, torch.nan)
    return out.view(items, heads, rows, group, head_dim).transpose(1, 2)


def _codes(
    x: torch.Tensor, peak: torch.Tensor, code_max: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Integers of magnitude up to code_max, and the scale of rows (last dimension).

    Both float32; peak is the largest magnitude of each row. A row that is not finite
    has a scale that is not.
    """
    scale = torch.where(peak < TINY, 1.0, peak / code_max)
    return (x * (1.0 / scale)).round_(), scale


def _digits(codes: torch.Tensor) -> torch.Tensor:
    """Codes ``[..., rows, n]`` as bytes ``[..., 2 * rows, n]``: high, then low."""
    digits = codes.repeat(1, 1, 2, 1)
    high, low = digits.chunk(2, dim=-2)
    high.mul_(1.0 / DIGIT).floor_()
    low.sub_(high * DIGIT)
    return digits


def _multiply(digits: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
    """The exact product of the numbers behind ``digits``, rounded once to float32.

    The sums of bytes times 4-bit codes stay below 2^24, exact in a float32 GEMM, and
    so does the high one times 256; only their sum rounds.
    """
    high, low = (digits @ codes).chunk(2, dim=-2)
    return high.mul_(DIGIT).add_(low)


def _splits(
    block_size: int, batch: _Batch, window: int | None
) -> Iterator[tuple[int, int]]:
    """Start and length of the splits some row of the batch sees, ascending."""
    size = split_size(block_size)
    oldest = 0
    if window is not None:
        oldest = max(0, int(batch.first_position.min()) - window + 1)
    for start in range(oldest // size * size, int(batch.seq_len.max()), size):
        yield start, size


@dataclass(frozen=True)
class _Split:
    """One split of every item; float32, codes and zeros minus CENTRE.

    What a row must not multiply (tokens from seq_len on, bad ones) has scale 0.

    Attributes:
        k: ``[items, heads, size, head_dim]``.
        k_scale: ``[items, heads, 1, size]``.
        k_zero: likewise.
        v, v_scale, v_zero: likewise.
        bad: bool ``[items, heads, 1, size]``, cached tokens that make a row NaN; None
            where there are none.
    """

    k: torch.Tensor
    k_scale: torch.Tensor
    k_zero: torch.Tensor
    v: torch.Tensor
    v_scale: torch.Tensor
    v_zero: torch.Tensor
    bad: torch.Tensor | None


def _read(
    kv_cache: torch.Tensor,
    tables: torch.Tensor,
    start: int,
    size: int,
    seq_len: torch.Tensor,
) -> _Split:
    """Unpack one split; tokens from seq_len on hold anything."""
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

    def codes(plane: torch.Tensor) -> torch.Tensor:
        return unpack_nibbles(gather(plane)).float().sub_(CENTRE)

    scales = [gather(t).unsqueeze(2).float() for t in (cache.k_scale, cache.v_scale)]
    zeros = [gather(t).unsqueeze(2).float() for t in (cache.k_zero, cache.v_zero)]
    live = torch.arange(start, start + size) < seq_len.view(items, 1, 1, 1)
    usable = live
    for scale, zero in zip(scales, zeros, strict=True):
        usable = usable & (scale > 0) & torch.isfinite(scale)
        usable = usable & (zero.abs() <= KV_MAX_ZERO)
    bad = live & ~usable
    k_scale, v_scale = (scale.where(usable, 0.0) for scale in scales)
    k_zero, v_zero = (zero.sub_(CENTRE).where(usable, 0.0) for zero in zeros)
    return _Split(
        codes(cache.k_codes),
        k_scale,
        k_zero,
        codes(cache.v_codes),
        v_scale,
        v_zero,
        bad if bool(bad.any()) else None,
    )
