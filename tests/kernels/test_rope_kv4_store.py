# SPDX-License-Identifier: Apache-2.0
"""RoPE in front of the KV4 store: the definition, and vLLM's own RoPE beside it."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from vllm_lowbit.kernels.kv4_store.generic import kv4_store
from vllm_lowbit.kernels.kv4_store.layout import HEAD_DIMS
from vllm_lowbit.kernels.rope_kv4_store.reference import rope, rope_kv4_store

SameBits = Callable[[torch.Tensor, torch.Tensor], None]


def angles(positions: int, head_dim: int, dtype: torch.dtype) -> torch.Tensor:
    """Cosines and sines as models have them."""
    frequency = 10000.0 ** (-torch.arange(0, head_dim, 2) / head_dim)
    angle = torch.arange(positions).unsqueeze(1) * frequency
    return torch.cat((angle.cos(), angle.sin()), dim=-1).to(dtype)


def test_pairs_turn_by_their_angle() -> None:
    """As complex numbers, in float64; the first position does not move."""
    x = torch.randn(9, 3, 64, dtype=torch.float64)
    positions = torch.tensor([0, 1, 2, 3, 100, 7, 50, 30, 99])
    cache = angles(101, 64, torch.float32)
    actual = rope(x.float(), positions, cache)
    turn = torch.complex(*cache.double()[positions].unsqueeze(1).chunk(2, dim=-1))
    expected = torch.complex(*x.chunk(2, dim=-1)) * turn
    expected = torch.cat((expected.real, expected.imag), dim=-1)
    torch.testing.assert_close(actual.double(), expected, rtol=0, atol=1e-6)
    assert torch.equal(actual[0], x[0].float())


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_bits_of_vllm(
    head_dim: int, dtype: torch.dtype, assert_same_bits: SameBits
) -> None:
    """Its compiled kernel, over the parts of a fused projection."""
    pytest.importorskip("vllm")
    from vllm import _custom_ops as ops
    from vllm.platforms import current_platform

    current_platform.import_kernels()
    qkv = torch.randn(40, 6, head_dim).to(dtype)
    positions = torch.randint(500, (40,))
    cache = angles(500, head_dim, dtype)
    query, key = qkv[:, :3].clone(), qkv[:, 3:5].clone()
    expected = [rope(x, positions, cache) for x in (query, key)]
    flat = qkv.flatten(1)
    parts = flat.split([3 * head_dim, 2 * head_dim, head_dim], dim=-1)
    ops.rotary_embedding(positions, *parts[:2], head_dim, cache, True)
    for actual, wanted in zip(parts, expected, strict=False):
        assert_same_bits(actual.reshape(wanted.shape), wanted)


@pytest.mark.parametrize("rotate", [True, False])
def test_rope_then_store(
    rotate: bool, dtype: torch.dtype, assert_same_bits: SameBits
) -> None:
    """In place, every byte; tokens without a slot are rotated and not stored."""
    query, key = torch.randn(9, 4, 64).to(dtype), torch.randn(9, 2, 64).to(dtype)
    value, positions = torch.randn(9, 2, 64).to(dtype), torch.randint(30, (9,))
    cache = angles(30, 64, dtype)
    slots = torch.tensor([4, 17, -1, 3, 30, 0, 9])
    pages = [torch.full((2, 2, 16, 72), 255, dtype=torch.uint8) for _ in range(2)]
    rotated = [rope(x, positions, cache) for x in (query, key)]
    kv4_store(rotated[1][:7], value[:7], pages[1], slots, rotate)
    rope_kv4_store(query, key, value, positions, cache, pages[0], slots, rotate)
    for actual, expected in ((pages[0], pages[1]), (query, rotated[0])):
        assert_same_bits(actual, expected)
    assert_same_bits(key, rotated[1])


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("positions", lambda x: x + 26, r"positions must be in \[0, 30\), got 30"),
        ("positions", lambda x: x - 5, r"positions must be in \[0, 30\), got -1"),
        ("positions", lambda x: x[:4], r"positions must be \[5\], got \[4\]"),
        ("positions", lambda x: x[None], r"positions must be \[5\], got \[1, 5\]"),
        ("query", lambda x: x[0], "query must be .*, heads, 64"),
        ("key", lambda x: x[:4], r"key must be torch.float32 \[5, heads, 64\] as"),
        ("key", lambda x: x.half(), "key must be torch.float32 .* torch.float16"),
        (
            "cos_sin_cache",
            lambda x: x[:, :32],
            r"cos_sin_cache must be \[max_position, 64\], got \[30, 32\]",
        ),
        (
            "slot_mapping",
            lambda x: torch.arange(6),
            r"slot_mapping must have at most 5 slots, got \[6\]",
        ),
    ],
)
def test_bad_input(name: str, change: Callable[[Any], Any], message: str) -> None:
    """Refused before anything is written."""
    arguments = {
        "query": torch.randn(5, 4, 64),
        "key": torch.randn(5, 2, 64),
        "value": torch.randn(5, 2, 64),
        "positions": torch.tensor([4, 5, 6, 7, 8]),
        "cos_sin_cache": angles(30, 64, torch.float32),
        "kv_cache": torch.full((1, 2, 16, 72), 255, dtype=torch.uint8),
        "slot_mapping": torch.arange(5),
        "rotate_key": True,
    }
    arguments[name] = change(arguments[name])
    before = {k: v.clone() for k, v in arguments.items() if k != "rotate_key"}
    with pytest.raises(ValueError, match=message):
        rope_kv4_store(**arguments)
    assert all(torch.equal(arguments[k], v) for k, v in before.items())
