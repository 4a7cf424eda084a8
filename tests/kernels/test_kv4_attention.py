# SPDX-License-Identifier: Apache-2.0
"""Attention over packed pages: the reference, and the other backends against it."""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_lowbit.kernels.cpu import library
from vllm_lowbit.kernels.hadamard.matrices import matrix
from vllm_lowbit.kernels.kv4_attention import cpu, generic, reference
from vllm_lowbit.kernels.kv4_store.generic import kv4_store
from vllm_lowbit.kernels.kv4_store.layout import HEAD_DIMS

compiled = pytest.param(
    cpu.kv4_attention,
    marks=pytest.mark.skipif(library.missing() is not None, reason="not compiled"),
)
every = pytest.mark.parametrize(
    "attention",
    [reference.kv4_attention, generic.kv4_attention, compiled],
    ids=["reference", "generic", "cpu"],
)


def read_by_hand(
    cache: torch.Tensor, blocks: list[int], seq_len: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """K and V float64 ``[heads, seq_len, head_dim]`` from the raw bytes of pages."""
    _, heads, block_size, width = cache.shape
    half, parameters = (width - 8) // 2, block_size * (width - 8)
    out = np.empty((2, heads, seq_len, 2 * half))
    for token in range(seq_len):
        at = token % block_size
        for head in range(heads):
            page = cache[blocks[token // block_size], head].flatten().numpy()
            for i in range(2):
                packed = page[(i * block_size + at) * half :][:half]
                codes = np.concatenate((packed & 15, packed >> 4)).astype(float)
                where = parameters + 4 * i * block_size + 2 * at
                scale = page[where : where + 2].view(np.float16).astype(float)
                where += 2 * block_size
                zero = page[where : where + 2].view(np.float16).astype(float)
                out[i, head, token] = scale * (codes - zero)
    k, v = torch.from_numpy(out)
    return k, v


def independent(batch: Any, window: int | None, scale: float) -> torch.Tensor:
    """torch's own attention in float64 over keys and values decoded by hand."""
    head_dim = batch.query.shape[-1]
    h = matrix(head_dim).double() / head_dim**0.5
    rows = []
    for i, (count, seq_len) in enumerate(
        zip(batch.query_lens, batch.seq_lens, strict=True)
    ):
        k, v = read_by_hand(batch.cache, batch.block_table[i].tolist(), seq_len)
        q = batch.query[batch.rows(i)].double()
        q = (q @ h.t() if batch.rotate else q).transpose(0, 1)
        position = torch.arange(seq_len - count, seq_len).unsqueeze(-1)
        token = torch.arange(seq_len)
        seen = token <= position
        if window is not None:
            seen &= token > position - window
        out = torch.nn.functional.scaled_dot_product_attention(
            q, k, v, attn_mask=seen, scale=scale, enable_gqa=True
        )
        rows.append(out.transpose(0, 1))
    return torch.cat(rows)


def tolerance(head_dim: int, scale: float) -> float:
    """What 16-bit queries and weights may cost on normal keys, values and queries.

    A score moves by ``scale * sum of e_d k_d`` with the rounding errors e_d uniform in
    half a code, of a query whose largest magnitude is about 4: a standard deviation of
    ``4 / 32512 / sqrt(12) * sqrt(head_dim) * scale``. Ten of them allow for values of 4
    and several tokens. Weights add about 1e-5 of the largest value.
    """
    return 5e-5 + 10 * 3.6e-5 * head_dim**0.5 * scale


def assert_close(
    actual: torch.Tensor, expected: torch.Tensor, scale: float | None = None
) -> None:
    """Half an ulp of the type twice, and the error of fixed point."""
    head_dim = actual.shape[-1]
    eps = torch.finfo(actual.dtype).eps
    torch.testing.assert_close(
        actual.double(),
        expected.double(),
        rtol=eps,
        atol=eps / 8 + tolerance(head_dim, head_dim**-0.5 if scale is None else scale),
    )


@every
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (3, 1)], ids=["mha", "gqa", "mqa"])
@pytest.mark.parametrize("window", [None, 1, 9])
def test_against_torch(
    attention: Callable[..., torch.Tensor],
    head_dim: int,
    heads: tuple[int, int],
    window: int | None,
    kv_batch: Callable[..., Any],
) -> None:
    for rotate in (True, False):
        batch = kv_batch(
            [23, 1, 40],
            [5, 1, 40],
            num_heads=heads[0],
            num_kv_heads=heads[1],
            head_dim=head_dim,
            rotate=rotate,
        )
        expected = independent(batch, window, 0.2)
        actual = batch.attend(attention, window=window, scale=0.2)
        assert actual.dtype == torch.float32 and actual.shape == batch.query.shape
        # The query's transform is float32 where there is one.
        atol = 2e-6 if rotate else 5e-7
        if attention is not reference.kv4_attention:
            atol = tolerance(head_dim, 0.2)
        torch.testing.assert_close(actual.double(), expected, rtol=0, atol=atol)


def test_reference_in_float64(kv_batch: Callable[..., Any]) -> None:
    """Without float32 at either end the definition agrees to float64 rounding."""
    batch = kv_batch([300, 17], [4, 17], rotate=False)
    batch = replace(batch, query=batch.query.double())
    for window in (None, 30):
        actual = batch.attend(reference.kv4_attention, window=window)
        expected = independent(batch, window, 64**-0.5)
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-13)


