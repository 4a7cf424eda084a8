# SPDX-License-Identifier: Apache-2.0
"""What Triton attention must not read, and what must show as NaN."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from vllm_lowbit.kernels.kv4_attention import reference
from vllm_lowbit.kernels.kv4_attention.triton import kv4_attention
from vllm_lowbit.kernels.kv4_store.layout import planes

Batches = Callable[..., Any]
PARAMETERS = ("k_scale", "k_zero", "v_scale", "v_zero")
# Decodes; chunks whose rows see different parts of a tile.
FORMS = (((40, 270), (1, 1)), ((40, 90), (7, 20)))
FILLS = {"NaN": 255, "zero": 0, "large": 126}


@pytest.mark.parametrize("form", FORMS, ids=["decode", "chunk"])
def test_unwritten_bytes_do_not_matter(
    form: tuple[tuple[int, ...], tuple[int, ...]], kv_batch: Batches
) -> None:
    """Unused pages and the slots after the last token, whatever they hold."""
    batch = kv_batch(*form, num_heads=2, num_kv_heads=1, block_size=32)
    whole = batch.attend(kv4_attention)
    assert torch.isfinite(whole).all()
    written = torch.zeros(batch.cache.shape[:3], dtype=torch.bool)
    for row, length in zip(batch.block_table, batch.seq_lens, strict=True):
        for token in range(length):
            written[row[token // 32], :, token % 32] = True
    for name, fill in FILLS.items():
        cache = torch.full_like(batch.cache, fill)
        for source, target in zip(planes(batch.cache), planes(cache), strict=True):
            target[written] = source[written]
        actual = replace(batch, cache=cache).attend(kv4_attention)
        assert torch.equal(actual, whole), name


@pytest.mark.parametrize(("value", "window"), [(torch.nan, None), (torch.inf, 12)])
@pytest.mark.parametrize("form", FORMS, ids=["decode", "chunk"])
def test_poisoned_tokens_reach_the_rows_that_see_them(
    form: tuple[tuple[int, ...], tuple[int, ...]],
    value: float,
    window: int | None,
    kv_batch: Batches,
) -> None:
    """As the reference: those rows of that head are NaN, no other changes a bit."""
    batch = kv_batch(*form, num_heads=2)
    whole = batch.attend(kv4_attention, window=window)
    token = batch.seq_lens[1] - 6
    page = int(batch.block_table[1, token // 16])
    for parameter in PARAMETERS:
        cache = batch.cache.clone()
        getattr(planes(cache), parameter)[page, 1, token % 16] = value
        poisoned = replace(batch, cache=cache)
        expected = poisoned.attend(reference.kv4_attention, window=window).isnan()
        actual = poisoned.attend(kv4_attention, window=window)
        assert expected.any() and torch.equal(actual.isnan(), expected), parameter
        assert torch.equal(actual[~expected], whole[~expected]), parameter


@pytest.mark.parametrize("parameter", ["k_scale", "v_scale"])
@pytest.mark.parametrize("value", [0.0, -1.0])
def test_scales_that_the_store_does_not_write(
    parameter: str, value: float, kv_batch: Batches
) -> None:
    batch = kv_batch([40], [3])
    getattr(planes(batch.cache), parameter)[batch.block_table[0, 0], 0, 5] = value
    out = batch.attend(kv4_attention)
    assert out[:, :2].isnan().all() and out[:, 2:].isfinite().all()


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("rotate", [True, False])
def test_queries_that_are_not_finite(
    value: float, rotate: bool, kv_batch: Batches
) -> None:
    """Their own row and head alone."""
    batch = kv_batch([40, 9], [3, 1], rotate=rotate)
    whole = batch.attend(kv4_attention)
    query = batch.query.clone()
    query[1, 2, 7] = value
    out = replace(batch, query=query).attend(kv4_attention)
    assert out[1, 2].isnan().all()
    out[1, 2] = whole[1, 2]
    assert torch.equal(out, whole)
