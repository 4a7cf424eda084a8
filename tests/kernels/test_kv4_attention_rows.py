# SPDX-License-Identifier: Apache-2.0
"""A row of attention depends on its own tokens only, to the bit."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_lowbit.kernels.cpu import library
from vllm_lowbit.kernels.kv4_attention import cpu, generic, reference
from vllm_lowbit.kernels.kv4_store.generic import kv4_store
from vllm_lowbit.kernels.kv4_store.layout import planes

compiled = pytest.param(
    cpu.kv4_attention,
    marks=pytest.mark.skipif(library.missing() is not None, reason="not compiled"),
)
every = pytest.mark.parametrize(
    "attention",
    [reference.kv4_attention, generic.kv4_attention, compiled],
    ids=["reference", "generic", "cpu"],
)
# The reference's rows are those of a BLAS, which may depend on their number.
backends = pytest.mark.parametrize(
    "attention", [generic.kv4_attention, compiled], ids=["generic", "cpu"]
)
forms = pytest.mark.parametrize(
    ("window", "cap"), [(None, None), (100, None), (300, 5.0)]
)


@backends
@forms
@pytest.mark.parametrize("chunk", [1, 17, 64, 129])
def test_chunks_give_the_rows_of_the_whole(
    chunk: int,
    window: int | None,
    cap: float | None,
    dtype: torch.dtype,
    attention: Callable[..., torch.Tensor],
    kv_batch: Callable[..., Any],
) -> None:
    """Prefill in chunks, with what comes later cached or not yet."""
    length = 600
    batch = kv_batch([length], head_dim=80, dtype=dtype)
    whole = batch.attend(attention, window=window, cap=cap)
    # Single rows: around splits, windows and pages; a step that meets every residue.
    starts = range(0, length, chunk) if chunk > 1 else (0, 15, 16, 99, 100, 101, 255)
    for start in (*starts, *(256, 257, 511, 512, length - 1) * (chunk == 1)):
        stop = min(start + chunk, length)
        part = batch.pick(0, start, stop)
        rows = part.attend(attention, window=window, cap=cap)
        assert torch.equal(rows, whole[start:stop]), (start, stop)


@backends
@pytest.mark.parametrize("form", [(None, None), (100, 5.0)])
def test_batch_order_and_threads(
    form: tuple[int | None, float | None],
    dtype: torch.dtype,
    attention: Callable,
    kv_batch: Callable,
) -> None:
    lengths = [1, 17, 64, 255, 256, 257, 3, 90]
    queries = [1, 17, 1, 2, 64, 1, 3, 5]
    window, cap = form
    batch = kv_batch(lengths, queries, head_dim=128, dtype=dtype)
    torch.set_num_threads(2)
    whole = batch.attend(attention, window=window, cap=cap)
    orders = {1: ([7, 2, 5, 0, 1, 3, 6, 4], range(8), [3]), 2: ([6, 5, 0],)}
    for threads, parts in orders.items():
        torch.set_num_threads(threads)
        for order in parts:
            part = batch.reordered(order)
            rows = part.attend(attention, window=window, cap=cap)
            expected = torch.cat([whole[batch.rows(i)] for i in order])
            assert torch.equal(rows, expected)


@backends
def test_number_of_sequences(
    attention: Callable[..., torch.Tensor], kv_batch: Callable[..., Any]
) -> None:
    """Decoding: one row a sequence, any number of them."""
    lengths = [1 + 7 * i % 60 for i in range(257)]
    batch = kv_batch(lengths, [1] * 257, num_heads=2, num_kv_heads=1)
    whole = batch.attend(attention)
    last = batch.reordered(range(200, 257)).attend(attention)
    assert torch.equal(last, whole[200:])
    for count in (1, 2, 3, 16, 17, 64, 255, 256):
        first = batch.reordered(range(count)).attend(attention)
        assert torch.equal(first, whole[:count])


@backends
@pytest.mark.parametrize("window", [None, 40, 300])
def test_decoding_sequences_of_any_length_together(
    window: int | None,
    attention: Callable[..., torch.Tensor],
    kv_batch: Callable[..., Any],
) -> None:
    """Lengths on both sides of splits, windows that begin in different ones."""
    lengths = [700, 1, 256, 30, 257, 513, 255, 600]
    batch = kv_batch(lengths, [1] * 8)
    whole = batch.attend(attention, window=window)
    expected = batch.attend(reference.kv4_attention, window=window)
    torch.testing.assert_close(whole, expected, rtol=0, atol=4e-4)
    for i in range(8):
        alone = batch.reordered([i]).attend(attention, window=window)
        assert torch.equal(alone, whole[batch.rows(i)])


@every
def test_pages_may_be_anywhere(
    attention: Callable[..., torch.Tensor], kv_batch: Callable[..., Any]
) -> None:
    """Moving a sequence's pages, or widening the table, changes no bit."""
    batch = kv_batch([300, 50], [4, 1])
    whole = batch.attend(attention)
    order = torch.randperm(len(batch.cache))
    used = batch.block_table < len(order)
    moved_table = batch.block_table.clone()
    moved_table[used] = order[batch.block_table[used].long()].int()
    moved_cache = torch.empty_like(batch.cache)
    moved_cache[order] = batch.cache
    wide = torch.nn.functional.pad(moved_table.long(), (0, 5), value=-7)
    for table in (moved_table, wide):
        moved = replace(batch, cache=moved_cache, block_table=table)
        assert torch.equal(moved.attend(attention), whole)


