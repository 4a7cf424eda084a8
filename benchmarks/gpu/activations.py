# SPDX-License-Identifier: Apache-2.0
"""hadamard_quantize: against its reference, and against a copy of the same bytes."""

from collections.abc import Iterator
from functools import partial
from itertools import product
from typing import Any

import torch

from vllm_lowbit.kernels.gpu.target import INTERPRETED
from vllm_lowbit.kernels.grid import IntGrid
from vllm_lowbit.kernels.hadamard_quantize import reference, triton

from .case import Arm, Calls, Check, Count, Row, same_twice
from .shapes import MODELS, OTHER_ROWS, TOKENS, Layer

# Of a copy's time, at most.
WITHIN = 1.3
EPSILON = 1e-5
SMALL = (
    Layer(0, 64, 64),
    Layer(0, 384, 64),
    Layer(0, 384, 384),
    Layer(0, 384, 1),
    Layer(0, 512, 4, 64),
    Layer(0, 448, 224),
)
FORMS = ("plain", "scaled", "RMSNorm", "SwiGLU")


def served() -> dict[str, Layer]:
    """Rows of models by name, each once."""
    rows = {
        f"{model} {layer}": shape
        for model, layers in MODELS.items()
        for layer, shape in layers.items()
    }
    found: dict[tuple[Any, ...], str] = {}
    for name, s in rows.items():
        found.setdefault((s.k, s.order, s.stride, s.scaled), name)
    return {name: rows[name] for name in found.values()}


def checks(device: torch.device) -> Iterator[Check]:
    """Scales, zero points and codes, in the bounds that the kernel states."""
    shapes = list(SMALL[-3:])
    if not INTERPRETED:
        shapes = [*SMALL, *served().values(), *OTHER_ROWS.values()]
    for shape in shapes:
        name = f"n {shape.k} order {shape.order} stride {shape.stride}"
        for form, (bits, symmetric) in product(
            FORMS, ((4, False), (4, True), (8, True))
        ):
            if form in FORMS[2:] and bits == 8:
                continue
            # Scaled rows are served in either type.
            dtype = torch.float16 if (form, symmetric) == ("scaled", True) else None
            yield Check(
                "hadamard_quantize",
                f"{name} {form} {bits} bits symmetric {symmetric}",
                partial(_compare, device, shape, form, bits, symmetric, dtype),
            )
        for group in (32, 64, 128):
            if shape.k % group == 0:
                yield Check(
                    "hadamard_quantize",
                    f"{name} in groups of {group}",
                    partial(_compare_groups, device, shape, group),
                )
        yield Check("hadamard", name, partial(_compare_values, device, shape))


