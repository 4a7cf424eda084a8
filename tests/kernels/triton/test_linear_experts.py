# SPDX-License-Identifier: Apache-2.0
"""Linears of experts: tiles of each, and results of the reference."""

from dataclasses import replace
from typing import Any

import pytest
import torch

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


def _of_pair(routing: Routing, pair: int) -> tuple[int, int]:
    expert = int((routing.offsets[1:] <= pair).sum())
    return expert, int(routing.rows[pair])


@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("group_size", [0, 32, 128])
@pytest.mark.parametrize("tokens", [1, 40])
def test_integer_sums_are_those_of_each_expert(
    tile: str, bits: int, group_size: int, tokens: int
) -> None:
    k = 384 if group_size else 200
    routing = _routing(tokens)
    config = replace(TILES[tile], e4m3=bits == 4 and tokens > 1)
    for asymmetric in (False, True):
        codes = torch.randint(-8, 8, (tokens, k), dtype=torch.int8)
        scale = torch.rand(tokens, 1) + 0.01
        zero = torch.randint(-8, 8, (tokens, 1), dtype=torch.int32)
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
        for pair in range(2 * tokens):
            expert, token = _of_pair(routing, pair)
            row = slice(token, token + 1)
            own = [None if w is None else w[expert] for w in weights]
            expected = linear_w4a4(
                codes[row], scale[row], zero[row], *own, None, torch.float32
            )
            assert torch.equal(actual[pair], expected[0])


@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("group_size", [0, 128])
def test_weight_only(tile: str, bits: int, group_size: int) -> None:
    k, routing = 256, _routing(20)
    x = torch.randn(20, k).half()
    weights = _weights(bits, k, group_size, zeros=True)
    actual = linear_experts_wna16(
        x,
        routing.rows,
        routing.offsets,
        *_packed(weights, bits, False)[:3],
        bits,
        torch.float32,
        TILES[tile],
    )
    for pair in range(40):
        expert, token = _of_pair(routing, pair)
        own = [None if w is None else w[expert] for w in weights]
        expected = linear_wna16(x[token : token + 1], *own, None, torch.float32)[0]
        assert (actual[pair] - expected).abs().max() <= 1e-5 * expected.abs().max()


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
        ({"scale": torch.ones(3)}, r"scale must be torch.float32 \[3, 1\]"),
        ({"activation_bits": 9}, "activation_bits must be 2 to 8, got 9"),
        ({"out_dtype": torch.int32}, "out_dtype must be bfloat16, float16 or float32"),
    ],
)
def test_bad_input(change: dict[str, Any], message: str) -> None:
    arguments = {
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
        **change,
    }
    with pytest.raises(ValueError, match=message):
        linear_experts_w4a4(**arguments)