@every
def test_cache_strides(
    attention: Callable[..., torch.Tensor], kv_batch: Callable[..., Any]
) -> None:
    """Heads first in memory, or K and V caches of layers side by side."""
    batch = kv_batch([70, 20], [2, 20])
    whole = batch.attend(attention)
    heads_first = batch.cache.transpose(0, 1).contiguous().transpose(0, 1)
    beside = torch.stack((torch.full_like(batch.cache, 255), batch.cache), dim=1)[:, 1]
    for cache in (heads_first, beside):
        assert torch.equal(replace(batch, cache=cache).attend(attention), whole)


@every
@pytest.mark.parametrize("fill", [255, 0, 126], ids=["NaN", "zero", "large"])
def test_unwritten_bytes_do_not_matter(
    attention: Callable[..., torch.Tensor], fill: int, kv_batch: Callable[..., Any]
) -> None:
    """Unused pages and the slots after the last token, whatever they hold."""
    batch = kv_batch([1, 17, 255, 300], [1, 17, 3, 40], block_size=32)
    whole = batch.attend(attention)
    assert torch.isfinite(whole).all()
    written = torch.zeros(batch.cache.shape[:3], dtype=torch.bool)
    for row, length in zip(batch.block_table, batch.seq_lens, strict=True):
        for token in range(length):
            written[row[token // 32], :, token % 32] = True
    cache = torch.full_like(batch.cache, fill)
    for source, target in zip(planes(batch.cache), planes(cache), strict=True):
        target[written] = source[written]
    assert torch.equal(replace(batch, cache=cache).attend(attention), whole)


@backends
@settings(max_examples=25, deadline=None)
@given(
    length=st.integers(1, 400),
    where=st.floats(0, 1),
    count=st.integers(1, 40),
    window=st.none() | st.integers(1, 400),
    seed=st.integers(0, 100),
)
def test_any_part_of_any_sequence(
    length: int,
    where: float,
    count: int,
    window: int | None,
    seed: int,
    attention: Callable[..., torch.Tensor],
    kv_batch: Callable[..., Any],
) -> None:
    batch = kv_batch([length], seed=seed)
    start = int(where * (length - 1))
    stop = min(start + count, length)
    whole = batch.attend(attention, window=window)
    rows = batch.pick(0, start, stop).attend(attention, window=window)
    assert torch.equal(rows, whole[start:stop])


@every
def test_non_finite_query_row(
    attention: Callable[..., torch.Tensor], kv_batch: Callable[..., Any]
) -> None:
    """NaN stays in its row and head."""
    batch = kv_batch([300], [4], num_heads=2, num_kv_heads=1)
    whole = batch.attend(attention)
    query = batch.query.clone()
    query[2, 1, 5] = torch.nan
    rows = replace(batch, query=query).attend(attention)
    assert torch.isnan(rows[2, 1]).all()
    rows[2, 1] = whole[2, 1]
    assert torch.equal(rows, whole)


def with_nan_token(batch: Any, token: int, which: str) -> Any:
    """The batch with a NaN in the key or the value of one token of sequence 0."""
    block_size = batch.cache.shape[2]
    key, value = (t[0][token : token + 1].clone() for t in (batch.keys, batch.values))
    (key if which == "key" else value)[0, 0, 0] = torch.nan
    slot = batch.block_table[0, token // block_size] * block_size + token % block_size
    cache = batch.cache.clone()
    kv4_store(key, value, cache, slot.view(1), batch.rotate)
    return replace(batch, cache=cache)


keys_and_values = pytest.mark.parametrize("which", ["key", pytest.param("value")])


@every
@keys_and_values
def test_nan_of_a_later_token_is_not_seen(
    which: str, attention: Callable[..., torch.Tensor], kv_batch: Callable[..., Any]
) -> None:
    """Rows before the token are those they would be in an earlier chunk."""
    batch = kv_batch([40], [10])
    whole = batch.attend(attention)
    rows = with_nan_token(batch, 35, which).attend(attention)
    assert torch.isnan(rows[5:, :2]).all()
    assert torch.equal(rows[5:, 2:], whole[5:, 2:])
    assert torch.equal(rows[:5], whole[:5])


@every
@keys_and_values
def test_nan_before_the_window_is_not_seen(
    which: str, attention: Callable[..., torch.Tensor], kv_batch: Callable[..., Any]
) -> None:
    batch = kv_batch([400], [3])
    whole = batch.attend(attention, window=100)
    for token in (0, 255, 256, 290):
        rows = with_nan_token(batch, token, which).attend(attention, window=100)
        assert torch.equal(rows, whole)


@every
def test_pages_before_the_window_may_be_reused(
    attention: Callable[..., torch.Tensor], kv_batch: Callable[..., Any]
) -> None:
    """vLLM frees pages the window has left behind; another request then owns them."""
    batch = kv_batch([400], [1])
    whole = batch.attend(attention, window=100)
    cache = batch.cache.clone()
    cache[batch.block_table[0, : (400 - 100) // 16].long()] = 255
    rows = replace(batch, cache=cache).attend(attention, window=100)
    assert torch.equal(rows, whole)
