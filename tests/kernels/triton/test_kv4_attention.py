# SPDX-License-Identifier: Apache-2.0
"""Triton attention over packed pages against the float reference."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_lowbit.kernels.kv4_attention import reference, splits, triton
from vllm_lowbit.kernels.kv4_attention.triton import kv4_attention
from vllm_lowbit.kernels.kv4_store.layout import HEAD_DIMS

Batches = Callable[..., Any]


def tolerance(head_dim: int, scale: float) -> float:
    """What fp16 queries and weights may cost, on normal queries, keys and values.

    A weight moves by 2^-12 of itself, so a value by 2^-12 of the largest one, about 5.
    A score moves by ``scale * sum of e_d k_d`` where e_d is uniform in 2^-11 of a
    normal query element: a standard deviation of ``2^-12 / sqrt(3) * sqrt(head_dim) *
    scale``. Six of them, times a spread of values of 5.
    """
    return 2.0**-12 * (5 + 6 * 5 / 3**0.5 * head_dim**0.5 * scale)


def assert_close(
    actual: torch.Tensor, expected: torch.Tensor, scale: float | None = None
) -> None:
    """The error of fp16 operands, and half an ulp of the type twice."""
    head_dim, eps = actual.shape[-1], torch.finfo(actual.dtype).eps
    atol = tolerance(head_dim, head_dim**-0.5 if scale is None else scale)
    torch.testing.assert_close(
        actual.double(), expected.double(), rtol=eps, atol=atol + eps / 8
    )


def check(batch: Any, **arguments: Any) -> torch.Tensor:
    expected = batch.attend(reference.kv4_attention, **arguments)
    actual = batch.attend(kv4_attention, **arguments)
    assert (actual.dtype, actual.shape) == (expected.dtype, expected.shape)
    assert torch.isfinite(actual).all()
    assert_close(actual, expected, arguments.get("scale"))
    return actual


HEADS = ((2, 2), (8, 2), (3, 1))
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def check_decode(
    kv_batch: Batches, head_dim: int, heads: tuple[int, int], dtype: torch.dtype
) -> None:
    """Ragged lengths, some with several splits; a window for some."""
    batch = kv_batch(
        [270, 1, 64],
        [1, 1, 1],
        num_heads=heads[0],
        num_kv_heads=heads[1],
        head_dim=head_dim,
        block_size=64 if head_dim == 128 else 16,
        dtype=dtype,
        rotate=heads[1] != 2,
    )
    check(batch, window=None if heads[1] == 1 else 70)


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("heads", HEADS, ids=["mha", "gqa", "mqa"])
def test_decode(head_dim: int, heads: tuple[int, int], kv_batch: Batches) -> None:
    dtype = DTYPES[(HEAD_DIMS.index(head_dim) + HEADS.index(heads)) % 3]
    check_decode(kv_batch, head_dim, heads, dtype)


@pytest.mark.slow
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("heads", HEADS, ids=["mha", "gqa", "mqa"])
def test_decode_in_every_type(
    head_dim: int, heads: tuple[int, int], dtype: torch.dtype, kv_batch: Batches
) -> None:
    check_decode(kv_batch, head_dim, heads, dtype)


@pytest.mark.parametrize("cap", [1.0, 30.0])
def test_soft_cap(cap: float, kv_batch: Batches) -> None:
    for query_lens in ([1, 1], [4, 18]):
        batch = kv_batch([90, 30], query_lens)
        check(batch, cap=cap, scale=0.5)


def check_chunks(head_dim: int, window: int | None, kv_batch: Batches) -> None:
    """Whole prompts, a chunk behind a cached prefix, and decodes in one batch."""
    batch = kv_batch([30, 140, 1, 77, 5], [30, 20, 1, 1, 2], head_dim=head_dim)
    check(batch, window=window, cap=10.0 if window == 40 else None)


@pytest.mark.parametrize(
    ("head_dim", "window"),
    [(64, None), (64, 1), (80, 40), (96, 1), (128, None), (128, 40), (256, None)],
)
def test_prefixes_and_chunks(
    head_dim: int, window: int | None, kv_batch: Batches
) -> None:
    check_chunks(head_dim, window, kv_batch)


@pytest.mark.slow
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("window", [None, 1, 40])
def test_chunks_of_every_size(
    head_dim: int, window: int | None, kv_batch: Batches
) -> None:
    check_chunks(head_dim, window, kv_batch)


@pytest.mark.parametrize("block_size", [16, 17, 32, 48, 64, 128, 256])
def test_page_sizes(block_size: int, kv_batch: Batches) -> None:
    """Several pages a tile, several tiles a page, and pages that tiles do not fit."""
    heads = {"num_heads": 2, "num_kv_heads": 1, "block_size": block_size}
    for query_lens in ([1, 1, 1], [3, 20, 1]):
        batch = kv_batch([55, 257, 64], query_lens, **heads)
        check(batch, window=33 if block_size == 48 else None)


@pytest.mark.parametrize("group", [1, 3, 5, 12, 16, 20, 71])
def test_group_sizes(group: int, kv_batch: Batches) -> None:
    """Also more query heads than a tile has rows."""
    for query_lens in ([1, 1], [17 if group < 20 else 3, 1]):
        batch = kv_batch([70, 30], query_lens, num_heads=group, num_kv_heads=1)
        check(batch)


@settings(max_examples=10)
@given(data=st.data())
def test_any_shape(data: st.DataObject, kv_batch: Batches) -> None:
    check_any_shape(data, kv_batch)


@pytest.mark.slow
@settings(max_examples=300)
@given(data=st.data())
def test_many_shapes(data: st.DataObject, kv_batch: Batches) -> None:
    check_any_shape(data, kv_batch)


def check_any_shape(data: st.DataObject, kv_batch: Batches) -> None:
    num_kv_heads = data.draw(st.integers(1, 2))
    query_lens = data.draw(st.lists(st.integers(1, 20), min_size=1, max_size=3))
    contexts = [data.draw(st.integers(0, 300)) for _ in query_lens]
    batch = kv_batch(
        [c + q for c, q in zip(contexts, query_lens, strict=True)],
        query_lens,
        num_kv_heads=num_kv_heads,
        num_heads=num_kv_heads * data.draw(st.integers(1, 5)),
        head_dim=data.draw(st.sampled_from(HEAD_DIMS)),
        block_size=data.draw(st.sampled_from((16, 17, 32, 64, 128))),
        rotate=data.draw(st.booleans()),
        seed=data.draw(st.integers(0, 1000)),
    )
    check(
        batch,
        window=data.draw(st.none() | st.integers(1, 320)),
        cap=data.draw(st.none() | st.floats(1, 50)),
        scale=data.draw(st.floats(0.01, 1)),
        sinks=data.draw(st.none() | st.just(torch.randn(batch.query.shape[1]))),
    )


def test_error_is_that_of_16_bit_floats(kv_batch: Batches) -> None:
    """Neither larger (a sum that cancels) nor none (not what is documented)."""
    for head_dim in HEAD_DIMS:
        batch = kv_batch([300], [4], head_dim=head_dim)
        expected = batch.attend(reference.kv4_attention)
        error = batch.attend(kv4_attention) - expected
        assert 1e-6 < error.square().mean().sqrt() < 4e-5


@pytest.mark.parametrize("offset", [100.0, -3000.0])
def test_values_far_from_zero(offset: float, kv_batch: Batches) -> None:
    """Zeros of many codes: the error stays relative to the values."""
    batch = kv_batch([300], [1], num_heads=2, num_kv_heads=1)
    key, value = torch.randn(2, 300, 1, 64)
    position = torch.arange(300)
    slots = batch.block_table[0, position // 16].long() * 16 + position % 16
    reference_store(key, value + offset, batch.cache, slots)
    expected = batch.attend(reference.kv4_attention)
    actual = batch.attend(kv4_attention)
    torch.testing.assert_close(actual, expected, rtol=2.0**-12, atol=1e-4)


@pytest.mark.parametrize("ratio", [1e-6, 1e-3, 1e3])
def test_values_of_unlike_sizes(ratio: float, kv_batch: Batches) -> None:
    """Scales of V that fp16 weights could not hold: each token is taken for full."""
    batch = kv_batch([200], [1], num_heads=2, num_kv_heads=1)
    key, value = torch.randn(2, 200, 1, 64)
    value[::2] *= ratio
    position = torch.arange(200)
    slots = batch.block_table[0, position // 16].long() * 16 + position % 16
    reference_store(key, value, batch.cache, slots)
    actual = batch.attend(kv4_attention)
    expected = batch.attend(reference.kv4_attention)
    limit = 2e-3 * float(expected.abs().max())
    torch.testing.assert_close(actual, expected, rtol=0, atol=limit)
    value *= ratio
    reference_store(key, value, batch.cache, slots)
    actual = batch.attend(kv4_attention)
    expected = batch.attend(reference.kv4_attention)
    limit = 2e-3 * float(expected.abs().max())
    torch.testing.assert_close(actual, expected, rtol=0, atol=limit)


def reference_store(
    key: torch.Tensor, value: torch.Tensor, cache: torch.Tensor, slots: torch.Tensor
) -> None:
    from vllm_lowbit.kernels.kv4_store.generic import kv4_store

    kv4_store(key, value, cache, slots, True)


@pytest.mark.parametrize("scale", [1e-30, 1e6])
def test_extreme_scores(scale: float, kv_batch: Batches) -> None:
    """Uniform and one-hot probabilities: no overflow, no empty sum."""
    batch = kv_batch([400], [3])
    expected = batch.attend(reference.kv4_attention, scale=scale)
    actual = batch.attend(kv4_attention, scale=scale)
    assert torch.isfinite(actual).all()
    torch.testing.assert_close(actual, expected, rtol=0, atol=2e-3)


def test_split_positions() -> None:
    """Counts and starts of splits agree, on the host; every length of three levels."""
    starts = [splits.split_start(i) for i in range(80)]
    assert starts == sorted(set(starts)) and starts[0] == 0
    assert splits.split_count(131072) == 68
    for tokens in (1, 255, 256, 257, 4096, 4097, 32768, 32769, 131072):
        count = splits.split_count(tokens)
        assert starts[count - 1] < tokens <= starts[count]


@pytest.mark.parametrize(
    ("length", "window"),
    [(4700, None), pytest.param(38000, 9000, marks=pytest.mark.slow)],
)
def test_long_contexts(length: int, window: int | None, kv_batch: Batches) -> None:
    """Splits of every size; windows that begin in the middle of one."""
    batch = kv_batch([length], [1], num_heads=2, num_kv_heads=1, block_size=256)
    check(batch, window=window)


@pytest.mark.parametrize(("head_dim", "window"), [(64, 300), (128, None)])
def test_every_way_to_cut_gives_the_same_bits(
    head_dim: int,
    window: int | None,
    cut: Callable[[int], None],
    monkeypatch: pytest.MonkeyPatch,
    kv_batch: Batches,
) -> None:
    """Programs of their own or one for all, however many, in any batch."""
    heads = {"num_heads": 2, "num_kv_heads": 1, "head_dim": head_dim}
    batch = kv_batch([600, 20, 257], [1, 1, 1], **heads)
    cut(0)
    whole = batch.attend(kv4_attention, window=window)
    cut(100)
    for programs in (1, 6, 1000):
        monkeypatch.setattr(triton, "processors", lambda device: 1)
        monkeypatch.setattr(triton, "PROGRAMS_PER_PROCESSOR", programs)
        assert torch.equal(batch.attend(kv4_attention, window=window), whole)
    for order in ([2, 0, 1], [2]):
        part = batch.reordered(order).attend(kv4_attention, window=window)
        expected = torch.cat([whole[batch.rows(i)] for i in order])
        assert torch.equal(part, expected)


def test_long_queries_may_be_cut(cut: Callable[[int], None], kv_batch: Batches) -> None:
    """A chunk of many rows behind a long prefix, with room for its splits."""
    cut(200)
    batch = kv_batch([530, 90], [33, 1], num_kv_heads=1)
    check(batch)
    check(batch, window=300)


def test_pages_and_strides_change_no_bit(kv_batch: Batches) -> None:
    batch = kv_batch([90, 50], [4, 1])
    whole = batch.attend(kv4_attention)
    order = torch.randperm(len(batch.cache))
    used = batch.block_table < len(order)
    table = batch.block_table.clone()
    table[used] = order[batch.block_table[used].long()].int()
    cache = torch.empty_like(batch.cache)
    cache[order] = batch.cache
    wide = torch.nn.functional.pad(table.long(), (0, 5), value=-7)
    heads_first = cache.transpose(0, 1).contiguous().transpose(0, 1)
    beside = torch.stack((torch.full_like(cache, 255), cache), dim=1)[:, 1]
    for moved in (cache, heads_first, beside):
        changed = replace(batch, cache=moved, block_table=wide)
        assert torch.equal(changed.attend(kv4_attention), whole)
    heads = torch.stack((batch.query, batch.query), dim=1)[:, 1]
    assert torch.equal(replace(batch, query=heads).attend(kv4_attention), whole)


def test_row_does_not_depend_on_other_rows_of_its_tile(kv_batch: Batches) -> None:
    """Neither on their queries nor on what they see and it does not."""
    batch = kv_batch([90], [8])
    whole = batch.attend(kv4_attention, window=30)
    query = batch.query.clone()
    query[5] *= 1000
    other = replace(batch, query=query).attend(kv4_attention, window=30)
    keep = torch.arange(8) != 5
    assert torch.equal(other[keep], whole[keep])
    assert not torch.equal(other[5], whole[5])


def test_sequences_without_rows(kv_batch: Batches) -> None:
    """A sequence with no new token, and padding as CUDA graphs have it."""
    batch = kv_batch([33, 20, 40], [1, 1, 1])
    whole = batch.attend(kv4_attention)
    idle = replace(
        batch, query=torch.cat((batch.query[:1], batch.query[2:])), query_lens=(1, 0, 1)
    )
    for seq_len in (20, 0):
        rows = replace(idle, seq_lens=(33, seq_len, 40)).attend(kv4_attention)
        assert torch.equal(rows, whole[[0, 2]])
    padded = replace(
        batch.reordered([0, 1, 2, 2]), query_lens=(1, 1, 1, 0), seq_lens=(33, 20, 40, 0)
    )
    assert torch.equal(padded.attend(kv4_attention)[:3], whole)
    nothing = replace(batch, query=batch.query[:0], query_lens=(0, 0, 0))
    assert nothing.attend(kv4_attention).shape == (0, 4, 64)
    uneven = replace(batch, query_lens=(1, 2, 0), seq_lens=(33, 20, 40))
    check(uneven)
