# SPDX-License-Identifier: Apache-2.0
"""KV4 attention by Triton kernels.

It is compared with the float reference by the bound below, not with the fixed-point
arithmetic of the CPU backends. Scores and weights are 16-bit floats on matrix units:

* A rotated query (exact, as ``hadamard/generic.py``) is rounded to fp16 after scaling
  its largest magnitude to ``[2^14, 2^15)``: an element moves by at most 2^-12 of
  itself, or 2^-35 of the largest. Codes of K are exact, sums are float32.
* ``p = exp2(score + e - peak)`` with ``e`` the exponent of the token's V scale, so that
  the weight ``w = p * v_scale / 2^e`` is at most 2 whatever the scales, and is rounded
  to fp16: by 2^-12 of itself, or 2^-25 of the row's largest. Values are ``sum w u``
  minus ``sum w zero`` with the *same* rounded w, so nothing cancels; their total is
  ``sum p / 2^e`` in float32.
* A sink adds its share to the total in float32.
* So a value is off by about ``2^-12 / sqrt(tokens)`` of the values' size, and by what
  2^-12 in the query moves the scores: ``tolerance`` in
  tests/kernels/triton/test_kv4_attention.py.

Contexts are cut at fixed positions (``splits.py``) and merged in ascending order,
whatever the batch and the grid. So the bits of a row in a batch of decodes (up to 16
query rows, tokens times heads of a group, for each sequence) do not depend on the other
rows. Longer queries take other tiles, whose bits are their own.

A row is NaN when a visible token has parameters that the store does not write for
finite values (a scale that is not positive and finite, a zero that is not finite), when
its own query is not finite, or when its sink in base 2 is NaN or inf in float32.
"""

import math
from dataclasses import dataclass

import torch

from ..gpu.target import architecture, inline_ptx, processors
from ..kv4_store.triton import (
    check_devices,
    check_integers,
    check_pages,
    check_rows,
    next_power_of_two,
    rotation_table,
    row_warps,
)
from .reference import check_heads, check_sinks
from .splits import split_count
from .triton_plan import Plan, plan

# Programs of a launch that keep every processor busy.
PROGRAMS_PER_PROCESSOR = 8
# Programs that a processor holds at a time.
RESIDENT_PROGRAMS = 4
ENCODE_ROWS = 16
MERGE_AHEAD = 8