@every
def test_soft_cap(
    attention: Callable[..., torch.Tensor], kv_batch: Callable[..., Any]
) -> None:
    """``cap tanh(score / cap)`` before the mask: by hand for one row and head."""
    batch = kv_batch([30], [1], num_heads=2, num_kv_heads=1, rotate=False)
    k, v = read_by_hand(batch.cache, batch.block_table[0].tolist(), 30)
    for cap in (1.0, 30.0):
        scores = (k[0] @ batch.query[0].double().t()) * 0.5
        scores = cap * torch.tanh(scores / cap)
        expected = torch.softmax(scores, dim=0).t() @ v[0]
        actual = batch.attend(attention, cap=cap, scale=0.5)
        atol = 1e-6 if attention is reference.kv4_attention else tolerance(64, 0.5)
        torch.testing.assert_close(actual[0].double(), expected, rtol=0, atol=atol)
    assert not torch.equal(actual, batch.attend(attention, scale=0.5))


@every
def test_one_token_sees_itself(
    attention: Callable[..., torch.Tensor], kv_batch: Callable[..., Any]
) -> None:
    """The first position, or a window of one, returns its own decoded value."""
    batch = kv_batch([20], num_heads=2, num_kv_heads=2, head_dim=80)
    _, v = read_by_hand(batch.cache, batch.block_table[0].tolist(), 20)
    out = batch.attend(attention, window=1)
    torch.testing.assert_close(out, v.transpose(0, 1).float(), rtol=1e-6, atol=1e-7)
    first = batch.attend(attention)[0]
    torch.testing.assert_close(first, v[:, 0].float(), rtol=1e-6, atol=1e-7)


@every
def test_window_is_exact(
    attention: Callable[..., torch.Tensor], kv_batch: Callable[..., Any]
) -> None:
    """A window of w sees the same as a sequence of its last w tokens."""
    batch = kv_batch([60], [1])
    whole = batch.attend(attention)
    for window in (60, 61, 1000):
        assert torch.equal(batch.attend(attention, window=window), whole)
    assert not torch.equal(batch.attend(attention, window=59), whole)


@pytest.mark.parametrize("block_size", [16, 32, 48, 128])
@pytest.mark.parametrize("window", [None, 100, 300])
@pytest.mark.parametrize("cap", [None, 5.0])
def test_generic_against_reference(
    block_size: int,
    window: int | None,
    cap: float | None,
    kv_batch: Callable[..., Any],
) -> None:
    batch = kv_batch(
        [255, 256, 257, 600],
        [3, 256, 17, 130],
        block_size=block_size,
        head_dim=128 if block_size == 32 else 64,
    )
    expected = batch.attend(reference.kv4_attention, window=window, cap=cap)
    actual = batch.attend(generic.kv4_attention, window=window, cap=cap)
    assert torch.isfinite(actual).all()
    assert_close(actual, expected)


def test_types(dtype: torch.dtype, kv_batch: Callable[..., Any]) -> None:
    for head_dim in HEAD_DIMS:
        batch = kv_batch([257, 90], [17, 90], head_dim=head_dim, dtype=dtype)
        expected = batch.attend(reference.kv4_attention, window=200, cap=5.0)
        actual = batch.attend(generic.kv4_attention, window=200, cap=5.0)
        assert actual.dtype == expected.dtype == dtype
        assert_close(actual, expected)


@pytest.mark.parametrize("rotate", [True, False])
def test_error_of_fixed_point(rotate: bool, kv_batch: Callable[..., Any]) -> None:
    """16-bit queries and weights: about 1e-5 of values of magnitude 1."""
    for head_dim in HEAD_DIMS:
        batch = kv_batch([700], [50], head_dim=head_dim, rotate=rotate)
        expected = batch.attend(reference.kv4_attention)
        error = batch.attend(generic.kv4_attention) - expected
        assert 1e-7 < error.square().mean().sqrt() < 1e-5


