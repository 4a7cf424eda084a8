# SPDX-License-Identifier: Apache-2.0
"""The Triton store writes the bytes of the reference."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_lowbit.kernels.kv4_store import generic
from vllm_lowbit.kernels.kv4_store.layout import HEAD_DIMS
from vllm_lowbit.kernels.kv4_store.triton import kv4_store, rotation_table

SameBits = Callable[[torch.Tensor, torch.Tensor], None]


def pages(blocks: int, heads: int, block_size: int, head_dim: int) -> torch.Tensor:
    shape = (blocks, heads, block_size, head_dim + 8)
    return torch.full(shape, 255, dtype=torch.uint8)


def check(
    key: torch.Tensor,
    value: torch.Tensor,
    slots: torch.Tensor,
    rotate: bool,
    same: SameBits,
    block_size: int = 16,
) -> None:
    """The whole cache, also what must not be written."""
    caches = [pages(5, key.shape[1], block_size, key.shape[2]) for _ in range(2)]
    kv4_store(key, value, caches[0], slots, rotate)
    generic.kv4_store(key, value, caches[1], slots, rotate)
    same(*caches)
    assert not bool((caches[1] == 255).all())


def difficult(head_dim: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows at the ends of the grid among ordinary ones, ``[24, 2, head_dim]``."""
    key, value = torch.randn(2, 24, 2, head_dim)
    value[1], value[2], value[3] = 0.0, -7.0, 100 + value[3] / 100
    key[1], key[2, 0, 5], key[2, 1] = 0.0, torch.inf, torch.nan
    value[4, 0, 3], value[4, 1, 0] = torch.nan, -torch.inf
    key[5], value[5], value[6] = 1e-30, 1e-6 * value[5], 3e4 * value[6].clamp(-2, 2)
    key[6], key[7], value[7] = 1e4 * key[6], 1e-42, 1e-42
    key[8], value[8] = 3e38, 3e38 * value[8].clamp(-1, 1)
    key[9], key[9, :, 1:] = 3.0, 0.0
    return key.to(dtype), value.to(dtype)


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_bytes_of_the_reference(
    head_dim: int, dtype: torch.dtype, assert_same_bits: SameBits
) -> None:
    """All widths and types, padding, and values at every end of the grid."""
    key, value = difficult(head_dim, dtype)
    slots = torch.randperm(80)[:24]
    slots[[0, 11]] = -1
    for rotate in (True, False):
        check(key, value, slots, rotate, assert_same_bits)


@settings(max_examples=8)
@given(data=st.data())
def test_any_shape(data: st.DataObject, assert_same_bits: SameBits) -> None:
    tokens, heads = data.draw(st.integers(1, 40)), data.draw(st.integers(1, 3))
    block_size = data.draw(st.sampled_from((16, 17, 48, 256)))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 1000)))
    head_dim = data.draw(st.sampled_from(HEAD_DIMS))
    qkv = torch.randn(tokens, heads + 2, 2, head_dim, generator=generator)
    qkv *= 10.0 ** data.draw(st.integers(-6, 5))
    slots = torch.randperm(5 * block_size, generator=generator)[:tokens]
    slots[torch.rand(tokens, generator=generator) < 0.1] = -1
    slots[0] = 3
    if data.draw(st.booleans()):
        slots = slots.int()
    # Heads of one token lie apart, as in the fused output of a layer.
    key, value = qkv[:, :heads, 0], qkv[:, 2 : 2 + heads, 1]
    rotate = data.draw(st.booleans())
    check(key, value, slots, rotate, assert_same_bits, block_size)


def test_rows_are_independent(assert_same_bits: SameBits) -> None:
    """One token at a time, and pages in any memory order."""
    key, value = torch.randn(2, 18, 2, 64)
    slots = torch.randperm(80)[:18]
    whole = pages(5, 2, 16, 64)
    kv4_store(key, value, whole, slots, True)
    single = pages(2, 5, 16, 64).transpose(0, 1)
    for i in range(18):
        kv4_store(key[i : i + 1], value[i : i + 1], single, slots[i : i + 1], True)
    assert_same_bits(single.contiguous(), whole)


def test_slots_outside_of_the_cache_are_skipped() -> None:
    """Nothing is written, also not elsewhere: the host does not know the slots."""
    memory = torch.full((7, 2, 16, 72), 255, dtype=torch.uint8)
    key, value = torch.randn(2, 3, 2, 64)
    slots = torch.tensor([5 * 16, -5, 1 << 40])
    kv4_store(key, value, memory[1:6], slots, True)
    assert bool((memory == 255).all())


def test_no_tokens() -> None:
    cache = pages(1, 2, 16, 64)
    nothing = torch.empty(0, 2, 64)
    kv4_store(nothing, nothing, cache, torch.empty(0, dtype=torch.int64), True)
    assert bool((cache == 255).all())


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_rotation_table_is_a_hadamard_matrix(head_dim: int) -> None:
    table = rotation_table(head_dim, torch.device("cpu")).int()
    size = table.shape[0]
    assert size & (size - 1) == 0 and size < 2 * head_dim
    assert not table[head_dim:].any() and not table[:, head_dim:].any()
    inner = table[:head_dim, :head_dim]
    assert torch.equal(inner @ inner.t(), head_dim * torch.eye(head_dim).int())
