# SPDX-License-Identifier: Apache-2.0
"""Linears of experts: each pair as its expert's own linear, bit for bit."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_lowbit.kernels.cpu import library
from vllm_lowbit.kernels.grid import IntGrid
from vllm_lowbit.kernels.linear_experts import cpu, generic
from vllm_lowbit.kernels.linear_experts.reference import linear_experts
from vllm_lowbit.kernels.linear_experts.routing import by_expert, combine
from vllm_lowbit.kernels.linear_w4a4.cpu import pack
from vllm_lowbit.kernels.linear_w4a4.generic import prepare

pytestmark = pytest.mark.usefixtures("garbage_in_empty")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
compiled = pytest.mark.skipif(
    library.missing() is not None, reason=str(library.missing())
)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_order_of_experts(dtype: torch.dtype) -> None:
    topk_ids = torch.tensor([[2, 0], [4, 2], [0, 2]], dtype=dtype)
    routing = by_expert(topk_ids, 6)
    assert routing.order.tolist() == [1, 4, 0, 3, 5, 2]
    assert routing.rows.tolist() == [0, 2, 0, 1, 2, 1]
    assert routing.offsets.tolist() == [0, 2, 2, 5, 5, 6, 6]
    assert routing.offsets.dtype == torch.int32


def test_no_tokens() -> None:
    routing = by_expert(torch.empty(0, 2, dtype=torch.int32), 3)
    assert routing.offsets.tolist() == [0, 0, 0, 0]
    out = combine(torch.empty(0, 5), routing, torch.empty(0, 2))
    assert out.shape == (0, 5)


def test_weighted_sum_is_in_the_order_of_choice() -> None:
    generator = torch.Generator().manual_seed(0)
    topk_ids = torch.stack([torch.randperm(7, generator=generator) for _ in range(9)])
    topk_ids = topk_ids[:, :3]
    weights = torch.rand(9, 3, generator=generator)
    routing = by_expert(topk_ids, 7)
    of_pair = torch.randn(9, 3, 4, generator=generator).bfloat16()
    out = combine(of_pair.flatten(0, 1)[routing.order], routing, weights)
    one, two, three = (of_pair.float() * weights.unsqueeze(-1)).unbind(1)
    assert torch.equal(out, (one + two + three).bfloat16())


def _arguments(
    seed: int, bits: int, groups: int, symmetric: bool, sizes: tuple[int, ...]
) -> dict[str, Any]:
    experts, tokens, n, k, per_token = sizes
    generator = torch.Generator().manual_seed(seed)
    half = 1 << (bits - 1)
    low = 1 - half if symmetric else -half
    scale = torch.rand(experts, n, groups, generator=generator) + 0.1
    zero_point = None
    if not symmetric:
        zero_point = torch.randint(
            low, half, scale.shape, generator=generator, dtype=torch.int32
        )
    chances = torch.rand(tokens, experts, generator=generator)
    return {
        "x": torch.randn(tokens, k, generator=generator),
        "routing": by_expert(chances.topk(per_token)[1], experts),
        "codes": torch.randint(
            low, half, (experts, n, k), generator=generator, dtype=torch.int8
        ),
        "scale": scale,
        "zero_point": zero_point,
        "scales": torch.rand(experts, k, generator=generator) + 0.5,
    }


@compiled
@settings(max_examples=60)
@given(
    seed=st.integers(0, 99),
    bits=st.sampled_from([2, 3, 4, 6, 8]),
    activation_bits=st.sampled_from([4, 6, 8, 16]),
    symmetric=st.booleans(),
    groups=st.sampled_from([1, 2]),
    of_tokens=st.booleans(),
    scaled=st.sampled_from(["no", "shared", "own"]),
    dtype=st.sampled_from(DTYPES),
    sizes=st.tuples(
        st.integers(1, 5), st.integers(0, 6), st.integers(1, 35), st.just(64)
    ),
)
def test_backends_equal_the_reference(
    seed: int,
    bits: int,
    activation_bits: int,
    symmetric: bool,
    groups: int,
    of_tokens: bool,
    scaled: str,
    dtype: torch.dtype,
    sizes: tuple[int, ...],
) -> None:
    per_token = min(2, sizes[0])
    made = _arguments(seed, bits, groups, symmetric, (*sizes, per_token))
    x, routing, codes = made["x"].to(dtype), made["routing"], made["codes"]
    scale, zero_point = made["scale"], made["zero_point"]
    input_scale = {"no": None, "shared": made["scales"][0], "own": made["scales"]}[
        scaled
    ]
    around = x, routing.rows, routing.offsets, input_scale, 16, 1
    grid, size = None, 64 // groups if of_tokens else None
    if activation_bits != 16:
        grid = IntGrid(activation_bits, False, clip_ratio=0.9, group_size=size)
    expected = linear_experts(*around, grid, codes, scale, zero_point, dtype)
    kinds = activation_bits, False
    packed = [
        pack(codes[e], scale[e], None if zero_point is None else zero_point[e], bits)
        for e in range(len(codes))
    ]
    stacked = [
        None if parts[0] is None else torch.stack(parts)
        for parts in zip(*packed, strict=True)
    ]
    n = codes.shape[1]
    rest = dtype, 0.9, size
    packed_result = cpu.linear_experts(*around, *kinds, *stacked, n, bits, *rest)
    zeros = None if zero_point is None else zero_point.flatten(0, 1)
    weight = prepare(codes.flatten(0, 1), zeros).view(codes.shape)
    plain = generic.linear_experts(
        *around, *kinds, weight, scale, (1 << bits) - 1, *rest
    )
    assert packed_result.dtype == plain.dtype == dtype
    assert torch.equal(packed_result, plain)
    if grid is not None:
        assert torch.equal(packed_result, expected)
    else:
        # A weight-only linear rounds its input to fixed point.
        largest = expected.float().abs().amax() if expected.numel() else 0.0
        step = torch.finfo(dtype).eps + 2**-14
        apart = (packed_result.float() - expected.float()).abs()
        assert bool((apart <= 4 * step * (1 + largest)).all())


@compiled
def test_rows_do_not_depend_on_the_batch() -> None:
    made = _arguments(0, 4, 1, True, (4, 33, 20, 64, 2))
    x, routing, codes = made["x"].bfloat16(), made["routing"], made["codes"]
    packed = [pack(c, s, None, 4) for c, s in zip(codes, made["scale"], strict=True)]
    weight, scale, _, total = zip(*packed, strict=True)
    stacked = torch.stack(weight), torch.stack(scale), None, torch.stack(total)
    rest = None, 16, 1, 4, False, *stacked, 20, 4, torch.bfloat16
    whole = cpu.linear_experts(x, routing.rows, routing.offsets, *rest)
    for pair in range(66):
        expert = int((routing.offsets[1:] <= pair).sum())
        offsets = torch.zeros(5, dtype=torch.int32)
        offsets[expert + 1 :] = 1
        alone = cpu.linear_experts(x, routing.rows[pair : pair + 1], offsets, *rest)
        assert torch.equal(whole[pair], alone[0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rows": torch.zeros(4, dtype=torch.int32)}, r"rows must be torch.int64 \[4"),
        ({"rows": torch.full((4,), 3)}, r"rows must lie in \[0, 3\)"),
        ({"rows": torch.full((4,), -1)}, r"rows must lie in \[0, 3\)"),
        ({"offsets": torch.tensor([0, 4])}, r"offsets must be torch.int32 \[3\]"),
        (
            {"offsets": torch.tensor([0, 5, 4], dtype=torch.int32)},
            "offsets must ascend from 0 to the 4 pairs, got",
        ),
        (
            {"offsets": torch.tensor([0, 2, 3], dtype=torch.int32)},
            "offsets must ascend from 0 to the 4 pairs, got",
        ),
    ],
)
def test_bad_routing(change: dict[str, torch.Tensor], message: str) -> None:
    arguments = {
        "rows": torch.tensor([0, 1, 2, 0]),
        "offsets": torch.tensor([0, 2, 4], dtype=torch.int32),
        **change,
    }
    weight = torch.zeros(2, 4, 16, dtype=torch.int8)
    with pytest.raises(ValueError, match=message):
        generic.linear_experts(
            torch.randn(3, 16),
            arguments["rows"],
            arguments["offsets"],
            *(None, 1, 1, 4, False, weight, torch.rand(2, 4, 1), 7, torch.float32),
        )
