# SPDX-License-Identifier: Apache-2.0
"""The linears: against their references, and against the libraries of torch."""

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from itertools import product
from typing import Any

import torch

from vllm_lowbit.kernels.gpu.configs import LinearConfig, Weight, choose
from vllm_lowbit.kernels.gpu.target import E4M3_SUMS, INTERPRETED, architecture
from vllm_lowbit.kernels.gpu.weights import GpuWeight, pack, unpack
from vllm_lowbit.kernels.hadamard_quantize.triton import hadamard_quantize
from vllm_lowbit.kernels.linear_w4a4 import reference as integer_reference
from vllm_lowbit.kernels.linear_w4a4.triton import linear_w4a4
from vllm_lowbit.kernels.linear_wna16 import reference as float_reference
from vllm_lowbit.kernels.linear_wna16.triton import linear_wna16

from .case import Arm, Calls, Check, Count, Row, same_twice
from .shapes import AIMED, MODELS, TOKENS, Layer


def checks(device: torch.device) -> Iterator[Check]:
    """Every bucket of tokens, group size, width and kind of product."""
    tokens, n, k = (1, 17, 33, 65, 130, 600), 1000, 4096
    if INTERPRETED:
        tokens, n, k = (5,), 20, 256
    products = [(4, False), (8, False)]
    if architecture(device) in E4M3_SUMS:
        products.append((4, True))
    for m, group, (bits, e4m3) in product(tokens, (0, 32, 64, 128), products):
        for own in (False, True)[: 2 if group else 1]:
            name = f"M {m} group {group} {bits} bits" + " e4m3" * e4m3
            yield Check(
                "linear_w4a4",
                name + " of tokens too" * own,
                partial(_compare_integer, device, (m, n, k), group, bits, e4m3, own),
            )
    for m, group, bits in product(tokens, (0, 32, 128), (2, 3, 4, 8)):
        for dtype in (torch.bfloat16, torch.float16):
            yield Check(
                "linear_wna16",
                f"M {m} group {group} {bits} bits {dtype}",
                partial(_compare_float, device, (m, n, k), group, bits, dtype),
            )


def _with_product(
    device: torch.device, m: int, group: int, e4m3: bool, own: bool = False
) -> LinearConfig:
    """The table's configuration, but for how codes are multiplied."""
    weight = Weight(4, group, zeros=False, token_groups=own)
    tabled = choose(architecture(device), "linear_w4a4", weight, m)
    return replace(tabled, e4m3=e4m3)


def _compare_integer(
    device: torch.device,
    sizes: tuple[int, int, int],
    group: int,
    bits: int,
    e4m3: bool,
    own: bool,
) -> str | None:
    """Bit for bit; groups of split-K may be added in another order.

    Tokens have scales of their own in each group where ``own``, else one.
    """
    m, n, k = sizes
    torch.manual_seed(m)
    half, groups = 1 << bits - 1, k // group if group else 1
    weight = torch.randint(-half, half, (n, k), dtype=torch.int8, device=device)
    scale = torch.rand(n, groups, device=device) + 0.01
    codes = torch.randint(-half, half, (m, k), dtype=torch.int8, device=device)
    # The largest sums, and odd: 127 of 128 products are of the lowest code, one is 1.
    for lowest in (weight[-1], codes[-1]):
        lowest.fill_(-half)
        lowest[::128] = 1
    of_tokens = m, groups if own else 1
    token = torch.rand(of_tokens, device=device) + 0.01
    bias = torch.randn(n, device=device)
    for zeros in (False, True):
        limits = (-half, half)
        zero = torch.randint(*limits, of_tokens, dtype=torch.int32, device=device)
        weight_zero = torch.randint(*limits, (n, groups), device=device)
        if not zeros:
            zero, weight_zero = torch.zeros_like(zero), None
        expected = integer_reference.linear_w4a4(
            codes, token, zero, weight, scale, weight_zero, bias, torch.float32
        )
        packed = pack(weight, scale, weight_zero, bits, widen=True)
        arguments = (codes, token, zero if zeros else None, *packed, bias, bits)
        config = _with_product(device, m, group, e4m3, own)
        actual = same_twice(partial(linear_w4a4, *arguments, torch.float32, config))
        if group == 0 and not torch.equal(actual, expected):
            return f"{int((actual != expected).sum())} outputs differ, zeros {zeros}"
        error = float((actual - expected).abs().max() / expected.abs().max())
        if not error <= 1e-5:
            return f"off by {error:.1e} of the largest, zeros {zeros}"
    return None


