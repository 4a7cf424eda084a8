# SPDX-License-Identifier: Apache-2.0
"""Compiled store and attention: the bytes and bits of ``generic``, on any CPU."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_lowbit.kernels.cpu import library
from vllm_lowbit.kernels.kv4_attention import cpu, generic
from vllm_lowbit.kernels.kv4_store import cpu as store_cpu
from vllm_lowbit.kernels.kv4_store import generic as store_generic
from vllm_lowbit.kernels.kv4_store.layout import HEAD_DIMS, planes

pytestmark = pytest.mark.usefixtures("garbage_in_empty")

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
BLOCK_SIZES = (16, 32, 48, 64, 80, 128, 256)
# Logits of sinks: none, negligible, ordinary, all there is.
SINKS = (-torch.inf, -400.0, -2.5, 0.0, 1.0, 30.0, 1e30)


def sinks_of(data: st.DataObject, num_heads: int) -> torch.Tensor | None:
    """Some for every head, or None."""
    logits = st.lists(st.sampled_from(SINKS), min_size=num_heads, max_size=num_heads)
    drawn = data.draw(st.none() | logits)
    return None if drawn is None else torch.tensor(drawn)


def assert_equal(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """Equal bits, NaN at the same places."""
    assert (actual.dtype, actual.shape) == (expected.dtype, expected.shape)
    nan = expected.isnan()
    assert torch.equal(actual.isnan(), nan)
    assert torch.equal(actual[~nan], expected[~nan])


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_attention_of_any_shape(
    isa: str, data: st.DataObject, kv_batch: Callable[..., Any]
) -> None:
    num_kv_heads = data.draw(st.integers(1, 3))
    query_lens = data.draw(st.lists(st.integers(1, 40), min_size=1, max_size=3))
    contexts = [data.draw(st.integers(0, 600)) for _ in query_lens]
    batch = kv_batch(
        [c + q for c, q in zip(contexts, query_lens, strict=True)],
        query_lens,
        num_kv_heads=num_kv_heads,
        num_heads=num_kv_heads * data.draw(st.integers(1, 9)),
        head_dim=data.draw(st.sampled_from(HEAD_DIMS)),
        block_size=data.draw(st.sampled_from(BLOCK_SIZES)),
        dtype=data.draw(st.sampled_from(DTYPES)),
        rotate=data.draw(st.booleans()),
        seed=data.draw(st.integers(0, 1000)),
    )
    arguments = {
        "window": data.draw(st.none() | st.integers(1, 320)),
        "cap": data.draw(st.none() | st.floats(0.1, 50)),
        "scale": data.draw(st.sampled_from((1e-30, 0.01, 0.125, 1.0, 30.0, 1e6, -0.1))),
        "sinks": sinks_of(data, batch.query.shape[1]),
    }
    torch.set_num_threads(data.draw(st.integers(1, 2)))
    expected = batch.attend(generic.kv4_attention, **arguments)
    assert torch.isfinite(expected).all()
    with library.force_isa(isa):
        assert_equal(batch.attend(cpu.kv4_attention, **arguments), expected)


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("rows", [1, 3, 33])
def test_threads_that_share_a_context(
    isa: str, head_dim: int, rows: int, kv_batch: Callable[..., Any]
) -> None:
    """Pieces of a long context are merged in order, whoever computes them."""
    batch = kv_batch([1500, 3], [rows, 1], num_heads=2, head_dim=head_dim)
    for window, sinks in ((None, torch.tensor([2.0, -1.0])), (1100, None)):
        arguments = {"window": window, "sinks": sinks}
        expected = batch.attend(generic.kv4_attention, **arguments)
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            with library.force_isa(isa):
                assert_equal(batch.attend(cpu.kv4_attention, **arguments), expected)


@pytest.mark.parametrize("group", [1, 2, 5, 32, 71])
def test_heads_that_share_keys(
    isa: str, group: int, kv_batch: Callable[..., Any]
) -> None:
    batch = kv_batch([300], [3], num_heads=group, num_kv_heads=1)
    with library.force_isa(isa):
        actual = batch.attend(cpu.kv4_attention)
    assert_equal(actual, batch.attend(generic.kv4_attention))


def test_extreme_parameters(isa: str, kv_batch: Callable[..., Any]) -> None:
    """Scales and zeros as far apart as they can be, codes of every value."""
    batch = kv_batch([520], [6], num_heads=8, rotate=False)
    cache = torch.randint(0, 256, batch.cache.shape, dtype=torch.uint8)
    views = planes(cache)
    scales = torch.tensor([2.0**-24, 2.0**-14, 0.01, 1.0, 65504.0]).half()
    zeros = torch.tensor([-1024.0, -500.5, -0.015625, 0.0, 7.25, 503.0, 1024.0]).half()
    for plane, values in zip(views[2:], (scales, zeros, scales, zeros), strict=True):
        plane.copy_(values[torch.randint(len(values), plane.shape)])
    for fixed in (False, True):
        if fixed:
            views.v_zero.fill_(7.25)
        extreme = replace(batch, cache=cache)
        for scale in (1e-7, 0.125):
            expected = extreme.attend(generic.kv4_attention, scale=scale)
            assert torch.isfinite(expected).all()
            with library.force_isa(isa):
                actual = extreme.attend(cpu.kv4_attention, scale=scale)
            assert_equal(actual, expected)


@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_nan_of_parameters_and_queries(
    isa: str, data: st.DataObject, kv_batch: Callable[..., Any]
) -> None:
    batch = kv_batch([700, 30], [20, 30], num_heads=6, dtype=torch.bfloat16)
    cache, query = batch.cache.clone(), batch.query.clone()
    for _ in range(data.draw(st.integers(1, 3))):
        token = data.draw(st.integers(0, 699))
        block = int(batch.block_table[0, token // 16])
        plane = planes(cache)[data.draw(st.integers(2, 5))]
        value = data.draw(st.sampled_from((torch.nan, torch.inf, -torch.inf, 1025.0)))
        plane[block, data.draw(st.integers(0, 1)), token % 16] = value
    row = data.draw(st.integers(0, len(query) - 1))
    query[row, data.draw(st.integers(0, 5)), 3] = data.draw(
        st.sampled_from((torch.nan, torch.inf, 1e38, 1e-38))
    )
    batch = replace(batch, cache=cache, query=query)
    arguments = {
        "window": data.draw(st.none() | st.integers(1, 700)),
        "cap": data.draw(st.sampled_from((None, 5.0))),
        "sinks": data.draw(
            st.sampled_from((None, torch.tensor([torch.nan, torch.inf, 3e38, 0, 1, 2])))
        ),
    }
    expected = batch.attend(generic.kv4_attention, **arguments)
    with library.force_isa(isa):
        assert_equal(batch.attend(cpu.kv4_attention, **arguments), expected)


def test_query_of_a_fused_projection(isa: str, kv_batch: Callable[..., Any]) -> None:
    batch = kv_batch([50], [9], num_heads=4)
    fused = torch.randn(9, 8, 64)
    fused[:, 2:6] = batch.query
    whole = replace(batch, query=fused[:, 2:6])
    with library.force_isa(isa):
        actual = whole.attend(cpu.kv4_attention)
    assert_equal(actual, batch.attend(generic.kv4_attention))


def stored(store: Callable[..., None], head_dim: int, *arguments: Any) -> torch.Tensor:
    cache = torch.full((7, 3, 16, head_dim + 8), 165, dtype=torch.uint8)
    store(arguments[0], arguments[1], cache, *arguments[2:])
    return cache


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_store(isa: str, data: st.DataObject) -> None:
    """Every byte, over rows of all magnitudes, constant ones, zeros and NaNs."""
    head_dim = data.draw(st.sampled_from(HEAD_DIMS))
    dtype = data.draw(st.sampled_from(DTYPES))
    tokens = data.draw(st.integers(0, 40))
    torch.manual_seed(data.draw(st.integers(0, 1000)))
    shape = (2, tokens, 3, head_dim)
    x = torch.randn(shape) + torch.randn(2, tokens, 3, 1) * 3
    size = data.draw(st.sampled_from((0, 10, 120)))
    x *= torch.exp2(torch.randint(-size, size + 1, (2, tokens, 3, 1)).float())
    for kind in range(4):
        rows = torch.rand(2, tokens, 3) < 0.1
        fill = (0.0, torch.rand(()).item(), torch.nan, -torch.inf)[kind]
        x[rows] = fill if kind < 2 else x[rows].index_fill_(-1, torch.tensor(5), fill)
    x = torch.where(torch.rand(2, tokens, 3, 1) < 0.2, x.abs().clamp(min=0.5) - 0.5, x)
    key, value = x.to(dtype)
    slots = torch.randperm(7 * 16)[:tokens]
    slots[torch.rand(tokens) < 0.1] = -1
    rotate = data.draw(st.booleans())
    torch.set_num_threads(data.draw(st.integers(1, 2)))
    expected = stored(store_generic.kv4_store, head_dim, key, value, slots, rotate)
    with library.force_isa(isa):
        actual = stored(store_cpu.kv4_store, head_dim, key, value, slots, rotate)
    assert torch.equal(actual, expected)


def test_slot_outside_of_the_cache(isa: str) -> None:
    """Refused; nothing is written beyond the cache, and the other slots are."""
    key, value = torch.randn(2, 3, 3, 64)
    memory = torch.full((9, 3, 16, 72), 165, dtype=torch.uint8)
    with library.force_isa(isa):
        with pytest.raises(ValueError, match="has slot 112, kv_cache 7 blocks of 16"):
            slots = torch.tensor([3, 112, 5])
            store_cpu.kv4_store(key, value, memory[:7], slots, True)
    assert (memory[7:] == 165).all()
    expected = stored(
        store_generic.kv4_store, 64, key[::2], value[::2], slots[::2], True
    )
    assert torch.equal(memory[:7], expected)


def test_pages_outside_of_the_cache(isa: str, kv_batch: Callable[..., Any]) -> None:
    batch = kv_batch([600, 40], [2, 40])
    for wrong in (len(batch.cache), -1):
        for sequence, column in ((0, 0), (0, 37), (1, 2)):
            table = batch.block_table.clone()
            table[sequence, column] = wrong
            with library.force_isa(isa):
                with pytest.raises(ValueError, match="block_table names pages outside"):
                    replace(batch, block_table=table).attend(cpu.kv4_attention)
    narrow = replace(batch, block_table=batch.block_table[:, :37])
    with library.force_isa(isa):
        with pytest.raises(ValueError, match="block_table names pages outside"):
            narrow.attend(cpu.kv4_attention)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda b: {"query": b.query.double()}, "query must be float32, bfloat16"),
        (lambda b: {"query": b.query[..., :40]}, "query has head_dim 40, kv_cache 64"),
        (
            lambda b: {"query": b.query.transpose(1, 2).contiguous().transpose(1, 2)},
            "heads of query must be contiguous",
        ),
        (
            lambda b: {"cache": torch.zeros(2, 2, 8, 72, dtype=torch.uint8)},
            "block_size must be a multiple of 16, got 8",
        ),
        (
            lambda b: {"cache": torch.zeros(2, 2, 512, 72, dtype=torch.uint8)},
            "block_size must be at most 256, got 512",
        ),
        (lambda b: {"seq_lens": (9, 9)}, "query_start_loc must be torch.int32"),
    ],
)
def test_arguments_that_are_refused(
    change: Callable[[Any], dict[str, Any]],
    message: str,
    isa: str,
    kv_batch: Callable[..., Any],
) -> None:
    batch = kv_batch([9], [9])
    with library.force_isa(isa), pytest.raises(ValueError, match=message):
        replace(batch, **change(batch)).attend(cpu.kv4_attention)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        (torch.zeros(2, 3, 32), torch.zeros(2, 3, 64), r"key must be .* \[2, 3, 64\]"),
        (
            torch.zeros(2, 3, 64),
            torch.zeros(2, 2, 64),
            r"value must be .* \[2, 2, 64\]",
        ),
        (
            torch.zeros(2, 3, 64),
            torch.zeros(2, 3, 64).half(),
            "value must be .*float16",
        ),
        (torch.zeros(2, 3, 64).double(),) * 2 + ("key must be float32, bfloat16",),
        (torch.zeros(2, 3, 128)[..., ::2],) * 2 + ("heads of key must be contiguous",),
    ],
)
def test_keys_and_values_that_are_refused(
    isa: str, key: torch.Tensor, value: torch.Tensor, message: str
) -> None:
    with library.force_isa(isa), pytest.raises(ValueError, match=message):
        stored(store_cpu.kv4_store, 64, key, value, torch.tensor([0, 1]), False)
