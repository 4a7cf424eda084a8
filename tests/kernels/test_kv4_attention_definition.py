# SPDX-License-Identifier: Apache-2.0
"""The arithmetic that generic.py documents, followed by hand, gives its bits."""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from vllm_lowbit.kernels.hadamard.generic import hadamard
from vllm_lowbit.kernels.kv4_attention import exponential
from vllm_lowbit.kernels.kv4_attention.generic import kv4_attention
from vllm_lowbit.kernels.kv4_store.layout import planes

F = np.float32


def exp2_by_hand(x: np.float32) -> np.float32:
    """2^x by integer and scalar float32 operations."""
    x = max(x, F(-127))
    n = int(np.rint(x))
    r = x - F(n)
    excess = F(0)
    for coefficient in exponential.COEFFICIENTS:
        excess = (excess + F(coefficient)) * r
    return (excess + F(1)) * (F(2.0) ** F(n) if n > -127 else F(0))


def tanh_by_hand(x: np.float32) -> np.float32:
    z = min(abs(x), F(10)) * F(2 / math.log(2))
    n = int(np.rint(z))
    r = z - F(n)
    excess = F(0)
    for coefficient in exponential.COEFFICIENTS:
        excess = (excess + F(coefficient)) * r
    power = F(2.0) ** F(n)
    f = excess * power + (power - F(1))
    return np.copysign(f / (f + F(2)), x)


def rounded(numerators: list[int], denominator: int = 1) -> np.float32:
    """An exact sum of integers over a power of two, as float32."""
    # Below 2^53: the quotient is exact in float64.
    return F(sum(numerators) / denominator)


def codes_by_hand(x: list[np.float32], code_max: int) -> tuple[list[int], np.float32]:
    scale = max(abs(v) for v in x) / F(code_max)
    inverse = F(1) / scale
    return [int(np.rint(v * inverse)) for v in x], scale


