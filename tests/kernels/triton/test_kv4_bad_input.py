# SPDX-License-Identifier: Apache-2.0
"""Wrong arguments of the Triton KV4 operators: an error that names them, no launch."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from vllm_lowbit.kernels.kv4_attention.triton import (
    kv4_attention_out,
    workspace_elements,
)
from vllm_lowbit.kernels.kv4_store.triton import kv4_store

Arguments = dict[str, Any]


def odd_pages() -> torch.Tensor:
    return torch.zeros(1 + 2 * 2 * 16 * 72, dtype=torch.uint8)[1:].view(2, 2, 16, 72)


def store_arguments() -> Arguments:
    key = torch.randn(3, 2, 64)
    return {
        "key": key,
        "value": key.clone(),
        "kv_cache": torch.zeros(2, 2, 16, 72, dtype=torch.uint8),
        "slot_mapping": torch.tensor([0, 1, 2]),
        "rotate_key": True,
    }


def attention_arguments() -> Arguments:
    query = torch.randn(3, 4, 64)
    return {
        "query": query,
        "kv_cache": torch.zeros(2, 2, 16, 72, dtype=torch.uint8),
        "block_table": torch.zeros(2, 1, dtype=torch.int32),
        "query_start_loc": torch.tensor([0, 1, 3]),
        "seq_lens": torch.tensor([4, 5]),
        "softmax_scale": 0.125,
        "sliding_window": None,
        "logits_soft_cap": None,
        "sinks": torch.zeros(4),
        "rotate_query": True,
        "out": torch.empty_like(query),
        "workspace": None,
    }


def cases(*rows: tuple[str, Callable[[Any], Any], str]) -> Any:
    return pytest.mark.parametrize(
        ("name", "change", "message"), rows, ids=[f"{r[0]}-{r[2][:30]}" for r in rows]
    )


CACHE = (
    ("kv_cache", lambda x: x.view(torch.int8), "kv_cache must be uint8 .* torch.int8"),
    ("kv_cache", lambda x: x.transpose(2, 3), "pages must be contiguous, got strides"),
    ("kv_cache", lambda x: x[0], r"kv_cache must be uint8 \[blocks, .* got"),
    ("kv_cache", lambda x: x.new_zeros(2, 2, 16, 40), "head_dim must be .* got 32"),
    ("kv_cache", lambda x: odd_pages(), "pages must begin at even addresses"),
    ("kv_cache", lambda x: x.to("meta"), "kv_cache must be on cpu, got meta"),
)


@cases(
    *CACHE,
    ("key", lambda x: x.double(), "key must be torch.float32, .* got torch.float64"),
    ("key", lambda x: x[:2], r"key must be \[3, 2, 64\], got \[2, 2, 64\]"),
    ("key", lambda x: x[:, :1], r"key must be \[3, 2, 64\], got \[3, 1, 64\]"),
    ("key", lambda x: x.to("meta"), "Triton kernels run on cuda, not on meta"),
    ("value", lambda x: x.int(), "value must be torch.float32, .* got torch.int32"),
    (
        "value",
        lambda x: x.transpose(0, 2).contiguous().transpose(0, 2),
        "heads of value must be contiguous",
    ),
    ("value", lambda x: x.to("meta"), "value must be on cpu, got meta"),
    ("slot_mapping", lambda x: x.float(), "slot_mapping must be int32 or int64, got"),
    (
        "slot_mapping",
        lambda x: x[None],
        r"slot_mapping must be \['any'\], got \[1, 3\]",
    ),
    (
        "slot_mapping",
        lambda x: x.repeat_interleave(2)[::2],
        "slot_mapping must be contiguous, got strides",
    ),
    ("slot_mapping", lambda x: x.to("meta"), "slot_mapping must be on cpu, got meta"),
)
def test_store(name: str, change: Callable[[Any], Any], message: str) -> None:
    arguments = store_arguments()
    arguments[name] = change(arguments[name])
    cache = arguments["kv_cache"]
    before = None if cache.is_meta else cache.clone()
    with pytest.raises(ValueError, match=message):
        kv4_store(**arguments)
    assert before is None or torch.equal(cache, before)


def test_arguments_are_right_before_they_are_changed() -> None:
    kv4_store(**store_arguments())
    kv4_attention_out(**attention_arguments())


@cases(
    *CACHE,
    ("query", lambda x: x.double(), "query must be torch.float32, .* torch.float64"),
    ("query", lambda x: x[:, :3], "num_heads 3 is not a multiple of num_kv_heads 2"),
    ("query", lambda x: x[..., :32], r"query must be \[3, 4, 64\], got \[3, 4, 32\]"),
    ("query", lambda x: x.to("meta"), "Triton kernels run on cuda, not on meta"),
    ("query", lambda x: x.bfloat16(), "out must be torch.bfloat16 as query, got"),
    ("out", lambda x: x[:2], r"out must be \[3, 4, 64\], got \[2, 4, 64\]"),
    ("out", lambda x: x.to("meta"), "out must be on cpu, got meta"),
    ("block_table", lambda x: x.float(), "block_table must be int32 or int64, got"),
    ("block_table", lambda x: x[:1], r"block_table must be \[2, 'any'\], got \[1, 1\]"),
    ("query_start_loc", lambda x: x[:2], r"query_start_loc must be \[3\], got \[2\]"),
    ("seq_lens", lambda x: x.short(), "seq_lens must be int32 or int64, got"),
    ("seq_lens", lambda x: x.to("meta"), "seq_lens must be on cpu, got meta"),
    ("sliding_window", lambda x: 0, "sliding_window must be at least 1, got 0"),
    ("logits_soft_cap", lambda x: 0.0, "logits_soft_cap must be positive, got 0.0"),
    ("sinks", lambda x: x[:2], r"sinks must be torch.float32 \[4\], got .* \[2\]"),
    ("sinks", lambda x: x.bfloat16(), "sinks must be torch.float32 .*, got .*bfloat16"),
    ("sinks", lambda x: torch.zeros(8)[::2], "sinks must be contiguous, got strides"),
    ("sinks", lambda x: x.to("meta"), "sinks must be on cpu, got meta"),
    (
        "workspace",
        lambda x: torch.empty(10),
        "workspace must have 24 elements for 3 tokens, got 10",
    ),
    (
        "workspace",
        lambda x: torch.empty(1000).half(),
        "workspace must be contiguous torch.float32, got torch.float16",
    ),
    ("workspace", lambda x: torch.empty(99, device="meta"), "workspace must be on cpu"),
)
def test_attention(name: str, change: Callable[[Any], Any], message: str) -> None:
    arguments = attention_arguments()
    arguments[name] = change(arguments[name])
    out = arguments["out"]
    before = None if out.is_meta else out.clone()
    with pytest.raises(ValueError, match=message):
        kv4_attention_out(**arguments)
    assert before is None or torch.equal(out.nan_to_num(), before.nan_to_num())


@pytest.mark.parametrize("max_seq_len", [16, 5000])
@pytest.mark.parametrize("tokens", [1, 3])
def test_workspace_of_the_stated_size_is_enough(tokens: int, max_seq_len: int) -> None:
    arguments = attention_arguments()
    arguments["block_table"] = torch.zeros(2, -(-max_seq_len // 16), dtype=torch.int32)
    size = workspace_elements(3, 4, 2, 64, max_seq_len, torch.device("cpu"))
    arguments["workspace"] = torch.empty(size)
    kv4_attention_out(**arguments)
