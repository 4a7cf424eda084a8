# SPDX-License-Identifier: Apache-2.0
"""Linears of experts: tiles of each, and results of the reference."""

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_lowbit.expert_kernels import GenericExperts, TritonExperts
from vllm_lowbit.kernels.gpu.configs import LinearConfig
from vllm_lowbit.kernels.gpu.tiles import tiles_of
from vllm_lowbit.kernels.gpu.weights import pack
from vllm_lowbit.kernels.grid import IntGrid
from vllm_lowbit.kernels.linear_experts.routing import Routing, by_expert
from vllm_lowbit.kernels.linear_experts.triton import (
    linear_experts_w4a4,
    linear_experts_wna16,
)
from vllm_lowbit.kernels.linear_w4a4.reference import linear_w4a4
from vllm_lowbit.kernels.linear_wna16.reference import linear_wna16
from vllm_lowbit.linear_kernels import LinearSpec

TILES = {
    "swapped": LinearConfig(16, 32, 4, 2, True),
    "natural": LinearConfig(32, 16, 4, 2, False),
}
EXPERTS, N = 5, 37


def test_tiles() -> None:
    offsets = torch.tensor([0, 0, 17, 18, 18, 50], dtype=torch.int32)
    assert tiles_of(offsets, 50, 16).tolist() == [
        [1, 0, 17],
        [1, 16, 17],
        [2, 17, 18],
        [4, 18, 50],
        [4, 34, 50],
        *[[-1, first, 50] for first in (50, 66, 82, 98)],
    ]


def _routing(tokens: int) -> Routing:
    """Two of five experts each, none of them expert 3, all of them expert 1."""
    topk_ids = torch.tensor([0, 2, 4])[torch.randint(3, (tokens,))]
    return by_expert(torch.stack((torch.ones_like(topk_ids), topk_ids), 1), EXPERTS)


def _weights(bits: int, k: int, group_size: int, zeros: bool) -> tuple[Any, ...]:
    half, groups = 1 << bits - 1, k // group_size if group_size else 1
    codes = torch.randint(-half, half, (EXPERTS, N, k), dtype=torch.int8)
    scale = torch.rand(EXPERTS, N, groups) + 0.01
    zero = torch.randint(-half, half, (EXPERTS, N, groups), dtype=torch.int32)
    return codes, scale, zero if zeros else None


def _packed(weights: tuple[Any, ...], bits: int, widen: bool) -> list[Any]:
    codes, scale, zero = weights
    parts = [
        pack(codes[e], scale[e], None if zero is None else zero[e], bits, widen=widen)
        for e in range(EXPERTS)
    ]
    return [None if p[0] is None else torch.stack(p) for p in zip(*parts, strict=True)]


def _by_expert(
    routing: Routing,
    weights: tuple[Any, ...],
    linear: Callable[..., torch.Tensor],
    *inputs: torch.Tensor,
) -> torch.Tensor:
    """``[pairs, n]`` of a reference: each expert on the rows that were sent to it."""
    offsets, parts = routing.offsets.tolist(), []
    for expert, (first, end) in enumerate(pairwise(offsets)):
        rows = routing.rows[first:end]
        own = [None if w is None else w[expert] for w in weights]
        given = [t[rows] for t in inputs]
        parts.append(linear(*given, *own, None, torch.float32))
    return torch.cat(parts)


def check_integers(
    routing: Routing,
    tokens: int,
    k: int,
    group_size: int,
    bits: int,
    asymmetric: bool,
    config: LinearConfig,
    of_groups: bool = False,
) -> None:
    of_token = tokens, k // group_size if of_groups else 1
    codes = torch.randint(-8, 8, (tokens, k), dtype=torch.int8)
    scale = torch.rand(of_token) + 0.01
    zero = torch.randint(-8, 8, of_token, dtype=torch.int32)
    weights = _weights(bits, k, group_size, asymmetric)
    actual = linear_experts_w4a4(
        codes,
        scale,
        zero if asymmetric else None,
        routing.rows,
        routing.offsets,
        *_packed(weights, bits, True),
        4,
        torch.float32,
        config,
    )
    zero = zero if asymmetric else torch.zeros_like(zero)
    expected = _by_expert(routing, weights, linear_w4a4, codes, scale, zero)
    assert torch.equal(actual, expected)


def check_floats(
    routing: Routing,
    tokens: int,
    k: int,
    group_size: int,
    bits: int,
    zeros: bool,
    config: LinearConfig,
) -> None:
    x, weights = torch.randn(tokens, k).half(), _weights(bits, k, group_size, zeros)
    actual = linear_experts_wna16(
        x,
        routing.rows,
        routing.offsets,
        *_packed(weights, bits, False)[:3],
        bits,
        torch.float32,
        config,
    )
    expected = _by_expert(routing, weights, linear_wna16, x)
    largest = expected.abs().amax(-1, keepdim=True)
    assert bool(((actual - expected).abs() <= 1e-5 * largest).all())


@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("group_size", [0, 32, 128])
def test_integer_sums_are_those_of_each_expert(
    tile: str, bits: int, group_size: int
) -> None:
    for tokens, asymmetric in ((1, tile == "swapped"), (20, tile == "natural")):
        config = replace(TILES[tile], e4m3=bits == 4 and tokens > 1)
        rest = 256 if group_size else 200, group_size, bits, asymmetric, config
        for of_groups in {False, group_size != 0}:
            check_integers(_routing(tokens), tokens, *rest, of_groups)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("group_size", [0, 128])
