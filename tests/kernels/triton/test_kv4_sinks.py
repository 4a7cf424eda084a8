# SPDX-License-Identifier: Apache-2.0
"""Attention sinks in the Triton kernels, in every way that they end a row."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from vllm_lowbit.kernels.kv4_attention import reference
from vllm_lowbit.kernels.kv4_attention.triton import kv4_attention

Batches = Callable[..., Any]
Cut = Callable[[int], None]
# Context and query lengths, and the tokens whose contexts may be cut into programs.
ENDS = {
    "merge": ((270, 1), (1, 1), 100),
    "fold": ((270, 1), (1, 1), 0),
    "whole": ((60, 5), (20, 1), 0),
}


def close(actual: torch.Tensor, expected: torch.Tensor) -> bool:
    """Within the error of test_kv4_attention.py: of a few values and of scores."""
    return bool((actual - expected).abs().max() < 4e-3)


@pytest.mark.parametrize("end", ENDS)
@pytest.mark.parametrize(("window", "cap"), [(None, None), (45, 5.0)])
def test_against_the_reference(
    window: int | None, cap: float | None, end: str, cut: Cut, kv_batch: Batches
) -> None:
    *lengths, rows = ENDS[end]
    cut(rows)
    batch = kv_batch(*lengths, head_dim=80 if cap else 64)
    sinks = torch.tensor([1.5, -30.0, 4.0, 0.0])
    arguments = {"window": window, "cap": cap, "sinks": sinks}
    actual = batch.attend(kv4_attention, **arguments)
    expected = batch.attend(reference.kv4_attention, **arguments)
    assert close(actual, expected)
    without = batch.attend(kv4_attention, window=window, cap=cap)
    assert not close(without, expected)


def test_values_of_any_size(kv_batch: Batches) -> None:
    """The peak of a row has the exponent of a V scale in it, the sink has not."""
    batch = kv_batch([270], [1], rotate=False)
    whole = batch.attend(kv4_attention, sinks=torch.zeros(4))
    page = replace(batch, cache=batch.cache.clone())
    parameters = page.cache.flatten(2)[..., 16 * 64 :].view(torch.float16)
    parameters[..., 32:48] *= 256.0  # V scales
    scaled = page.attend(kv4_attention, sinks=torch.zeros(4))
    limit = 1e-5 * float(scaled.abs().max())
    torch.testing.assert_close(scaled, 256 * whole, rtol=0, atol=limit)


@pytest.mark.parametrize("end", ENDS)
def test_special_logits(end: str, cut: Cut, kv_batch: Batches) -> None:
    """None to the bit; all there is; NaN in its head alone."""
    *lengths, rows = ENDS[end]
    cut(rows)
    batch = kv_batch(*lengths, num_heads=6, num_kv_heads=1)
    sinks = torch.tensor([-torch.inf, -500.0, 1e30, torch.inf, torch.nan, 3e38])
    out, without = batch.attend(kv4_attention, sinks=sinks), batch.attend(kv4_attention)
    assert torch.equal(out[:, :2], without[:, :2])
    assert not out[:, 2].any() and out[:, 3:].isnan().all()


@pytest.mark.parametrize("cut_rows", [0, 100])
@pytest.mark.parametrize(("rows", "seq_len"), [(5, 0), (5, 2), (20, 3)])
def test_rows_that_see_nothing(
    rows: int, seq_len: int, cut_rows: int, cut: Cut, kv_batch: Batches
) -> None:
    cut(cut_rows)
    batch = replace(kv_batch([rows]), seq_lens=(seq_len,))
    sinks = torch.tensor([0.0, -90.0, -torch.inf, 3.0])
    out = batch.attend(kv4_attention, sinks=sinks)
    blind = rows - seq_len
    assert not out[:blind, [0, 1, 3]].any() and out[:blind, 2].isnan().all()
    assert out[blind:].isfinite().all() and out[blind:].any(dim=-1).all()


def test_every_way_to_cut_gives_the_same_bits(cut: Cut, kv_batch: Batches) -> None:
    batch = kv_batch([270, 20, 257], [1, 1, 1], num_kv_heads=1)
    sinks = torch.tensor([1.5, -1.0, 4.0, 0.0])
    cut(0)
    whole = batch.attend(kv4_attention, sinks=sinks)
    cut(100)
    assert torch.equal(batch.attend(kv4_attention, sinks=sinks), whole)
    for order in ([2, 0, 1], [1]):
        part = batch.reordered(order).attend(kv4_attention, sinks=sinks)
        assert torch.equal(part, whole[order])
