# SPDX-License-Identifier: Apache-2.0
"""Nothing waits for the device, and launches depend on shapes alone.

A CUDA graph holds such calls, and replays them with other lengths, slots and routes.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from vllm_lowbit.kernels.gpu.configs import LinearConfig
from vllm_lowbit.kernels.gpu.weights import pack
from vllm_lowbit.kernels.hadamard_quantize import triton as quantize
from vllm_lowbit.kernels.kv4_attention import triton as attention
from vllm_lowbit.kernels.kv4_store.triton import kv4_store
from vllm_lowbit.kernels.linear_experts import triton as experts
from vllm_lowbit.kernels.linear_experts.routing import by_expert, combine
from vllm_lowbit.kernels.linear_w4a4.triton import linear_w4a4
from vllm_lowbit.kernels.linear_wna16.triton import linear_wna16
from vllm_lowbit.kernels.rope_kv4_store.triton import rope_kv4_store

Call = Callable[[], Any]
OnDevice = Callable[[torch.Tensor], torch.Tensor]


@pytest.mark.parametrize(
    "read",
    [
        lambda x: x[0].item(),
        lambda x: x.tolist(),
        lambda x: x.cpu(),
        lambda x: range(x[1]),
        lambda x: bool(x.max() > 1),
        lambda x: max(x[0], x[1]),
        lambda x: (x + 1)[1:].sum().item(),
        lambda x: x[x > 1],
        lambda x: torch.arange(3)[x > 1],
        lambda x: x.nonzero(),
        lambda x: x.unique(),
        lambda x: torch.equal(x, x),
        lambda x: torch.arange(3).repeat_interleave(x),
    ],
)
def test_the_watch_sees(
    read: Callable[[torch.Tensor], Any], on_device: OnDevice
) -> None:
    values = torch.tensor([1, 2, 1])
    read(values)
    with pytest.raises(AssertionError, match="waits for the device"):
        read(on_device(values))


def linear(variant: int, on_device: OnDevice) -> list[Call]:
    """Both linears, whole and split along K, and both of experts."""
    k, n, tokens = 256, 24, 6
    weight = torch.randint(-7, 8, (n, k), dtype=torch.int8)
    scale, zero = torch.rand(n, 2), torch.randint(-7, 8, (n, 2))
    wide = [on_device(t) for t in pack(weight, scale, zero, 4, widen=True)]
    narrow = [on_device(t) for t in pack(weight, scale, zero, 4, widen=False)[:3]]
    stacked = [[on_device(torch.stack([t] * 4)) for t in p] for p in (wide, narrow)]
    codes = on_device(torch.randint(-8, 8, (tokens, k), dtype=torch.int8))
    token = on_device(torch.rand(tokens, 1)), on_device(torch.ones(tokens, 1).int())
    x = on_device(torch.randn(tokens, k).half())
    spread = torch.rand(tokens, 4).topk(2)[1]
    chosen = on_device(torch.tensor([[0, 1]] * tokens) if variant else spread)
    split = LinearConfig(16, 32, 4, 2, True, split_k=2)

    def sent(linear: Callable[..., torch.Tensor]) -> torch.Tensor:
        routing = by_expert(chosen, 4)
        pairs = linear(routing.rows, routing.offsets)
        return combine(pairs, routing, on_device(torch.rand(tokens, 2)))

    dtype = torch.float16
    return [
        *(
            lambda c=c: linear_w4a4(codes, *token, *wide, None, 4, dtype, c)
            for c in (None, split)
        ),
        *(
            lambda c=c: linear_wna16(x, *narrow, None, 4, dtype, c)
            for c in (None, split)
        ),
        lambda: sent(
            lambda *s: experts.linear_experts_w4a4(
                codes, *token, *s, *stacked[0], 4, dtype
            )
        ),
        lambda: sent(
            lambda *s: experts.linear_experts_wna16(x, *s, *stacked[1], 4, dtype)
        ),
    ]


def transforms(variant: int, on_device: OnDevice) -> list[Call]:
    """None, one of a tile, one of rows beyond a tile; prologues; values alone."""
    calls: list[Call] = []
    for n, order in ((5000, 1), (384, 128), (20480, 20480)):
        x = on_device(torch.randn(3, n) * 10**variant)
        scale, grid = on_device(torch.rand(n)), (order, 1, 4, False)
        both = on_device(torch.randn(3, 2 * n))
        calls += [
            lambda x=x, s=scale, g=grid: quantize.hadamard_quantize(x, s, *g),
            lambda x=x, s=scale, g=grid: quantize.rms_norm_hadamard_quantize(
                x, s, 1e-5, None, *g
            ),
            lambda x=both, g=grid: quantize.swiglu_hadamard_quantize(x, None, *g),
            lambda x=x, s=scale, g=grid: quantize.transform(x, s, *g[:2], True),
        ]
    return calls


def stores(variant: int, on_device: OnDevice) -> list[Call]:
    query, key = torch.randn(5, 4, 64), torch.randn(5, 2, 64)
    cache = on_device(torch.zeros(3, 2, 16, 72, dtype=torch.uint8))
    slots = torch.tensor([-1, 47, 3, 99, 0]) if variant else torch.arange(5)
    slots, rows = on_device(slots), [on_device(t) for t in (query, key, key.clone())]
    angles = on_device(slots + 3), on_device(torch.rand(8, 64))
    return [
        lambda: kv4_store(*rows[1:], cache, slots, True),
        lambda: rope_kv4_store(*rows, *angles, cache, slots, True),
    ]


def attentions(variant: int, on_device: OnDevice) -> list[Call]:
    """Decodes, whose contexts are cut or not, and chunks of uneven length."""
    tokens = 9
    starts = torch.tensor([0, 2, 9] if variant else [0, 8, 9])
    lengths = torch.tensor([2, 700] if variant else [600, 1])
    table = torch.zeros(tokens, 50, dtype=torch.int32)
    cache = on_device(torch.zeros(2, 2, 16, 72, dtype=torch.uint8))
    decodes = torch.arange(tokens + 1), lengths.repeat(5)[:tokens], table
    calls: list[Call] = []
    for metadata in (decodes, (starts, lengths, table[:2])):
        starts, lengths, pages = map(on_device, metadata)
        query = on_device(torch.randn(tokens, 4, 64))
        rest = 0.1, 40, 5.0, on_device(torch.zeros(4)), True
        calls.append(
            lambda q=query, p=pages, s=starts, n=lengths, r=rest: (
                attention.kv4_attention(q, cache, p, s, n, *r)
            )
        )
    return calls


@pytest.mark.parametrize("cut", [0, 100])
@pytest.mark.parametrize("calls", [linear, transforms, stores, attentions])
def test_launches_depend_on_shapes_alone(
    calls: Callable[[int, OnDevice], list[Call]],
    cut: int,
    on_device: OnDevice,
    launches: list[Any],
    many_processors: Callable[[str], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Grids and arguments that are no tensors, for other values."""
    for operator in ("linear_w4a4", "linear_wna16"):
        many_processors(operator)
    monkeypatch.setattr(attention, "split_rows", lambda kv_heads, device: cut)
    variants = (calls(variant, on_device) for variant in (0, 1))
    for first, second in zip(*variants, strict=True):
        first()
        one = list(launches)
        launches.clear()
        second()
        assert one and launches == one
        launches.clear()
