# SPDX-License-Identifier: Apache-2.0
"""The linears of experts: against the reference, and against torch's grouped GEMM."""

from collections.abc import Iterator
from functools import partial
from itertools import product

import torch

from vllm_lowbit.kernels.gpu.target import INTERPRETED
from vllm_lowbit.kernels.gpu.weights import pack
from vllm_lowbit.kernels.hadamard_quantize.triton import hadamard_quantize
from vllm_lowbit.kernels.linear_experts.routing import Routing, by_expert
from vllm_lowbit.kernels.linear_experts.triton import (
    linear_experts_w4a4,
    linear_experts_wna16,
)
from vllm_lowbit.kernels.linear_w4a4 import reference as integer_reference
from vllm_lowbit.kernels.linear_wna16 import reference as float_reference

from .case import Arm, Calls, Check, Count, Row, same_twice
from .shapes import EXPERTS, TOKENS, Layer


def checks(device: torch.device) -> Iterator[Check]:
    """Few tokens of each expert and many, some experts without any."""
    tokens, experts, n, k = (1, 40, 700), 16, 500, 1024
    if INTERPRETED:
        tokens, experts, n, k = (5,), 4, 20, 256
    for m, group in product(tokens, (0, 128)):
        for compare in (_compare_integer, _compare_float):
            name = compare.__name__.removeprefix("_compare_")
            yield Check(
                "linear_experts",
                f"{name}, M {m} group {group}",
                partial(compare, device, m, (experts, n, k), group),
            )


def _sent(device: torch.device, tokens: int, experts: int, per_token: int) -> Routing:
    """To all experts but the first."""
    chances = torch.rand(tokens, experts - 1, device=device)
    return by_expert(chances.topk(per_token)[1] + 1, experts)


def _weights(
    device: torch.device, sizes: tuple[int, int, int], group: int
) -> tuple[torch.Tensor, torch.Tensor]:
    experts, n, k = sizes
    groups = k // group if group else 1
    codes = torch.randint(-7, 8, sizes, dtype=torch.int8, device=device)
    return codes, torch.rand(experts, n, groups, device=device) + 0.01


def _stacked(codes: torch.Tensor, scale: torch.Tensor, widen: bool) -> list:
    parts = [
        pack(c, s, None, 4, widen=widen) for c, s in zip(codes, scale, strict=True)
    ]
    return [None if p[0] is None else torch.stack(p) for p in zip(*parts, strict=True)]


def _compare_integer(
    device: torch.device, m: int, sizes: tuple[int, int, int], group: int
) -> str | None:
    torch.manual_seed(m)
    experts, _, k = sizes
    sent, (weight, scale) = _sent(device, m, experts, 2), _weights(device, sizes, group)
    codes = torch.randint(-8, 8, (m, k), dtype=torch.int8, device=device)
    token = torch.rand(m, 1, device=device) + 0.01
    zero = torch.randint(-8, 8, (m, 1), dtype=torch.int32, device=device)
    arguments = (codes, token, zero, sent.rows, sent.offsets)
    stacked = _stacked(weight, scale, True)
    actual = same_twice(
        lambda: linear_experts_w4a4(*arguments, *stacked, 4, torch.float32)
    )
    for expert, of_expert in enumerate(_pairs(sent)):
        rows = sent.rows[of_expert]
        expected = integer_reference.linear_w4a4(
            *(codes[rows], token[rows], zero[rows], weight[expert], scale[expert]),
            *(None, None, torch.float32),
        )
        differ = int((actual[of_expert] != expected).sum())
        if differ:
            return f"{differ} outputs of expert {expert} differ"
    return None


def _compare_float(
    device: torch.device, m: int, sizes: tuple[int, int, int], group: int
) -> str | None:
    torch.manual_seed(m)
    experts, _, k = sizes
    sent, (weight, scale) = _sent(device, m, experts, 2), _weights(device, sizes, group)
    x = torch.randn(m, k, device=device).half()
    stacked = _stacked(weight, scale, False)[:3]
    actual = same_twice(
        lambda: linear_experts_wna16(
            x, sent.rows, sent.offsets, *stacked, 4, torch.float32
        )
    )
    for expert, of_expert in enumerate(_pairs(sent)):
        expected = float_reference.linear_wna16(
            *(x[sent.rows[of_expert]], weight[expert], scale[expert]),
            *(None, None, torch.float64),
        )
        if not expected.numel():
            continue
        apart = (actual[of_expert] - expected).abs().max()
        error = float(apart / expected.abs().max())
        if not error <= 1e-5:
            return f"expert {expert} is off by {error:.1e} of the largest"
    return None