def _row(
    device: torch.device, shape: Layer, dtype: torch.dtype | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Five rows with an outlier channel, and an input scale."""
    torch.manual_seed(shape.k)
    x = torch.randn(5, shape.k, device=device) * 3
    x[:, shape.k // 3] *= 30
    return x.to(dtype or torch.bfloat16), torch.rand(shape.k, device=device) + 0.5


def _compare(
    device: torch.device,
    shape: Layer,
    form: str,
    bits: int,
    symmetric: bool,
    dtype: torch.dtype | None,
) -> str | None:
    x, weight = _row(device, shape, dtype)
    input_scale = None if form == "plain" else weight
    rest = (input_scale, shape.order, shape.stride, bits, symmetric)
    name, arguments, values = "hadamard_quantize", [x], x.float()
    if form == "RMSNorm":
        name, arguments = f"rms_norm_{name}", [x, weight.bfloat16(), EPSILON]
        mean = values.square().mean(-1, keepdim=True)
        values = values * torch.rsqrt(mean + EPSILON) * arguments[1].float()
    elif form == "SwiGLU":
        name, arguments = f"swiglu_{name}", [torch.cat((x, x.flip(1)), 1)]
        values = torch.nn.functional.silu(values) * x.flip(1).float()
    actual = same_twice(lambda: getattr(triton, name)(*arguments, *rest))
    expected = getattr(reference, name)(*arguments, *rest)
    if shape.order == 1 and form in FORMS[:2]:
        same = all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))
        return None if same else "not equal bit for bit without a transform"
    values = reference.transform(values, *rest[:3])
    return _beyond_bounds(actual, expected, values, IntGrid(bits, symmetric))


def _compare_groups(device: torch.device, shape: Layer, group: int) -> str | None:
    """Bit for bit, of values that the transform alone gives."""
    x, input_scale = _row(device, shape)
    transform = (x, input_scale, shape.order, shape.stride)
    actual = same_twice(
        partial(triton.hadamard_quantize, *transform, 4, False, group_size=group)
    )
    grid = IntGrid(4, symmetric=False, group_size=group)
    expected = grid.quantize(triton.transform(*transform))
    same = all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))
    return None if same else "not equal bit for bit to the grid of the same values"


def _beyond_bounds(
    actual: tuple[torch.Tensor, ...],
    expected: tuple[torch.Tensor, ...],
    values: torch.Tensor,
    grid: IntGrid,
) -> str | None:
    """What is further from the reference than ``triton.py`` says, if anything is."""
    (codes, scale, zero), (expected_codes, expected_scale, expected_zero) = (
        actual,
        expected,
    )
    error = float(((scale - expected_scale) / expected_scale).abs().max())
    if not error <= 2 * triton.TRANSFORM_ERROR:
        return f"scale off by {error:.1e}"
    bound = 3 * triton.TRANSFORM_ERROR * (grid.code_max - grid.code_min)

    def tied(steps: torch.Tensor) -> torch.Tensor:
        return (steps - steps.floor() - 0.5).abs() <= bound

    moved = zero - expected_zero
    low = values.amin(1, keepdim=True).clamp(max=0.0) / expected_scale
    if not bool(((moved == 0) | ((moved.abs() == 1) & tied(low))).all()):
        return "zero points differ away from ties"
    apart = codes.int() - expected_codes.int()
    allowed = tied(values / expected_scale) & (apart.abs() == 1)
    # A zero point that moved takes the codes of its row with it.
    allowed |= (moved != 0) & ((apart - moved).abs() <= 1)
    wrong = int(((apart != 0) & ~allowed).sum())
    return f"{wrong} codes differ away from ties" if wrong else None


def _compare_values(device: torch.device, shape: Layer) -> str | None:
    """The float transform and its inverse."""
    x, input_scale = _row(device, shape)
    for transpose in (False, True):
        arguments = (x, input_scale, shape.order, shape.stride, transpose)
        expected = reference.transform(*arguments)
        actual = same_twice(partial(triton.transform, *arguments))
        error = float((actual - expected).abs().max() / expected.abs().max())
        if not error <= triton.TRANSFORM_ERROR:
            return f"off by {error:.1e} of the largest"
    return None


def rows(device: torch.device) -> Iterator[Row]:
    """Every row as it is served, then others, against copying as many bytes."""
    for m in reversed(TOKENS):
        for name, shape in served().items():
            yield _against_copy(device, m, name, shape, True)
    for m in reversed(TOKENS):
        for name, shape in OTHER_ROWS.items():
            yield _against_copy(device, m, name, shape, False)


def _against_copy(
    device: torch.device, m: int, name: str, shape: Layer, aimed: bool
) -> Row:
    moved = m * shape.k * 3 + m * 8
    return Row(
        "hadamard_quantize",
        f"{name}, order {shape.order}",
        {"m": m, "n": shape.k},
        {
            "triton": Arm(partial(_quantize, device, m, shape), moved),
            "copy": Arm(partial(copies_of, device, moved), moved, baseline=True),
        },
        aims={"triton": 1 / WITHIN} if aimed else {},
    )


def _quantize(device: torch.device, m: int, shape: Layer, count: Count) -> Calls:
    """As served: asymmetric."""
    number = count(2 * m * shape.k)
    inputs = torch.randn(number, m, shape.k, dtype=torch.bfloat16, device=device)
    scale = torch.ones(shape.k, device=device) if shape.scaled else None
    rest = (scale, shape.order, shape.stride, 4, False)
    return [partial(triton.hadamard_quantize, x, *rest) for x in inputs]


def copies_of(device: torch.device, moved: int, count: Count) -> Calls:
    """Copies that read half of the bytes, and write as many."""
    half = moved // 2
    pairs = torch.empty(count(half), 2, half, dtype=torch.uint8, device=device)
    return [partial(to.copy_, source) for source, to in pairs]