def split_rows(kv_heads: int, device: torch.device) -> int:
    """Most tokens of a batch whose contexts are cut into programs of their own.

    With more, sequences alone fill the device.
    """
    return -(-RESIDENT_PROGRAMS * processors(device) // kv_heads)


def workspace_elements(
    tokens: int,
    num_heads: int,
    kv_heads: int,
    head_dim: int,
    max_seq_len: int,
    device: torch.device,
) -> int:
    """float32 elements of workspace that any call with up to so many tokens needs."""
    splits = split_count(max_seq_len)
    cut = min(tokens, split_rows(kv_heads, device)) if splits > 1 else 0
    return num_heads * (2 * tokens + cut * splits * (head_dim + 2))


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
    """As the reference, with the arithmetic above; nothing waits for the device.

    Raises:
        ValueError: as :func:`kv4_attention_out`.
    """
    out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    kv4_attention_out(
        query,
        kv_cache,
        block_table,
        query_start_loc,
        seq_lens,
        softmax_scale,
        sliding_window,
        logits_soft_cap,
        sinks,
        rotate_query,
        out,
        None,
    )
    return out


def kv4_attention_out(
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
    out: torch.Tensor,
    workspace: torch.Tensor | None,
) -> None:
    """Write the attention into ``out``, which also holds the encoded queries before.

    Launches and their grids depend on shapes alone, so a CUDA graph may replay them
    with other lengths. Rows of ``out`` that belong to no sequence are left undefined.

    Args:
        out: as query, heads contiguous; no memory shared with query.
        workspace: float32 ``[workspace_elements(...)]`` or more; None to allocate.

    Raises:
        ValueError: for a dtype, shape, stride, device, head size or head count that
            the kernels cannot take, or a workspace that is too small.
    """
    arch = architecture(query.device)
    head_dim = check_pages(kv_cache)
    check_heads(query, kv_cache)
    _, kv_heads, block_size, _ = kv_cache.shape
    tokens, num_heads, _ = query.shape
    num_seqs = seq_lens.shape[0]
    check_rows(query, "query", (tokens, num_heads, head_dim))
    check_rows(out, "out", (tokens, num_heads, head_dim))
    if out.dtype != query.dtype:
        raise ValueError(f"out must be {query.dtype} as query, got {out.dtype}")
    check_integers(block_table, "block_table", (num_seqs, -1))
    check_integers(query_start_loc, "query_start_loc", (num_seqs + 1,))
    check_integers(seq_lens, "seq_lens", (-1,))
    check_sinks(sinks, num_heads)
    check_devices(
        query.device,
        kv_cache=kv_cache,
        block_table=block_table,
        query_start_loc=query_start_loc,
        seq_lens=seq_lens,
        out=out,
        sinks=sinks,
    )
    if sliding_window is not None and sliding_window < 1:
        raise ValueError(f"sliding_window must be at least 1, got {sliding_window}")
    if logits_soft_cap is not None and not logits_soft_cap > 0:
        raise ValueError(f"logits_soft_cap must be positive, got {logits_soft_cap}")
    if tokens == 0 or num_seqs == 0:
        return
    max_seq_len = block_table.shape[1] * block_size
    room = split_rows(kv_heads, query.device)
    chosen = plan(
        tokens,
        num_seqs,
        num_heads // kv_heads,
        kv_heads,
        head_dim,
        max_seq_len,
        room,
        PROGRAMS_PER_PROCESSOR * processors(query.device),
        arch,
        sliding_window is not None,
        block_size,
    )
    parts = _carve(workspace, query, chosen)
    # 16 bits of each element of the output hold its query until it is written.
    encoded = out.view(torch.float16)[..., :head_dim]
    _encode(query, encoded, parts, softmax_scale, logits_soft_cap, rotate_query)
    _launch(
        chosen,
        encoded,
        parts,
        kv_cache,
        block_table,
        query_start_loc,
        seq_lens,
        out,
        sliding_window,
        logits_soft_cap,
        sinks,
        inline_ptx(arch),
    )


@dataclass(frozen=True)
class _Parts:
    """Views into the workspace: ``[tokens, heads]``, and those times splits."""

    query_sum: torch.Tensor
    factor: torch.Tensor
    values: torch.Tensor
    peak: torch.Tensor
    total: torch.Tensor


def _carve(workspace: torch.Tensor | None, query: torch.Tensor, chosen: Plan) -> _Parts:
    tokens, heads, head_dim = query.shape
    rows = tokens * heads
    cut = rows * chosen.max_splits if chosen.mode == "partial" else 0
    sizes = (cut * head_dim, cut, cut, rows, rows)
    if workspace is None:
        workspace = torch.empty(sum(sizes), dtype=torch.float32, device=query.device)
    if workspace.dtype != torch.float32 or not workspace.is_contiguous():
        raise ValueError(
            f"workspace must be contiguous torch.float32, got {workspace.dtype} with "
            f"strides {workspace.stride()}"
        )
    check_devices(query.device, workspace=workspace)
    if workspace.numel() < sum(sizes):
        raise ValueError(
            f"workspace must have {sum(sizes)} elements for {tokens} tokens, got "
            f"{workspace.numel()}"
        )
    values, peak, total, query_sum, factor = workspace.view(-1)[: sum(sizes)].split(
        sizes
    )
    return _Parts(query_sum, factor, values, peak, total)


def _encode(
    query: torch.Tensor,
    encoded: torch.Tensor,
    parts: _Parts,
    softmax_scale: float,
    soft_cap: float | None,
    rotate: bool,
) -> None:
    from .triton_query import encode_queries

    tokens, heads, head_dim = query.shape
    # With a cap exp2 of the score is e^(2x), of which tanh is made.
    scale = softmax_scale if soft_cap is None else 2.0 * softmax_scale / soft_cap
    encode_queries[(-(-tokens * heads // ENCODE_ROWS),)](
        query,
        rotation_table(head_dim, query.device),
        encoded,
        parts.query_sum,
        parts.factor,
        scale / math.log(2.0),
        tokens * heads,
        heads,
        *query.stride()[:2],
        *encoded.stride()[:2],
        HALF=head_dim // 2,
        PADDED=next_power_of_two(head_dim),
        PADDED_HALF=next_power_of_two(head_dim // 2),
        ROWS=ENCODE_ROWS,
        ROTATE=rotate,
        num_warps=row_warps(head_dim),
        enable_fp_fusion=False,
    )


def _launch(
    chosen: Plan,
    encoded: torch.Tensor,
    parts: _Parts,
    kv_cache: torch.Tensor,
    block_table: torch.Tensor,
    query_start_loc: torch.Tensor,
    seq_lens: torch.Tensor,
    out: torch.Tensor,
    window: int | None,
    soft_cap: float | None,
    sinks: torch.Tensor | None,
    ptx: bool,
) -> None:
    from .triton_kernel import attend, merge

    num_heads, head_dim = out.shape[1:]
    # Without sinks nothing is read there.
    sinks_or_other = parts.factor if sinks is None else sinks
    quarter = head_dim // 4
    padded = next_power_of_two(quarter)
    attend[chosen.grid](
        encoded,
        parts.query_sum,
        parts.factor,
        kv_cache,
        block_table,
        query_start_loc,
        seq_lens,
        sinks_or_other,
        out,
        parts.values,
        parts.peak,
        parts.total,
        seq_lens.shape[0],
        num_heads,
        chosen.max_splits,
        0 if window is None else window,
        0.0 if soft_cap is None else soft_cap / math.log(2.0),
        *encoded.stride()[:2],
        *out.stride()[:2],
        *kv_cache.stride()[:2],
        block_table.stride(0),
        GROUP=num_heads // kv_cache.shape[1],
        BLOCK_Q=chosen.block_q,
        ROWS=chosen.tile.rows,
        QUARTER=quarter,
        PADDED=padded,
        BLOCK_SIZE=kv_cache.shape[2],
        TILE=chosen.tile.tokens,
        MODE=chosen.mode,
        BY_SEQUENCE=chosen.by_sequence,
        WINDOW=window is not None,
        CAP=soft_cap is not None,
        SINKS=sinks is not None,
        LAZY=chosen.tile.lazy,
        PTX=ptx,
        **chosen.tile.options(),
    )
    if chosen.mode == "partial":
        merge[(seq_lens.shape[0], num_heads)](
            parts.values,
            parts.peak,
            parts.total,
            query_start_loc,
            seq_lens,
            sinks_or_other,
            out,
            num_heads,
            chosen.max_splits,
            0 if window is None else window,
            *out.stride()[:2],
            QUARTER=quarter,
            PADDED=padded,
            WINDOW=window is not None,
            SINKS=sinks is not None,
            AHEAD=MERGE_AHEAD,
            num_warps=1,
        )