class Cache:
    """One head of one sequence, read from its pages token by token."""

    def __init__(self, batch: Any, index: int, head: int) -> None:
        self.cache, self.head = planes(batch.cache), head
        self.block_size = batch.cache.shape[2]
        self.blocks = batch.block_table[index].tolist()

    def token(self, t: int, side: str) -> tuple[list[int], np.float32, np.float32]:
        """Codes minus 8, scale, and zero minus 8."""
        at = (self.blocks[t // self.block_size], self.head, t % self.block_size)
        packed = getattr(self.cache, f"{side}_codes")[at].tolist()
        codes = [b & 15 for b in packed] + [b >> 4 for b in packed]
        scale, zero = (
            F(getattr(self.cache, f"{side}_{name}")[at].item())
            for name in ("scale", "zero")
        )
        return [c - 8 for c in codes], scale, zero - F(8)


def row_by_hand(
    cache: Cache,
    q: list[np.float32],
    visible: range,
    split_size: int,
    scale: float,
    cap: float | None,
    sink: float | None,
) -> np.ndarray:
    """One query row of one head, float32 ``[head_dim]``."""
    codes, q_scale = codes_by_hand(q, 32512)
    base_2 = scale / math.log(2) if cap is None else scale / cap
    factor, code_sum = q_scale * F(base_2), rounded(codes)
    state = None
    for start in range(0, visible.stop, split_size):
        tokens = [t for t in visible if start <= t < start + split_size]
        if not tokens:
            continue
        scores = []
        for t in tokens:
            k, k_scale, k_zero = cache.token(t, "k")
            c = rounded([x * u for x, u in zip(codes, k, strict=True)])
            score = ((c - k_zero * code_sum) * k_scale) * factor
            if cap is not None:
                score = tanh_by_hand(score) * F(cap / math.log(2))
            scores.append(score)
        peak = max(scores)
        p = [exp2_by_hand(s - peak) for s in scores]
        total = rounded([int(np.rint(v * F(2**22))) for v in p], 2**22)
        values = [cache.token(t, "v") for t in tokens]
        weights = [v * value[1] for v, value in zip(p, values, strict=True)]
        w, unit = codes_by_hand(weights, 65535)
        zeros = [int(value[2] * 64) for value in values]
        z = rounded([a * b for a, b in zip(w, zeros, strict=True)], 64)
        attended = []
        for d in range(len(q)):
            a = rounded([x * value[0][d] for x, value in zip(w, values, strict=True)])
            attended.append((a - z) * unit)
        if state is None:
            state = (F(-math.inf), F(0), [F(0)] * len(q))
        new_peak = max(state[0], peak)
        keep = F(0) if state[0] == -math.inf else exp2_by_hand(state[0] - new_peak)
        take = exp2_by_hand(peak - new_peak)
        state = (
            new_peak,
            state[1] * keep + total * take,
            [
                old * keep + new * take
                for old, new in zip(state[2], attended, strict=True)
            ],
        )
    assert state is not None
    peak, total, values = state
    if sink is not None:
        sink_peak = F(sink) * F(1 / math.log(2))
        new_peak = max(peak, sink_peak)
        keep, take = exp2_by_hand(peak - new_peak), exp2_by_hand(sink_peak - new_peak)
        total, values = total * keep + take, [v * keep for v in values]
    return np.array([v / total for v in values], dtype=F)


@pytest.mark.parametrize(
    ("window", "cap", "block_size", "scale", "rotate", "sinks"),
    [
        (None, None, 16, 0.125, True, None),
        (None, 7.0, 48, 0.5, False, (0.1, 5.0, 20.0, -3.0)),
        (300, None, 128, 3.0, True, (7.0, -200.0, 0.3, 90.0)),
        (5, 1.0, 16, 0.01, False, None),
    ],
)
def test_by_hand(
    window: int | None,
    cap: float | None,
    block_size: int,
    scale: float,
    rotate: bool,
    sinks: tuple[float, ...] | None,
    kv_batch: Callable[..., Any],
) -> None:
    batch = kv_batch([600, 20], [2, 1], block_size=block_size, rotate=rotate)
    out = batch.attend(
        kv4_attention,
        window=window,
        cap=cap,
        scale=scale,
        sinks=None if sinks is None else torch.tensor(sinks),
    )
    rotated = hadamard(batch.query, 64) if rotate else batch.query
    split_size = 288 if block_size == 48 else 256
    for index, row, head, position in ((0, 0, 3, 598), (0, 1, 0, 599), (1, 2, 1, 19)):
        oldest = 0 if window is None else max(0, position - window + 1)
        expected = row_by_hand(
            Cache(batch, index, head // 2),
            [F(v) for v in rotated[row, head].tolist()],
            range(oldest, position + 1),
            split_size,
            scale,
            cap,
            None if sinks is None else sinks[head],
        )
        assert np.array_equal(out[row, head].numpy(), expected)


def ulps(actual: torch.Tensor, exact: torch.Tensor) -> float:
    """Largest error in float32 units in the last place of the exact value."""
    ulp = torch.exp2(torch.floor(torch.log2(exact.abs())) - 23)
    return float(((actual - exact).abs() / ulp).max())


def test_exp2() -> None:
    x = -torch.rand(200_000) * torch.tensor([126.0, 2.0, 1e-3]).unsqueeze(1)
    assert ulps(exponential.exp2(x), torch.exp2(x.double())) < 3
    special = torch.tensor([0.0, -0.0, -1.0, -126.0, -127.0, -1e30, -math.inf])
    expected = [1.0, 1.0, 0.5, 2.0**-126, 0.0, 0.0, 0.0]
    assert exponential.exp2(special).tolist() == expected
    assert exponential.exp2(x).max() <= 1
    assert math.isnan(exponential.exp2(torch.tensor(math.nan)).item())


def test_tanh() -> None:
    x = torch.randn(200_000) * torch.tensor([1e-30, 1e-3, 0.3, 5.0]).unsqueeze(1)
    assert ulps(exponential.tanh(x), torch.tanh(x.double())) < 12
    assert torch.equal(exponential.tanh(-x), -exponential.tanh(x))
    special = torch.tensor([0.0, 9.5, -30.0, 1e30])
    assert exponential.tanh(special).tolist() == [0, 1, -1, 1]


@pytest.mark.parametrize("value", [math.nan, math.inf, 2000.0, -1.0, 0.0])
@pytest.mark.parametrize("name", ["k_scale", "k_zero", "v_scale", "v_zero"])
def test_parameters_that_make_a_row_nan(
    name: str, value: float, kv_batch: Callable[..., Any]
) -> None:
    """The rows that see the token, in the head that has it, and no others."""
    batch = kv_batch([300], [8], rotate=False)
    whole = batch.attend(kv4_attention, window=200)
    cache = batch.cache.clone()
    for token in (90, 296):
        block = batch.block_table[0, token // 16].item()
        getattr(planes(cache), name)[block, 1, token % 16] = value
    rows = replace(batch, cache=cache).attend(kv4_attention, window=200)
    if value in ((-1.0, 0.0) if name.endswith("zero") else (2000.0,)):
        assert torch.isfinite(rows).all()
        return
    # Positions 292 to 299; token 90 has left the window of the rows from 290 on.
    assert torch.isnan(rows[4:, 2:]).all()
    rows[4:, 2:] = whole[4:, 2:]
    assert torch.equal(rows, whole)


def test_queries_of_any_size(kv_batch: Callable[..., Any]) -> None:
    """Scaling query and softmax by powers of two cancels, as far as floats reach."""
    batch = kv_batch([300], [5])
    whole = batch.attend(kv4_attention)
    for power in (-80, 60, 90):
        scaled = replace(batch, query=batch.query * 2.0**power)
        assert torch.equal(
            scaled.attend(kv4_attention, scale=2.0 ** (-3 - power)), whole
        )
    # Scores might overflow: said with NaN.
    huge = replace(batch, query=batch.query * 2.0**100)
    assert torch.isnan(huge.attend(kv4_attention)).all()
    # A query of nothing attends to all tokens alike.
    tiny = replace(batch, query=batch.query * 2.0**-110)
    zero = replace(batch, query=torch.zeros_like(batch.query))
    assert torch.equal(tiny.attend(kv4_attention), zero.attend(kv4_attention))
