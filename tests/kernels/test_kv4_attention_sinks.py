# SPDX-License-Identifier: Apache-2.0
"""Attention sinks: a logit of each head that takes part in the softmax alone."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from vllm_lowbit.kernels.cpu import library
from vllm_lowbit.kernels.hadamard.matrices import matrix
from vllm_lowbit.kernels.kv4_attention import cpu, generic, reference

compiled = pytest.param(
    cpu.kv4_attention,
    marks=pytest.mark.skipif(library.missing() is not None, reason="not compiled"),
)
every = pytest.mark.parametrize(
    "attention",
    [reference.kv4_attention, generic.kv4_attention, compiled],
    ids=["reference", "generic", "cpu"],
)
# What moves no bit of these is not promised of the reference's BLAS.
backends = pytest.mark.parametrize(
    "attention", [generic.kv4_attention, compiled], ids=["generic", "cpu"]
)
Attention = Callable[..., torch.Tensor]
Batches = Callable[..., Any]
SINKS = torch.tensor([1.5, -1.0, 4.0, 0.0, 2.5, -30.0])


def by_definition(
    batch: Any, window: int | None, cap: float | None, sinks: torch.Tensor
) -> torch.Tensor:
    """``sum e^s v / (e^sink + sum e^s)`` row by row, in float64."""
    head_dim, kv_heads = batch.query.shape[2], batch.cache.shape[1]
    rotation = matrix(head_dim).double() / head_dim**0.5
    out = torch.empty(batch.query.shape, dtype=torch.float64)
    for i, (count, length) in enumerate(
        zip(batch.query_lens, batch.seq_lens, strict=True)
    ):
        k, v = reference.read_sequence(batch.cache, batch.block_table[i], length)
        for row in range(count):
            position = length - count + row
            first = 0 if window is None else max(0, position - window + 1)
            for head, sink in enumerate(sinks.double()):
                q = batch.query[batch.rows(i)][row, head].double() @ rotation.t()
                at = head * kv_heads // len(sinks), slice(first, position + 1)
                scores = k[at] @ q * head_dim**-0.5
                if cap is not None:
                    scores = cap * torch.tanh(scores / cap)
                shares = scores.exp()
                attended = shares @ v[at] / (sink.exp() + shares.sum())
                out[batch.rows(i)][row, head] = attended
    return out


@every
@pytest.mark.parametrize(
    ("window", "cap"), [(None, None), (9, None), (None, 2.0), (300, 10.0)]
)
@pytest.mark.parametrize("kv_heads", [6, 3, 1])
def test_by_definition(
    kv_heads: int,
    window: int | None,
    cap: float | None,
    attention: Attention,
    kv_batch: Batches,
) -> None:
    """Ragged rows, and contexts of several splits; no cap on the sink."""
    batch = kv_batch([23, 1, 600], [5, 1, 3], num_heads=6, num_kv_heads=kv_heads)
    actual = batch.attend(attention, window=window, cap=cap, sinks=SINKS)
    expected = by_definition(batch, window, cap, SINKS)
    atol = 2e-6 if attention is reference.kv4_attention else 4e-4
    torch.testing.assert_close(actual.double(), expected, rtol=0, atol=atol)
    # A head keeps what it sees in proportion.
    ratio = actual[0, 2] / batch.attend(attention, window=window, cap=cap)[0, 2]
    assert (ratio - ratio[0]).abs().max() < 1e-3 and 0.05 < ratio[0] < 0.95


@every
def test_no_sink(attention: Attention, kv_batch: Batches) -> None:
    """-inf is none to the bit, and so is what vanishes beside the scores."""
    batch = kv_batch([300, 7], [4, 7])
    for sinks in ([-torch.inf] * 4, [-torch.inf, -500.0, -3e38, -500.0]):
        actual = batch.attend(attention, sinks=torch.tensor(sinks))
        assert torch.equal(actual, batch.attend(attention))


@every
def test_large_sinks(attention: Attention, kv_batch: Batches) -> None:
    """They take everything; NaN and +inf make their head NaN and no other."""
    batch = kv_batch([300, 7], [4, 7])
    sinks = torch.tensor([1e30, torch.nan, torch.inf, 0.0])
    out = batch.attend(attention, sinks=sinks)
    assert not out[:, 0].any()
    assert out[:, 1:3].isnan().all()
    alone = batch.attend(attention, sinks=torch.tensor([0.0, 0.0, 0.0, 0.0]))
    assert torch.equal(out[:, 3], alone[:, 3])


@every
def test_rows_that_see_nothing(attention: Attention, kv_batch: Batches) -> None:
    """More query rows than the sequence has tokens: zero with a sink, else NaN."""
    batch = replace(kv_batch([5]), seq_lens=(2,))
    out = batch.attend(attention, sinks=torch.tensor([0.0, -90.0, -torch.inf, 3.0]))
    assert not out[:3, [0, 1, 3]].any() and out[:3, 2].isnan().all()
    assert out[3:].isfinite().all() and out[3:].any(dim=-1).all()
    assert batch.attend(attention)[:3].isnan().all()


@backends
@pytest.mark.parametrize("window", [None, 100])
def test_rows_do_not_depend_on_the_batch(
    window: int | None, dtype: torch.dtype, attention: Attention, kv_batch: Batches
) -> None:
    batch = kv_batch([600, 40], [70, 1], num_heads=6, dtype=dtype)
    whole = batch.attend(attention, window=window, sinks=SINKS)
    for start, stop in ((0, 1), (0, 17), (13, 70), (69, 70)):
        rows = batch.pick(0, start, stop).attend(attention, window=window, sinks=SINKS)
        assert torch.equal(rows, whole[start:stop])
    swapped = batch.reordered([1, 0]).attend(attention, window=window, sinks=SINKS)
    assert torch.equal(swapped, torch.cat((whole[70:], whole[:70])))


@every
@pytest.mark.parametrize(
    ("sinks", "message"),
    [
        (torch.zeros(3), r"sinks must be torch.float32 \[4\], got .*float32 \[3\]"),
        (torch.zeros(4, 1), r"sinks must be torch.float32 \[4\], got .* \[4, 1\]"),
        (torch.zeros(4).half(), r"sinks must be .*, got torch.float16 \[4\]"),
        (torch.zeros(8)[::2], "sinks must be contiguous"),
    ],
)
def test_sinks_that_are_refused(
    sinks: torch.Tensor, message: str, attention: Attention, kv_batch: Batches
) -> None:
    with pytest.raises(ValueError, match=message):
        kv_batch([9]).attend(attention, sinks=sinks)