def _compare_float(
    device: torch.device,
    sizes: tuple[int, int, int],
    group: int,
    bits: int,
    dtype: torch.dtype,
) -> str | None:
    m, n, k = sizes
    torch.manual_seed(m)
    half, groups = 1 << bits - 1, k // group if group else 1
    weight = torch.randint(-half, half, (n, k), dtype=torch.int8, device=device)
    scale = torch.rand(n, groups, device=device) + 0.01
    zero = torch.randint(-half, half, (n, groups), device=device)
    x = torch.randn(m, k, device=device).to(dtype)
    packed = pack(weight, scale, zero, bits, widen=False)
    weights = (packed.weight, packed.scale, packed.zero)
    arguments = (x, *weights, None, bits, torch.float32)
    actual = same_twice(partial(linear_wna16, *arguments))
    expected = float_reference.linear_wna16(x, weight, scale, zero, None, torch.float64)
    error = float((actual - expected).abs().max() / expected.abs().max())
    return None if error <= 1e-5 else f"off by {error:.1e} of the largest"


def aim_of(model: str, m: int) -> dict[str, float]:
    """Speed-ups of bf16 that the linear with its quantization should have."""
    if model not in AIMED:
        return {WHOLE: 1.0}
    return {WHOLE: 3.0 if m <= 64 else 1.5 if m >= 2048 else 1.0}


def rows(device: torch.device) -> Iterator[Row]:
    """Every layer and number of tokens; models of 8 billion parameters first."""
    for model, layers in MODELS.items():
        for (layer, shape), m in product(layers.items(), TOKENS):
            arms = Arms(device, m, shape)
            sizes, name = {"m": m, "n": shape.n, "k": shape.k}, f"{model} {layer}"
            yield Row(
                "linear_w4a4",
                name,
                sizes,
                _integer_arms(device, arms),
                2 * m * shape.n * shape.k,
                ("hadamard_quantize",),
                aim_of(model, m),
            )
            moved = arms.weights // 2 + 2 * m * (shape.n + shape.k)
            grouped = partial(arms.weight_only, group=128)
            yield Row(
                "linear_wna16",
                name,
                sizes,
                {
                    "triton": Arm(arms.weight_only, moved),
                    "triton groups of 128": Arm(grouped, moved),
                    "bf16": arms.baseline(),
                },
            )


def integer_expected(
    codes: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    *rest: Any,
) -> torch.Tensor:
    """The reference's output for the arguments of a call of ``Arms.integer``."""
    plain = _codes_of(weight, codes.shape[1], len(weight_scale))
    dtype = rest[4]
    # It has the sums of all groups, of 8 bytes each.
    few = zip(*(t.split(64) for t in (codes, scale, zero)), strict=True)
    outputs = [
        integer_reference.linear_w4a4(*rows, plain, weight_scale.t(), None, None, dtype)
        for rows in few
    ]
    return torch.cat(outputs)


def float_expected(
    x: torch.Tensor, weight: torch.Tensor, weight_scale: torch.Tensor, *rest: Any
) -> torch.Tensor:
    """As :func:`integer_expected`, of ``Arms.weight_only``."""
    plain = _codes_of(weight, x.shape[1], len(weight_scale))
    scale, dtype = weight_scale.t(), rest[3]
    return float_reference.linear_wna16(x, plain, scale, None, None, dtype)


