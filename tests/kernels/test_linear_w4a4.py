# SPDX-License-Identifier: Apache-2.0
"""The integer linear: accumulators to the bit, the epilogue's order, its failures."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from vllm_lowbit.kernels.grid import IntGrid, decode
from vllm_lowbit.kernels.hadamard_quantize.reference import hadamard_quantize
from vllm_lowbit.kernels.linear_w4a4 import generic, reference

WIDTHS = range(2, 9)


@dataclass(frozen=True)
class Case:
    """Operands of one linear; ``prepared`` is what the generic backend takes."""

    activations: IntGrid
    weights: IntGrid
    codes: torch.Tensor
    zero_point: torch.Tensor
    weight: torch.Tensor
    weight_zero_point: torch.Tensor | None
    groups: int

    @property
    def prepared(self) -> torch.Tensor:
        return generic.prepare(self.weight, self.weight_zero_point)

    def generic(self) -> torch.Tensor:
        return generic.accumulators(
            self.codes,
            self.zero_point,
            self.prepared,
            self.groups,
            self.activations.max_difference,
            self.weights.max_difference,
        )

    def reference(self) -> torch.Tensor:
        return reference.accumulators(
            self.codes,
            self.zero_point,
            self.weight,
            self.weight_zero_point,
            self.groups,
        )

    def int64(self) -> np.ndarray:
        """The sums in numpy integers."""
        a = self.codes.numpy().astype(np.int64)
        w = self.weight.numpy().astype(np.int64)
        a = a.reshape(len(a), self.groups, -1) - self.zero_point.numpy()[..., None]
        w = w.reshape(len(w), self.groups, -1)
        if self.weight_zero_point is not None:
            w = w - self.weight_zero_point.numpy()[..., None]
        return np.stack(
            [a[:, g] @ w[:, g].T for g in range(self.groups)], axis=1, dtype=np.int64
        )


def draw(
    activations: IntGrid,
    weights: IntGrid,
    m: int,
    n: int,
    k: int,
    groups: int = 1,
    of_tokens: int = 1,
) -> Case:
    """Codes and zero points anywhere a grid allows them, so many of a token."""

    def integers(grid: IntGrid, shape: tuple[int, int]) -> torch.Tensor:
        return torch.randint(grid.code_min, grid.code_max + 1, shape)

    zero_point = torch.zeros(m, of_tokens, dtype=torch.int32)
    if not activations.symmetric:
        zero_point = integers(activations, (m, of_tokens)).int()
    weight_zero_point = None
    if not weights.symmetric:
        weight_zero_point = integers(weights, (n, groups)).int()
    return Case(
        activations,
        weights,
        integers(activations, (m, k)).to(torch.int8),
        zero_point,
        integers(weights, (n, k)).to(torch.int8),
        weight_zero_point,
        groups,
    )


@pytest.mark.parametrize("weight_bits", WIDTHS)
@pytest.mark.parametrize("activation_bits", WIDTHS)
def test_accumulators(weight_bits: int, activation_bits: int) -> None:
    for activations in (IntGrid(activation_bits), IntGrid(activation_bits, False)):
        for weights in (
            IntGrid(weight_bits),
            IntGrid(weight_bits, full_range=True),
            IntGrid(weight_bits, symmetric=False),
        ):
            for groups, of_tokens in ((1, 1), (3, 1), (3, 3)):
                case = draw(activations, weights, 3, 5, 63, groups, of_tokens)
                expected = case.reference()
                assert expected.dtype == torch.int32
                assert expected.shape == (3, groups, 5)
                np.testing.assert_array_equal(expected.numpy(), case.int64())
                assert torch.equal(case.generic(), expected)
                assert case.generic().dtype == torch.int32


@pytest.mark.parametrize("m", [1, 63, 1000])
@pytest.mark.parametrize("n", [1, 63])
@pytest.mark.parametrize("k", [1, 63, 1000])
def test_ragged_sizes(m: int, n: int, k: int) -> None:
    case = draw(IntGrid(4, False), IntGrid(4), m, n, k)
    np.testing.assert_array_equal(case.generic().numpy(), case.int64())
    assert torch.equal(case.generic(), case.reference())


@pytest.mark.parametrize("groups", [1, 2, 5, 10, 40])
@pytest.mark.parametrize("of_tokens", [False, True])
def test_groups(groups: int, of_tokens: bool) -> None:
    grid, own = IntGrid(4, False), groups if of_tokens else 1
    case = draw(grid, grid, 17, 33, 1280 // 2, groups, own)
    np.testing.assert_array_equal(case.generic().numpy(), case.int64())
    assert torch.equal(case.generic(), case.reference())


@pytest.mark.parametrize("extra", [0, 1])
def test_extreme_codes_where_float32_ends(extra: int) -> None:
    """Sums of magnitude 225 k, at the last k that float32 holds and past it."""
    activations, weights = IntGrid(4, False), IntGrid(4, False)
    k = (1 << 24) // 225 + extra
    k += extra * (1 - k % 2)  # An odd sum, which float32 would round.
    codes = torch.full((2, k), 7, dtype=torch.int8)
    codes[1] = -8
    zero_point = torch.tensor([[-8], [7]], dtype=torch.int32)
    weight = torch.full((2, k), 7, dtype=torch.int8)
    weight[1] = -8
    case = Case(activations, weights, codes, zero_point, weight, -weight[:, :1] - 1, 1)
    total = 225 * k
    expected = torch.tensor([[[total, -total]], [[-total, total]]], dtype=torch.int32)
    assert torch.equal(case.generic(), expected)
    assert torch.equal(case.reference(), expected)


@pytest.mark.parametrize("weights", [IntGrid(8, False), IntGrid(8, full_range=True)])
def test_extreme_codes_of_eight_bits(weights: IntGrid) -> None:
    """The widest layer of a large model at the ends of both grids."""
    k = 14336
    case = draw(IntGrid(8, False), weights, 4, 4, k)
    case.codes[:2], case.codes[2:] = 127, -128
    case.zero_point[:] = torch.tensor([[-128], [127], [-128], [127]])
    case.weight[:2], case.weight[2:] = 127, -128
    if case.weight_zero_point is not None:
        case.weight_zero_point[:] = torch.tensor([[-128], [127], [-128], [127]])
    np.testing.assert_array_equal(case.generic().numpy(), case.int64())
    assert torch.equal(case.generic(), case.reference())


@pytest.mark.parametrize("which", ["generic", "reference"])
def test_sums_beyond_int32_are_refused(which: str) -> None:
    k = (1 << 31) // (255 * 255) + 1
    codes = torch.full((1, k), 127, dtype=torch.int8)
    low = torch.full((1, 1), -128, dtype=torch.int32)
    case = Case(IntGrid(8, False), IntGrid(8, False), codes, low, codes, low, 1)
    with pytest.raises(ValueError, match="int32"):
        getattr(case, which)()


class TestPrepare:
    def test_symmetric_is_as_it_is(self) -> None:
        weight = torch.randint(-7, 8, (3, 8), dtype=torch.int8)
        assert generic.prepare(weight, None) is weight

    @pytest.mark.parametrize("bits", WIDTHS)
    def test_zero_point_is_subtracted_in_the_narrowest_type(self, bits: int) -> None:
        case = draw(IntGrid(4), IntGrid(bits, False), 1, 6, 40, 4)
        assert case.weight_zero_point is not None
        zero = case.weight_zero_point.repeat_interleave(10, dim=1)
        assert torch.equal(case.prepared.int(), case.weight.int() - zero)
        fits = int(case.prepared.abs().max()) <= 127
        assert case.prepared.dtype == (torch.int8 if fits else torch.int16)
        if bits < 8:
            assert fits

    @pytest.mark.parametrize(
        ("weight", "zero_point", "dtype"),
        [(127, 0, torch.int8), (127, -1, torch.int16), (-128, 1, torch.int16)],
    )
    def test_type_at_the_ends(
        self, weight: int, zero_point: int, dtype: torch.dtype
    ) -> None:
        prepared = generic.prepare(
            torch.full((1, 2), weight, dtype=torch.int8),
            torch.full((1, 1), zero_point, dtype=torch.int32),
        )
        assert prepared.dtype == dtype
        assert prepared.tolist() == [[weight - zero_point] * 2]


class TestEpilogue:
    def test_order_of_operations(self, dtype: torch.dtype) -> None:
        """float32, each step rounded: groups ascending, then scale, then bias."""
        acc = torch.randint(-(1 << 26), 1 << 26, (9, 4, 31), dtype=torch.int32)
        scale, weight_scale = torch.rand(9, 1), torch.rand(31, 4)
        bias = torch.randn(31) * 1e6
        a, s, w, b = (t.numpy() for t in (acc, scale, weight_scale, bias))
        f32 = np.float32
        total = a[:, 0].astype(f32) * w[:, 0]
        for g in range(1, 4):
            total = total + a[:, g].astype(f32) * w[:, g]
        expected = torch.from_numpy(total * s + b)
        assert expected.dtype == torch.float32
        actual = reference.epilogue(acc, scale, weight_scale, bias, dtype)
        assert torch.equal(actual, expected.to(dtype))
        without = reference.epilogue(acc, scale, weight_scale, None, dtype)
        assert torch.equal(without, torch.from_numpy(total * s).to(dtype))
        # Another order would show.
        reverse = sum(a[:, g].astype(f32) * w[:, g] for g in (3, 2, 1, 0))
        early = sum(a[:, g].astype(f32) * w[:, g] * s for g in range(4))
        for other in (reverse * s + b, early + b):
            assert not np.array_equal(other, expected.numpy())

    def test_order_of_operations_in_groups(self, dtype: torch.dtype) -> None:
        """Both scales of a group one after the other, then groups, then bias."""
        acc = torch.randint(-(1 << 26), 1 << 26, (9, 4, 31), dtype=torch.int32)
        scale, weight_scale = torch.rand(9, 4), torch.rand(31, 4)
        bias = torch.randn(31) * 1e6
        a, s, w, b = (t.numpy() for t in (acc, scale, weight_scale, bias))
        f32 = np.float32
        parts = [a[:, g].astype(f32) * w[:, g] * s[:, g : g + 1] for g in range(4)]
        expected = torch.from_numpy(parts[0] + parts[1] + parts[2] + parts[3] + b)
        assert expected.dtype == torch.float32
        actual = reference.epilogue(acc, scale, weight_scale, bias, dtype)
        assert torch.equal(actual, expected.to(dtype))
        # Another order would show.
        first = [a[:, g].astype(f32) * (w[:, g] * s[:, g : g + 1]) for g in range(4)]
        for other in (first, parts[::-1]):
            assert not np.array_equal(
                other[0] + other[1] + other[2] + other[3] + b, expected.numpy()
            )
        # Equal scales are those of a token, but for what is rounded.
        same = reference.epilogue(
            acc, scale[:, :1].expand(9, 4), weight_scale, None, torch.float64
        )
        token = reference.epilogue(acc, scale[:, :1], weight_scale, None, torch.float64)
        torch.testing.assert_close(same, token, rtol=1e-5, atol=10.0)

    def test_bias_is_added_in_float32(self, dtype: torch.dtype) -> None:
        acc = torch.full((1, 1, 1), 1 << 12, dtype=torch.int32)
        one = torch.ones(1, 1)
        bias = torch.ones(1).to(dtype)
        actual = reference.epilogue(acc, one, one, bias, torch.float32)
        assert actual.item() == 4097

    def test_types(self, dtype: torch.dtype) -> None:
        acc = torch.ones(2, 1, 3, dtype=torch.int32)
        out = reference.epilogue(acc, torch.ones(2, 1), torch.ones(3, 1), None, dtype)
        assert out.dtype == dtype and out.shape == (2, 3)


def quantized_linear(
    x: torch.Tensor,
    weights: IntGrid,
    groups: int,
    dtype: torch.dtype,
    n: int = 40,
    of_tokens: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Generic and reference outputs and the float64 product of decoded operands."""
    k = x.shape[1]
    activations = IntGrid(4, False, group_size=k // groups if of_tokens else None)
    case = draw(activations, weights, 1, n, k, groups)
    weight_scale, bias = torch.rand(n, groups) / 100, torch.randn(n)
    codes, scale, zero_point = activations.quantize(x)
    last = bias, activations.max_difference, weights.max_difference, dtype
    out = generic.linear_w4a4(
        codes, scale, zero_point, case.prepared, weight_scale, *last
    )
    expected = reference.linear_w4a4(
        codes,
        scale,
        zero_point,
        case.weight,
        weight_scale,
        case.weight_zero_point,
        bias,
        dtype,
    )
    prepared = case.prepared.double().unflatten(-1, (groups, -1))
    w = (prepared * weight_scale.double().unsqueeze(-1)).flatten(-2)
    rows = codes.unflatten(-1, (scale.shape[1], -1))
    a = decode(rows, scale.unsqueeze(-1), zero_point.unsqueeze(-1)).flatten(-2)
    exact = a.double() @ w.t() + bias.double()
    return out, expected, exact


@pytest.mark.parametrize(("groups", "of_tokens"), [(1, False), (7, False), (7, True)])
@pytest.mark.parametrize("symmetric", [True, False])
def test_whole_operator(
    groups: int,
    of_tokens: bool,
    symmetric: bool,
    dtype: torch.dtype,
    assert_same_bits: Callable,
) -> None:
    x = torch.randn(33, 448) * torch.logspace(-1, 1, 448)
    out, expected, exact = quantized_linear(
        x, IntGrid(4, symmetric), groups, dtype, of_tokens=of_tokens
    )
    assert_same_bits(out, expected)
    # float32 epilogue, then the cast.
    eps = 2 * torch.finfo(dtype).eps
    torch.testing.assert_close(out.double(), exact, rtol=eps, atol=1e-5)


@pytest.mark.parametrize(("groups", "of_tokens"), [(1, False), (7, False), (7, True)])
def test_nan_scale_stays_in_its_row(
    groups: int, of_tokens: bool, dtype: torch.dtype
) -> None:
    x, rest = torch.randn(5, 448), (IntGrid(4), groups, dtype, 40, of_tokens)
    torch.manual_seed(1)
    clean, _, _ = quantized_linear(x, *rest)
    x[2, 100] = torch.nan
    x[4, 3] = torch.inf
    torch.manual_seed(1)
    for out in quantized_linear(x, *rest)[:2]:
        assert torch.isnan(out[[2, 4]]).all()
        assert torch.equal(out[[0, 1, 3]], clean[[0, 1, 3]])


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("groups", "group_size"), [(1, None), (4, None), (4, 128)])
def test_rows_are_independent(
    bits: int,
    groups: int,
    group_size: int | None,
    dtype: torch.dtype,
    assert_rows_independent: Callable[..., None],
) -> None:
    """From the activation to the output, transform and quantization included."""
    x = torch.randn(257, 512).to(dtype)
    case = draw(IntGrid(bits, False), IntGrid(bits), 1, 192, 512, groups)
    weight_scale, bias = torch.rand(192, groups) / 100, torch.randn(192)

    def linear(rows: torch.Tensor) -> torch.Tensor:
        codes, scale, zero_point = hadamard_quantize(
            rows, None, 512, 1, bits, False, 1.0, group_size
        )
        return generic.linear_w4a4(
            codes,
            scale,
            zero_point,
            case.prepared,
            weight_scale,
            bias,
            case.activations.max_difference,
            case.weights.max_difference,
            dtype,
        )

    assert_rows_independent(linear, x)


