# SPDX-License-Identifier: Apache-2.0
"""hadamard_quantize: against its reference, and against a copy of the same bytes."""

from collections.abc import Iterator
from functools import partial

import torch

from vllm_lowbit.kernels.gpu.target import INTERPRETED
from vllm_lowbit.kernels.grid import IntGrid
from vllm_lowbit.kernels.hadamard_quantize import reference, triton

from .case import Check, Row
from .shapes import TOKENS, WIDTHS


def checks(device: torch.device) -> Iterator[Check]:
    """Scales, zero points and codes, in the bounds that the kernel states."""
    widths = (64, 384, 512) if INTERPRETED else (64, 384, *WIDTHS)
    for n in widths:
        for bits, symmetric in ((4, True), (4, False), (8, True)):
            for order in (1, 64, n) if n == 384 else (n,):
                yield Check(
                    "hadamard_quantize",
                    f"n {n} order {order} {bits} bits symmetric {symmetric}",
                    partial(_compare, device, n, order, bits, symmetric),
                )


def _compare(
    device: torch.device, n: int, order: int, bits: int, symmetric: bool
) -> str | None:
    torch.manual_seed(n)
    x = torch.randn(5, n, device=device) * 3
    x[:, n // 3] *= 30
    x = x.bfloat16()
    arguments = (x, None, order, 1, bits, symmetric)
    codes, scale, zero = triton.hadamard_quantize(*arguments)
    expected_codes, expected_scale, expected_zero = reference.hadamard_quantize(
        *arguments
    )
    if order == 1:
        same = (
            torch.equal(codes, expected_codes)
            and torch.equal(scale, expected_scale)
            and torch.equal(zero, expected_zero)
        )
        return None if same else "not equal bit for bit without a transform"
    error = float(((scale - expected_scale) / expected_scale).abs().max())
    if not error <= 2 * triton.TRANSFORM_ERROR:
        return f"scale off by {error:.1e}"
    # In steps from the zero point, where a tie may fall the other way.
    steps = codes.int() - zero
    expected = expected_codes.int() - expected_zero
    values = reference.transform(x, None, order, 1) / expected_scale
    grid = IntGrid(bits, symmetric)
    bound = 3 * triton.TRANSFORM_ERROR * (grid.code_max - grid.code_min)
    tie = (values - values.floor() - 0.5).abs() <= bound
    whole = (zero == expected_zero).expand_as(tie)
    wrong = int(((steps != expected) & whole & ~tie).sum())
    return f"{wrong} codes differ away from ties" if wrong else None


def rows(device: torch.device) -> Iterator[Row]:
    """Every width, against copying as many bytes."""
    for n in WIDTHS:
        for m in TOKENS:
            moved = m * n * 3 + m * 8

            def quantize(count, n=n, m=m):  # type: ignore[no-untyped-def]
                inputs = [
                    torch.randn(m, n, device=device).bfloat16()
                    for _ in range(min(64, count(2 * m * n)))
                ]
                return [
                    partial(triton.hadamard_quantize, x, None, n, 1, 4, True)
                    for x in inputs
                ]

            def copy(count, moved=moved):  # type: ignore[no-untyped-def]
                half = moved // 2
                pairs = [
                    torch.empty(2, half, dtype=torch.uint8, device=device)
                    for _ in range(min(64, count(half)))
                ]
                return [partial(pair[0].copy_, pair[1]) for pair in pairs]

            yield Row(
                "hadamard_quantize",
                f"order {n}",
                {"m": m, "n": n},
                {"triton": quantize, "copy": copy},
                "copy",
                moved,
            )