@pytest.mark.parametrize("seq_len", [1, 16, 17, 255, 256, 257, 511, 512, 513])
def test_lengths_around_the_split(seq_len: int, kv_batch: Callable[..., Any]) -> None:
    assert generic.SPLIT == 256
    for window in (None, 1, 255, 256, 257):
        batch = kv_batch([seq_len], [min(seq_len, 2)], num_heads=2)
        expected = batch.attend(reference.kv4_attention, window=window)
        actual = batch.attend(generic.kv4_attention, window=window)
        assert_close(actual, expected)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_shape(data: st.DataObject, kv_batch: Callable[..., Any]) -> None:
    num_kv_heads = data.draw(st.integers(1, 3))
    query_lens = data.draw(st.lists(st.integers(1, 20), min_size=1, max_size=3))
    contexts = [data.draw(st.integers(0, 300)) for _ in query_lens]
    batch = kv_batch(
        [c + q for c, q in zip(contexts, query_lens, strict=True)],
        query_lens,
        num_kv_heads=num_kv_heads,
        num_heads=num_kv_heads * data.draw(st.integers(1, 4)),
        head_dim=data.draw(st.sampled_from(HEAD_DIMS)),
        block_size=data.draw(st.sampled_from((16, 32, 128))),
        rotate=data.draw(st.booleans()),
        seed=data.draw(st.integers(0, 1000)),
    )
    window = data.draw(st.none() | st.integers(1, 320))
    cap = data.draw(st.none() | st.floats(1, 50))
    scale = data.draw(st.floats(0.01, 1))
    sinks = data.draw(st.none() | st.just(torch.randn(batch.query.shape[1])))
    arguments = {"window": window, "cap": cap, "scale": scale, "sinks": sinks}
    expected = batch.attend(reference.kv4_attention, **arguments)
    actual = batch.attend(generic.kv4_attention, **arguments)
    assert torch.isfinite(actual).all()
    assert_close(actual, expected, scale)


@pytest.mark.parametrize("scale", [1e-30, 1e6])
def test_extreme_scores(scale: float, kv_batch: Callable[..., Any]) -> None:
    """Uniform and one-hot probabilities: no overflow, no empty sum."""
    batch = kv_batch([400], [9])
    expected = batch.attend(reference.kv4_attention, scale=scale)
    actual = batch.attend(generic.kv4_attention, scale=scale)
    assert torch.isfinite(actual).all()
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-3)


@every
def test_many_small_probabilities(
    attention: Callable[..., torch.Tensor], kv_batch: Callable[..., Any]
) -> None:
    """Tokens that are nothing one by one count together: 3000 of e^-20.6 each.

    Constant rows are exact in the cache, so the result has a closed form. In fixed
    point only those in the split of the large one are lost.
    """
    others, gap = 3000, 20.6
    batch = kv_batch([others + 1], [1], num_heads=1, num_kv_heads=1, rotate=False)
    key, value = torch.ones(2, others + 1, 1, 64)
    key[0], value[1:] = 15, -1
    position = torch.arange(others + 1)
    slots = batch.block_table[0, position // 16].long() * 16 + position % 16
    kv4_store(key, value, batch.cache, slots, False)
    batch = replace(batch, query=torch.full((1, 1, 64), 0.25))
    out = batch.attend(attention, scale=gap / (14 * 64 * 0.25))
    rest = others * math.exp(-gap)
    expected = torch.full_like(out, (1 - rest) / (1 + rest))
    lost = 0 if attention is reference.kv4_attention else 255 * 2 * math.exp(-gap)
    torch.testing.assert_close(out, expected, rtol=6e-7 + lost, atol=0)
    assert lost < rest / 5


@every
def test_sequences_without_rows(
    attention: Callable[..., torch.Tensor], kv_batch: Callable[..., Any]
) -> None:
    """A sequence with no new token, and one with nothing cached, change nothing."""
    batch = kv_batch([33, 20, 40], [3, 1, 2])
    whole = batch.attend(attention)
    alone = batch.reordered([0, 2]).attend(attention)
    idle = replace(
        batch.reordered([0, 1, 2]),
        query=torch.cat((batch.query[:3], batch.query[4:])),
        query_lens=(3, 0, 2),
    )
    for seq_len in (20, 0):
        empty = replace(idle, seq_lens=(33, seq_len, 40))
        assert torch.equal(empty.attend(attention), alone)
    assert torch.equal(torch.cat((whole[:3], whole[4:])), alone)
    nothing = replace(batch, query=batch.query[:0], query_lens=(0, 0, 0))
    assert nothing.attend(attention).shape == (0, 4, 64)


@every
def test_heads_that_do_not_divide(
    attention: Callable[..., torch.Tensor], kv_batch: Callable[..., Any]
) -> None:
    batch = kv_batch([5], [1])
    batch = replace(batch, query=batch.query[:, :3])
    with pytest.raises(ValueError, match="num_heads 3 is not a multiple of .* 2"):
        batch.attend(attention)


@every
def test_cache_of_another_form(
    attention: Callable[..., torch.Tensor], kv_batch: Callable[..., Any]
) -> None:
    batch = kv_batch([5], [1])
    with pytest.raises(ValueError, match="kv_cache must be uint8 .* got torch.int8"):
        replace(batch, cache=batch.cache.view(torch.int8)).attend(attention)
    with pytest.raises(ValueError, match="pages must be contiguous"):
        replace(batch, cache=batch.cache.transpose(2, 3)).attend(attention)