def test_no_rows() -> None:
    case = draw(IntGrid(4), IntGrid(4), 0, 5, 64)
    assert case.generic().shape == case.reference().shape == (0, 1, 5)


@pytest.mark.parametrize(("columns", "groups"), [(10, 3), (12, 2)])
@pytest.mark.parametrize(
    "which",
    [
        "reference",
        pytest.param("generic"),
    ],
)
def test_shapes_that_do_not_fit(which: str, columns: int, groups: int) -> None:
    case = draw(IntGrid(4), IntGrid(4), 1, 2, columns)
    case = Case(
        case.activations,
        case.weights,
        case.codes,
        case.zero_point,
        case.weight[:, :10],
        None,
        groups,
    )
    message = f"activations have {columns} columns, the weight 10, in {groups} groups"
    with pytest.raises(ValueError, match=message):
        getattr(case, which)()


@pytest.mark.parametrize("of_tokens", [2, 4])
def test_groups_of_tokens_that_are_not_the_weights(of_tokens: int) -> None:
    case = draw(IntGrid(4, False), IntGrid(4), 5, 2, 12, 3, of_tokens)
    message = rf"zero_point must have 1 column or 3, .* got \[5, {of_tokens}\]"
    for accumulators in (case.generic, case.reference):
        with pytest.raises(ValueError, match=message):
            accumulators()
    acc, scale = torch.ones(5, 3, 2, dtype=torch.int32), torch.ones(5, of_tokens)
    with pytest.raises(ValueError, match="^scale must have 1 column or 3"):
        reference.epilogue(acc, scale, torch.ones(2, 3), None, torch.float32)
