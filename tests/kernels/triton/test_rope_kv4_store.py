# SPDX-License-Identifier: Apache-2.0
"""The Triton kernel of RoPE and store writes the bits of its definition."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_lowbit.kernels.kv4_store.layout import HEAD_DIMS, planes
from vllm_lowbit.kernels.rope_kv4_store import reference
from vllm_lowbit.kernels.rope_kv4_store.triton import rope_kv4_store

SameBits = Callable[[torch.Tensor, torch.Tensor], None]
POSITIONS = 50
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def arguments(
    head_dim: int = 64,
    dtype: torch.dtype = torch.float32,
    heads: int = 4,
    kv_heads: int = 2,
    tokens: int = 20,
    rotate: bool = True,
) -> dict[str, Any]:
    """Parts of one fused projection; the angles need not be any."""
    qkv = torch.randn(tokens, (heads + 2 * kv_heads) * head_dim).to(dtype)
    sizes = [heads * head_dim, kv_heads * head_dim, kv_heads * head_dim]
    query, key, value = (
        part.view(tokens, -1, head_dim) for part in qkv.split(sizes, dim=-1)
    )
    slots = torch.randperm(80)[: max(1, tokens - 2)]
    slots[0] = -1
    return {
        "query": query,
        "key": key,
        "value": value,
        "positions": torch.randint(POSITIONS, (tokens,)),
        "cos_sin_cache": torch.rand(POSITIONS, head_dim).mul(2).sub(1).to(dtype),
        "kv_cache": torch.full((5, kv_heads, 16, head_dim + 8), 255).byte(),
        "slot_mapping": slots,
        "rotate_key": rotate,
    }


def clone(given: dict[str, Any]) -> dict[str, Any]:
    """The same once more; what lies in one projection still does."""
    memory = given["query"].untyped_storage().clone()
    moved = {
        name: torch.empty(0, dtype=given[name].dtype).set_(
            memory,
            given[name].storage_offset(),
            given[name].shape,
            given[name].stride(),
        )
        for name in ("query", "key", "value")
    }
    return {**given, **moved, "kv_cache": given["kv_cache"].clone()}


def check(given: dict[str, Any], same: SameBits) -> None:
    """All that may be written, and what lies beside it."""
    other = clone(given)
    rope_kv4_store(**given)
    reference.rope_kv4_store(**other)
    for name in ("query", "key", "value", "kv_cache"):
        same(given[name], other[name])


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_bits_of_the_reference(
    head_dim: int, dtype: torch.dtype, assert_same_bits: SameBits
) -> None:
    rotate = dtype != torch.float16
    check(arguments(head_dim, dtype, rotate=rotate), assert_same_bits)


@settings(max_examples=6)
@given(data=st.data())
def test_any_shape(data: st.DataObject, assert_same_bits: SameBits) -> None:
    kv_heads = data.draw(st.integers(1, 2))
    torch.manual_seed(data.draw(st.integers(0, 1000)))
    given_ = arguments(
        data.draw(st.sampled_from(HEAD_DIMS)),
        data.draw(st.sampled_from(DTYPES)),
        kv_heads * data.draw(st.integers(1, 3)),
        kv_heads,
        data.draw(st.integers(1, 40)),
        data.draw(st.booleans()),
    )
    if data.draw(st.booleans()):
        given_["positions"] = given_["positions"].int()
        given_["cos_sin_cache"] = given_["cos_sin_cache"].float()
    check(given_, assert_same_bits)


def test_values_that_are_not_finite(
    dtype: torch.dtype, assert_same_bits: SameBits
) -> None:
    """NaN stays NaN whatever its bits, and overflow is infinite."""
    given_ = arguments(dtype=dtype)
    given_["query"][3, 1, 5], given_["key"][4, 0, 40] = torch.nan, -torch.inf
    given_["query"][5] = torch.finfo(dtype).max
    if dtype == torch.float32:
        nan = torch.tensor(0x7FFFFFFF, dtype=torch.int32).view(torch.float32)
        given_["query"][6, 0, 0] = nan
    other = clone(given_)
    rope_kv4_store(**given_)
    reference.rope_kv4_store(**other)
    for name in ("query", "key"):
        lost = other[name].isnan()
        assert torch.equal(given_[name].isnan(), lost)
        assert torch.equal(given_[name][~lost], other[name][~lost])
    assert given_["query"][3].isnan().sum() == 2
    assert_same_bits(given_["kv_cache"], other["kv_cache"])


@pytest.mark.parametrize("position", [-1, POSITIONS, 1 << 40])
def test_positions_without_angles(position: int) -> None:
    """Their token is NaN, in the cache too, and no other changes a bit."""
    given_ = arguments()
    expected = clone(given_)
    rope_kv4_store(**expected)
    positions = given_["positions"].clone()
    positions[7] = position
    rope_kv4_store(**{**given_, "positions": positions})
    slot = int(given_["slot_mapping"][7])
    scale = planes(given_["kv_cache"]).k_scale
    assert scale[slot // 16, :, slot % 16].isnan().all()
    for name in ("query", "key"):
        assert given_[name][7].isnan().all()
        given_[name][7] = expected[name][7]
        assert torch.equal(given_[name], expected[name])


def test_slots_outside_of_the_cache_are_skipped() -> None:
    given_ = arguments(tokens=3)
    memory = torch.full((7, 2, 16, 72), 255, dtype=torch.uint8)
    given_["kv_cache"] = memory[1:6]
    given_["slot_mapping"] = torch.tensor([5 * 16, -5, 1 << 40])
    rope_kv4_store(**given_)
    assert bool((memory == 255).all())


def test_no_tokens() -> None:
    given_ = arguments(tokens=1)
    for name in ("query", "key", "value", "positions", "slot_mapping"):
        given_[name] = given_[name][:0]
    rope_kv4_store(**given_)
    assert bool((given_["kv_cache"] == 255).all())


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("query", lambda x: x.to("meta"), "Triton kernels run on cuda, not on meta"),
        ("query", lambda x: x.double(), "query must be torch.float32, .*float64"),
        ("query", lambda x: x[..., :32], r"query must be \[20, 4, 64\], got"),
        ("query", lambda x: x.half(), "key must be torch.float16 .* as query, got"),
        ("key", lambda x: x[:, :1], r"key must be \[20, 2, 64\], got \[20, 1, 64\]"),
        ("value", lambda x: x.int(), "value must be torch.float32, .*int32"),
        ("positions", lambda x: x.float(), "positions must be int32 or int64, got"),
        ("positions", lambda x: x[:9], r"positions must be \[20\], got \[9\]"),
        ("positions", lambda x: x.to("meta"), "positions must be on cpu, got meta"),
        ("cos_sin_cache", lambda x: x[:, :32], r"cos_sin_cache must be \[max_pos"),
        ("cos_sin_cache", lambda x: x.double(), "cos_sin_cache must have .*float64"),
        ("cos_sin_cache", lambda x: x.t().contiguous().t(), "cos_sin_cache must have"),
        ("cos_sin_cache", lambda x: x.to("meta"), "cos_sin_cache must be on cpu, got"),
        ("kv_cache", lambda x: x.view(torch.int8), "kv_cache must be uint8 .*int8"),
        ("slot_mapping", lambda x: torch.arange(21), "must have at most 20 slots, got"),
        ("slot_mapping", lambda x: x.half(), "slot_mapping must be int32 or int64"),
    ],
)
def test_bad_input(name: str, change: Callable[[Any], Any], message: str) -> None:
    given_ = arguments()
    before = given_["query"].clone()
    with pytest.raises(ValueError, match=message):
        rope_kv4_store(**{**given_, name: change(given_[name])})
    assert torch.equal(given_["query"], before)
