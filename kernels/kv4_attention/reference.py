# SPDX-License-Identifier: Apache-2.0
"""Definition of causal attention over packed 4-bit pages."""

import torch

from ..grid import kv_decode
from ..hadamard.generic import hadamard
from ..kv4_store.layout import planes, unpack_nibbles


def read_sequence(
    kv_cache: torch.Tensor, blocks: torch.Tensor, seq_len: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Dequantize the K and V of one sequence.

    Args:
        kv_cache: uint8 ``[blocks, num_kv_heads, block_size, head_dim + 8]``.
        blocks: the sequence's row of the block table.
        seq_len: tokens to read.

    Returns:
        K (still rotated) and V, float64 ``[num_kv_heads, seq_len, head_dim]``.
    """
    cache = planes(kv_cache)
    used = blocks[: -(-seq_len // kv_cache.shape[2])].long()

    def gather(plane: torch.Tensor) -> torch.Tensor:
        return plane[used].transpose(0, 1).flatten(1, 2)[:, :seq_len]

    def values(
        codes: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor
    ) -> torch.Tensor:
        return kv_decode(
            unpack_nibbles(gather(codes)),
            gather(scale).unsqueeze(-1),
            gather(zero).unsqueeze(-1),
        )

    return (
        values(cache.k_codes, cache.k_scale, cache.k_zero),
        values(cache.v_codes, cache.v_scale, cache.v_zero),
    )


def check_heads(query: torch.Tensor, kv_cache: torch.Tensor) -> None:
    """Raise ValueError unless the query heads share the KV heads evenly."""
    if query.shape[1] % kv_cache.shape[1]:
        raise ValueError(
            f"num_heads {query.shape[1]} is not a multiple of num_kv_heads "
            f"{kv_cache.shape[1]}"
        )


def check_sinks(sinks: torch.Tensor | None, num_heads: int) -> None:
    """Raise ValueError unless sinks are None or float32, one for each query head."""
    if sinks is None:
        return
    if sinks.dtype != torch.float32 or sinks.shape != (num_heads,):
        raise ValueError(
            f"sinks must be torch.float32 [{num_heads}], got {sinks.dtype} "
            f"{list(sinks.shape)}"
        )
    if not sinks.is_contiguous():
        raise ValueError(f"sinks must be contiguous, got strides {sinks.stride()}")


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
    """Attention of each sequence's newest tokens over its whole cached context.

    Args:
        query: ``[tokens, num_heads, head_dim]``; sequence i owns the rows
            ``query_start_loc[i]`` to ``query_start_loc[i + 1]``, which are its last
            positions.
        kv_cache: uint8 ``[blocks, num_kv_heads, block_size, head_dim + 8]``, the
            K and V of the query tokens already stored.
        block_table: integer ``[num_seqs, max_blocks]``.
        query_start_loc: integer ``[num_seqs + 1]``.
        seq_lens: integer ``[num_seqs]``, cached tokens of each sequence.
        softmax_scale: factor on the scores.
        sliding_window: tokens a position sees, itself included; None for all.
        logits_soft_cap: ``cap * tanh(score / cap)``; None for no cap.
        sinks: float32 ``[num_heads]``, a logit of each head that takes part in every
            row's softmax and has no value (OpenAI, gpt-oss model card, 2025); neither
            softmax_scale nor the cap applies to it. -inf is no sink, NaN and +inf
            make the head NaN. A row that sees no token is zero with a sink and NaN
            without. None for no sinks.
        rotate_query: apply the Hadamard of order head_dim, as the keys had.

    Returns:
        ``[tokens, num_heads, head_dim]`` in the dtype of query.

    Raises:
        ValueError: when the heads do not divide, or the cache or the sinks are of
            another form.
    """
    out = torch.empty_like(query)
    num_kv_heads = kv_cache.shape[1]
    check_heads(query, kv_cache)
    check_sinks(sinks, query.shape[1])
    starts = query_start_loc.tolist()
    for i, seq_len in enumerate(seq_lens.tolist()):
        rows = slice(starts[i], starts[i + 1])
        q = query[rows]
        q = hadamard(q, q.shape[-1]) if rotate_query else q
        k, v = read_sequence(kv_cache, block_table[i], seq_len)
        grouped = q.double().unflatten(1, (num_kv_heads, -1))
        scores = torch.einsum("qhgd,htd->hgqt", grouped, k) * softmax_scale
        if logits_soft_cap is not None:
            scores = logits_soft_cap * torch.tanh(scores / logits_soft_cap)
        position = torch.arange(seq_len - q.shape[0], seq_len).unsqueeze(-1)
        token = torch.arange(seq_len)
        hidden = token > position
        if sliding_window is not None:
            hidden |= token <= position - sliding_window
        scores = scores.masked_fill(hidden, -torch.inf)
        if sinks is not None:
            sink = sinks.double().view(num_kv_heads, -1, 1, 1)
            scores = torch.cat((scores, sink.expand(*scores.shape[:3], 1)), dim=-1)
        probabilities = scores.softmax(dim=-1)[..., :seq_len]
        # 0 * NaN is NaN: a value that is hidden from a row must not reach it.
        bad = ~torch.isfinite(v).all(dim=-1)
        attended = torch.einsum(
            "hgqt,htd->qhgd", probabilities, v.masked_fill(bad.unsqueeze(-1), 0.0)
        )
        poisoned = torch.einsum("ht,qt->qh", bad.double(), (~hidden).double()) > 0
        attended[poisoned] = torch.nan
        out[rows] = attended.flatten(1, 2).to(query.dtype)
    return out