def test_weight_only(bits: int, group_size: int) -> None:
    tile = TILES["swapped" if bits == 4 else "natural"]
    check_floats(_routing(12), 12, 256, group_size, bits, True, tile)


@settings(max_examples=12)
@given(data=st.data())
def test_any_shape(data: st.DataObject) -> None:
    check_any_shape(data)


@pytest.mark.slow
@settings(max_examples=200)
@given(data=st.data())
def test_many_shapes(data: st.DataObject) -> None:
    check_any_shape(data)


def check_any_shape(data: st.DataObject) -> None:
    """Any choice of experts, also none of a token's, or the same for all."""
    each, tokens = data.draw(st.integers(1, EXPERTS)), data.draw(st.integers(1, 12))
    choice = st.permutations(range(EXPERTS)).map(lambda order: order[:each])
    chosen = data.draw(st.lists(choice, min_size=tokens, max_size=tokens))
    routing = by_expert(torch.tensor(chosen), EXPERTS)
    group_size = data.draw(st.sampled_from((0, 32, 64, 128)))
    k = data.draw(st.integers(1, 2)) * (group_size or 72)
    bits = data.draw(st.sampled_from((2, 3, 4, 6, 8)))
    tile = TILES[data.draw(st.sampled_from(tuple(TILES)))]
    flag, e4m3 = data.draw(st.booleans()), bits <= 4 and data.draw(st.booleans())
    if data.draw(st.booleans()):
        config = replace(tile, e4m3=e4m3)
        of_groups = group_size != 0 and data.draw(st.booleans())
        check_integers(routing, tokens, k, group_size, bits, flag, config, of_groups)
    else:
        check_floats(routing, tokens, k, group_size, bits, flag, tile)


def test_no_tokens() -> None:
    routing = by_expert(torch.empty(0, 2, dtype=torch.int64), EXPERTS)
    out = linear_experts_wna16(
        torch.empty(0, 128).half(),
        routing.rows,
        routing.offsets,
        *_packed(_weights(4, 128, 0, False), 4, False)[:3],
        4,
        torch.float16,
    )
    assert out.shape == (0, N)


@pytest.mark.parametrize("activation_bits", [None, 4])
@pytest.mark.parametrize("scaled", ["no", "shared", "own"])
def test_as_the_generic_backend(activation_bits: int | None, scaled: str) -> None:
    k, routing = 128, _routing(9)
    grid, activations = IntGrid(4), None
    if activation_bits is not None:
        activations = IntGrid(activation_bits, symmetric=False, clip_ratio=0.9)
    codes, scale, _ = _weights(4, k, 0, False)
    weights = codes.clamp(min=-7), scale, None
    spec = LinearSpec(N, k, grid, activations, order=64)
    scales = {
        "no": None,
        "shared": torch.rand(k) + 0.5,
        "own": torch.rand(EXPERTS, k) + 0.5,
    }
    x, outputs = torch.randn(9, k).half(), []
    for kind in (GenericExperts, TritonExperts):
        layer = torch.nn.Module()
        kernel = kind(spec, "w13")
        kernel.keep(layer, *weights)
        outputs.append(
            kernel.multiply(layer, x, routing.rows, routing, scales[scaled]).float()
        )
    generic, actual = outputs
    # Results are rounded to float16, and so is what a weight-only linear reads.
    assert (actual - generic).abs().max() <= 4e-3 * generic.abs().max()


ARGUMENTS: dict[str, Any] = {
    "codes": torch.zeros(3, 128, dtype=torch.int8),
    "scale": torch.ones(3, 1),
    "zero_point": None,
    "rows": torch.zeros(4, dtype=torch.int64),
    "offsets": torch.tensor([0, 4, 4, 4, 4, 4], dtype=torch.int32),
    "weight": torch.zeros(5, 8, 64, dtype=torch.uint8),
    "weight_scale": torch.ones(5, 1, 8),
    "weight_zero": None,
    "weight_sum": torch.zeros(5, 1, 8, dtype=torch.int32),
    "activation_bits": 4,
    "out_dtype": torch.float32,
}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rows": torch.zeros(4, dtype=torch.int32)}, r"rows must be torch.int64 \[an"),
        ({"offsets": torch.zeros(3, dtype=torch.int32)}, r"offsets must be .* \[6\]"),
        (
            {"weight": torch.zeros(5, 8, 63, dtype=torch.uint8)},
            r"weight must be .*64\]",
        ),
        ({"weight": torch.zeros(8, 64, dtype=torch.uint8)}, r"weight must be .*any, a"),
        (
            {"weight_scale": torch.ones(5, 1, 9)},
            r"weight_scale must be .*\[5, any, 8\]",
        ),
        ({"weight_sum": torch.ones(5, 1, 8)}, r"weight_sum must be torch.int32 \[5, 1"),
        ({"scale": torch.ones(3)}, r"scale must be torch.float32 \[3, any\]"),
        ({"activation_bits": 9}, "activation_bits must be 2 to 8, got 9"),
        ({"out_dtype": torch.int32}, "out_dtype must be bfloat16, float16 or float32"),
        *(
            ({name: value.to("meta")}, f"^{name} must be on cpu, got meta")
            for name, value in ARGUMENTS.items()
            if isinstance(value, torch.Tensor) and name != "codes"
        ),
        (
            {"weight_zero": torch.zeros(5, 1, 8, dtype=torch.int32, device="meta")},
            "weight_zero must be on cpu, got meta",
        ),
    ],
)
def test_bad_input(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        linear_experts_w4a4(**{**ARGUMENTS, **change})