def _pairs(sent: Routing) -> list[slice]:
    ends = sent.offsets.tolist()
    return [slice(*each) for each in zip(ends, ends[1:], strict=False)]


def rows(device: torch.device) -> Iterator[Row]:
    """Both linears of a layer's experts, few tokens first."""
    for tokens in TOKENS:
        for model, (experts, per_token, layers) in EXPERTS.items():
            for layer, shape in layers.items():
                arms = _Arms(device, tokens, (experts, shape), per_token)
                n, k, pairs = shape.n, shape.k, tokens * per_token
                weights, activations = min(experts, pairs) * n * k, pairs * (k + 2 * n)
                moved = weights // 2 + activations
                plain = 2 * (weights + pairs * (k + n))
                yield Row(
                    "linear_experts",
                    f"{model} {layer}",
                    {"m": tokens, "n": n, "k": k},
                    {
                        "triton": Arm(arms.integer, moved, integer=True),
                        "triton with hadamard_quantize": Arm(
                            arms.integer_whole, moved, integer=True
                        ),
                        "triton weight-only": Arm(arms.weight_only, moved),
                        "bf16": Arm(arms.bf16, plain, baseline=True),
                    },
                    2 * pairs * n * k,
                    ("hadamard_quantize",),
                )


class _Arms:
    """Ways to multiply tokens by their experts' weights, on copies of the weights."""

    def __init__(
        self,
        device: torch.device,
        tokens: int,
        of: tuple[int, Layer],
        per_token: int,
    ) -> None:
        experts, self.shape = of
        self.device, self.tokens, self.per_token = device, tokens, per_token
        self.sizes = (experts, self.shape.n, self.shape.k)

    def _routing(self) -> Routing:
        chances = torch.rand(self.tokens, self.sizes[0], device=self.device)
        return by_expert(chances.topk(self.per_token)[1], self.sizes[0])

    def _x(self) -> torch.Tensor:
        k = self.sizes[2]
        return torch.randn(self.tokens, k, device=self.device).bfloat16()

    def _packed(self, count: Count, widen: bool):  # type: ignore[no-untyped-def]
        experts, n, k = self.sizes
        weight, *rest = _stacked(*_weights(self.device, self.sizes, 0), widen)
        copies = count(experts * n * k // 2)
        return [weight] + [weight.clone() for _ in range(copies - 1)], rest

    def integer(self, count: Count) -> Calls:
        k, sent = self.sizes[2], self._routing()
        weights, rest = self._packed(count, True)
        codes = torch.randint(
            -7, 8, (self.tokens, k), dtype=torch.int8, device=self.device
        )
        scale = torch.ones(self.tokens, 1, device=self.device)
        zero = torch.zeros_like(scale, dtype=torch.int32)
        first = (codes, scale, zero, sent.rows, sent.offsets)
        return [
            partial(linear_experts_w4a4, *first, w, *rest, 4, torch.bfloat16)
            for w in weights
        ]

    def integer_whole(self, count: Count) -> Calls:
        """Tokens are quantized as they are served."""
        sent, x, shape = self._routing(), self._x(), self.shape
        weights, rest = self._packed(count, True)
        scale = torch.ones(shape.k, device=self.device)
        quantize = partial(hadamard_quantize, x, scale, shape.order, 1, 4, False)

        def call(weight: torch.Tensor) -> torch.Tensor:
            first = (*quantize(), sent.rows, sent.offsets)
            return linear_experts_w4a4(*first, weight, *rest, 4, torch.bfloat16)

        return [partial(call, weight) for weight in weights]

    def weight_only(self, count: Count) -> Calls:
        sent, x = self._routing(), self._x()
        weights, (scale, zero, _) = self._packed(count, False)
        rest = (scale, zero, 4, torch.bfloat16)
        return [
            partial(linear_experts_wna16, x, sent.rows, sent.offsets, w, *rest)
            for w in weights
        ]

    def bf16(self, count: Count) -> Calls:
        """torch's grouped GEMM, the tokens gathered beforehand."""
        experts, n, k = self.sizes
        sent = self._routing()
        x, ends = self._x()[sent.rows], sent.offsets[1:]
        return [
            partial(
                torch._grouped_mm,
                x,
                torch.randn(experts, n, k, device=self.device).bfloat16().mT,
                offs=ends,
            )
            for _ in range(count(2 * experts * n * k))
        ]