def _codes_of(weight: torch.Tensor, k: int, groups: int) -> torch.Tensor:
    """int8 codes of a symmetric weight of 4 bits."""
    return unpack(weight, k, 4, k // groups if groups > 1 else 0)


# The arm that aims are on.
WHOLE = "triton with hadamard_quantize"


def _integer_arms(device: torch.device, arms: "Arms") -> dict[str, Arm]:
    m, n, k = arms.m, arms.n, arms.k
    half, activations = arms.weights // 2, m * (k + 2 * n)
    own = {
        "triton": (arms.integer, half),
        WHOLE: (arms.integer_whole, half + m * k),
        "triton w4a8 with hadamard_quantize": (
            partial(arms.integer_whole, bits=8),
            half + m * k,
        ),
        "triton groups of 128": (partial(arms.integer, group=128), half),
        "triton w8a8": (partial(arms.integer, bits=8), 2 * half),
    }
    if architecture(device) in E4M3_SUMS:
        own["triton e4m3"] = (arms.e4m3, half)
    found = {
        name: Arm(prepare, moved + activations, integer=True)
        for name, (prepare, moved) in own.items()
    }
    found["bf16"] = arms.baseline()
    for name, prepare in (("torch fp8", arms.fp8), ("torch int8", arms.int8)):
        moved = arms.weights + activations
        found[name] = Arm(prepare, moved, other=True, integer=name == "torch int8")
    return found


class Arms:
    """Ways to multiply ``[m, k]`` by a weight ``[n, k]``, on copies of the weight."""

    def __init__(self, device: torch.device, m: int, shape: Layer) -> None:
        self.device, self.m, self.shape = device, m, shape
        self.n, self.k, self.weights = shape.n, shape.k, shape.n * shape.k

    def baseline(self) -> Arm:
        moved = 2 * (self.weights + self.m * (self.n + self.k))
        return Arm(self.bf16, moved, baseline=True)

    def _codes(self, rows: int, half: int = 7) -> torch.Tensor:
        return torch.randint(
            -half, half + 1, (rows, self.k), dtype=torch.int8, device=self.device
        )

    def _x(self) -> torch.Tensor:
        return torch.randn(self.m, self.k, device=self.device).bfloat16()

    def _packed(
        self, count: Count, widen: bool, group: int = 0, bits: int = 4
    ) -> tuple[GpuWeight, list[torch.Tensor]]:
        groups = self.k // group if group else 1
        scale = torch.rand(self.n, groups, device=self.device) + 0.01
        first = pack(self._codes(self.n), scale, None, bits, widen=widen)
        number = count(first.weight.numel())
        weights = [first.weight] + [first.weight.clone() for _ in range(number - 1)]
        return first, weights

    def integer(
        self,
        count: Count,
        group: int = 0,
        config: LinearConfig | None = None,
        bits: int = 4,
    ) -> Calls:
        """Asymmetric activations, as they are served."""
        first, weights = self._packed(count, True, group, bits)
        codes = self._codes(self.m)
        scale = torch.rand(self.m, 1, device=self.device) + 0.01
        zero = torch.randint_like(scale, -8, 8).int()
        rest = (first.scale, None, first.sum, None, bits, torch.bfloat16, config)
        return [partial(linear_w4a4, codes, scale, zero, w, *rest) for w in weights]

    def e4m3(self, count: Count) -> Calls:
        return self.integer(count, 0, _with_product(self.device, self.m, 0, True))

    def integer_whole(self, count: Count, bits: int = 4) -> Calls:
        """With the transform and quantization of the input, as it is served."""
        first, weights = self._packed(count, True)
        x, shape = self._x(), self.shape
        scale = torch.ones(self.k, device=self.device) if shape.scaled else None
        quantize = partial(
            *(hadamard_quantize, x, scale, shape.order, shape.stride, bits, False)
        )
        rest = (first.scale, None, first.sum, None, bits, torch.bfloat16)

        def call(weight: torch.Tensor) -> torch.Tensor:
            return linear_w4a4(*quantize(), weight, *rest)

        return [partial(call, weight) for weight in weights]

    def weight_only(
        self, count: Count, group: int = 0, config: LinearConfig | None = None
    ) -> Calls:
        first, weights = self._packed(count, False, group)
        x = self._x()
        rest = (first.scale, None, None, 4, torch.bfloat16, config)
        return [partial(linear_wna16, x, w, *rest) for w in weights]

    def bf16(self, count: Count) -> Calls:
        x = self._x()
        return [
            partial(torch.nn.functional.linear, x, self._codes(self.n).bfloat16())
            for _ in range(count(2 * self.weights))
        ]

    def fp8(self, count: Count) -> Calls:
        kind = torch.float8_e4m3fn
        x, one = self._x().to(kind), torch.ones((), device=self.device)
        return [
            partial(
                torch._scaled_mm,
                x,
                self._codes(self.n).bfloat16().to(kind).t(),
                scale_a=one,
                scale_b=one,
                out_dtype=torch.bfloat16,
            )
            for _ in range(count(self.weights))
        ]

    def int8(self, count: Count) -> Calls:
        codes = self._codes(self.m)
        return [
            partial(torch._int_mm, codes, self._codes(self.n).t())
            for _ in range(count(self.weights))
        ]
