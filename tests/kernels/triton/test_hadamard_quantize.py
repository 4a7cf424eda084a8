# SPDX-License-Identifier: Apache-2.0
"""Transform and quantization: equal where promised, else within the stated bounds."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_lowbit.kernels.grid import IntGrid
from vllm_lowbit.kernels.hadamard.matrices import matrix
from vllm_lowbit.kernels.hadamard.triton import blocks_of, scaling, tile_of
from vllm_lowbit.kernels.hadamard_quantize import reference, triton
from vllm_lowbit.kernels.hadamard_quantize.triton import TRANSFORM_ERROR

CPU = torch.device("cpu")
GRIDS = [(bits, symmetric) for bits in (4, 6, 8) for symmetric in (True, False)]
Result = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def activations(m: int, n: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """Rows with an outlier channel, as activations have them."""
    x = torch.randn(m, n) * 3
    x[:, n // 3] *= 30
    return x.to(dtype)


def check(actual: Result, expected: Result, values: torch.Tensor, grid: IntGrid) -> int:
    """The bounds of the module; returns how many codes differ.

    Args:
        values: the reference's transformed rows.
    """
    codes, scale, zero_point = actual
    bound = 3 * TRANSFORM_ERROR * (grid.code_max - grid.code_min)
    relative = (scale - expected[1]).abs() / expected[1]
    assert relative.max() <= 2 * TRANSFORM_ERROR

    def near_a_tie(steps: torch.Tensor) -> torch.Tensor:
        return (steps - steps.floor() - 0.5).abs() <= bound

    inverse = 1.0 / expected[1]
    low = values.amin(1, keepdim=True).clamp(max=0.0) * grid.clip_ratio
    moved = zero_point - expected[2]
    assert bool(((moved == 0) | (near_a_tie(low * inverse) & (moved.abs() == 1))).all())
    differs = codes.int() - expected[0].int()
    allowed = near_a_tie(values * inverse) & (differs.abs() == 1)
    # A zero point that moved takes the codes of its row with it.
    allowed |= (moved != 0) & ((differs - moved).abs() <= 1)
    assert bool(((differs == 0) | allowed).all())
    return int((differs != 0).sum())


def run(
    x: torch.Tensor,
    input_scale: torch.Tensor | None,
    order: int,
    stride: int,
    bits: int,
    symmetric: bool,
) -> int:
    arguments = (x, input_scale, order, stride, bits, symmetric)
    values = reference.transform(x, input_scale, order, stride)
    return check(
        triton.hadamard_quantize(*arguments),
        reference.hadamard_quantize(*arguments),
        values,
        IntGrid(bits, symmetric),
    )


@pytest.mark.parametrize(("bits", "symmetric"), GRIDS)
@pytest.mark.parametrize("n", [1, 200, 2048, 5000])
def test_without_transform_every_bit_is_equal(
    bits: int, symmetric: bool, n: int, dtype: torch.dtype, assert_same_bits: object
) -> None:
    x = activations(5, n, dtype)
    for input_scale, clip_ratio in ((None, 1.0), (torch.rand(n) + 0.5, 0.9)):
        arguments = (x, input_scale, 1, 1, bits, symmetric, clip_ratio)
        actual = triton.hadamard_quantize(*arguments)
        expected = reference.hadamard_quantize(*arguments)
        for a, b in zip(actual, expected, strict=True):
            assert_same_bits(a, b)  # type: ignore[operator]


@pytest.mark.parametrize(("bits", "symmetric"), GRIDS)
@pytest.mark.parametrize("group_size", [32, 64, 128, 256])
def test_groups_without_transform(
    bits: int, symmetric: bool, group_size: int, assert_same_bits: object
) -> None:
    """Bit for bit, over more columns than a program takes; degenerate groups too."""
    for groups in (1, 3, 2048 // group_size + 1):
        n = groups * group_size
        x = activations(5, n)
        x[1, :group_size], x[2, -group_size:] = 0, -1.5
        x[3, -1], x[4, 0] = torch.nan, torch.inf
        for input_scale, clip_ratio in ((None, 1.0), (torch.rand(n) + 0.5, 0.9)):
            grid = bits, symmetric, clip_ratio, group_size
            actual = triton.hadamard_quantize(x, input_scale, 1, 1, *grid)
            expected = reference.hadamard_quantize(x, input_scale, 1, 1, *grid)
            assert expected[1].shape == (5, groups)
            for a, b in zip(actual, expected, strict=True):
                assert_same_bits(a, b)  # type: ignore[operator]


@pytest.mark.parametrize(("bits", "symmetric"), GRIDS)
@pytest.mark.parametrize(
    ("n", "order", "stride"),
    [(384, 128, 1), (512, 512, 1), (512, 4, 64), (480, 12, 40), (3 * 1376, 1376, 1)],
)
def test_groups_of_a_transform(
    bits: int,
    symmetric: bool,
    n: int,
    order: int,
    stride: int,
    assert_same_bits: object,
) -> None:
    """In tiles and in blocks: the grid of what ``transform`` gives."""
    x, input_scale = activations(3, n), torch.rand(n) + 0.5
    grid = IntGrid(bits, symmetric, clip_ratio=0.9, group_size=32)
    values = triton.transform(x, input_scale, order, stride)
    actual = triton.hadamard_quantize(
        x, input_scale, order, stride, bits, symmetric, 0.9, 32
    )
    for a, b in zip(actual, grid.quantize(values), strict=True):
        assert_same_bits(a, b)  # type: ignore[operator]


@pytest.mark.parametrize("order", [1, 128])
def test_groups_of_fused_prologues(order: int) -> None:
    x, weight = torch.randn(3, 512), torch.rand(256) + 0.5
    rest = None, order, 1, 8, False, 1.0, 64
    for name, arguments in (
        ("rms_norm_hadamard_quantize", (x[:, :256], weight, 1e-5, *rest)),
        ("swiglu_hadamard_quantize", (x, *rest)),
    ):
        codes, scale, zero = getattr(triton, name)(*arguments)
        expected = getattr(reference, name)(*arguments)
        assert scale.shape == zero.shape == (3, 4)
        # A step of 8 bits is larger than what a transform is off by.
        torch.testing.assert_close(scale, expected[1], rtol=2e-3, atol=0)
        assert (zero - expected[2]).abs().max() <= 1
        assert (codes.int() - expected[0].int()).abs().max() <= 2


def test_groups_that_do_not_fit() -> None:
    x = torch.zeros(1, 192)
    for size, message in (
        (128, "does not divide 192"),
        (96, "must divide 2048"),
    ):
        with pytest.raises(ValueError, match=f"group_size .*{message}"):
            triton.hadamard_quantize(x, None, 1, 1, 4, True, 1.0, size)


@pytest.mark.parametrize(("bits", "symmetric"), GRIDS)
@pytest.mark.parametrize(
    ("n", "order", "stride"),
    [
        (64, 64, 1),
        (384, 128, 1),
        (96, 12, 1),
        (512, 512, 1),
        (1536, 1536, 1),
        (512, 4, 64),
        (640, 20, 32),
        (480, 6 * 2, 40),
        (7, 1, 7),
    ],
)
def test_transforms(
    bits: int, symmetric: bool, n: int, order: int, stride: int
) -> None:
    assert (
        order == 1 or tile_of(n, order, stride, False, CPU, "interpreter") is not None
    )
    run(activations(4, n), None, order, stride, bits, symmetric)


def test_types_and_input_scale(dtype: torch.dtype) -> None:
    x = activations(3, 1024, dtype)
    for input_scale in (None, torch.rand(1024) + 0.5):
        run(x, input_scale, 1024, 1, 4, False)


# Ragged in every way: rows and columns that no power of two divides, blocks narrower
# than a product, tables of several tiles, heads, and rows too long for registers.
BLOCKS = [
    (3584, 1792, 1),
    (864, 288, 1),
    (3 * 1376, 1376, 1),
    (2 * 2368, 2368, 1),
    (7 * 192, 192, 1),
    pytest.param(20480, 20480, 1, marks=pytest.mark.slow),
    (3 * 432, 432, 1),
    pytest.param(2 * 924, 924, 1, marks=pytest.mark.slow),
    (5 * 640, 640, 1),
    (3 * 256 * 33, 256, 33),
    (129 * 128, 128, 1),
    (36864, 4608, 1),
]


@pytest.mark.parametrize(("n", "order", "stride"), BLOCKS)
def test_rows_in_blocks(n: int, order: int, stride: int) -> None:
    """Bit for bit, where the transform is exact: whole numbers, scales powers of two.

    Of a transform, then only its factor is rounded, to float32.
    """
    assert tile_of(n, order, stride, False, CPU, "interpreter") is None
    # Sums of a column are whole in the 16 bits that the second product takes.
    x = torch.randint(-3, 4, (2, n)).bfloat16()
    x[1, n // 2] = 64
    input_scale = torch.exp2(torch.randint(-1, 2, (n,)).float())
    before, after = scaling(order)
    h = matrix(order).double()
    sums = (x.double() * input_scale).unflatten(-1, (-1, order, stride))
    sums = torch.einsum("ij,...js->...is", h, sums).flatten(-3)
    values = (sums * before).float() * after
    assert torch.equal(triton.transform(x, input_scale, order, stride), values)
    for bits, symmetric in GRIDS if n < 900 else GRIDS[1:2]:
        actual = triton.hadamard_quantize(
            x, input_scale, order, stride, bits, symmetric
        )
        expected = IntGrid(bits, symmetric).quantize(values)
        for a, b in zip(actual, expected, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("n", [4096, 3 * 1024])
def test_blocks_without_rounding(n: int, assert_same_bits: object) -> None:
    """Bit for bit as the reference, where a transform's factor is a power of two."""
    x = torch.randint(-255, 256, (5, n)).bfloat16()
    x[2], x[3, 5], x[4, 7] = 0, torch.inf, torch.nan
    for bits, symmetric in GRIDS:
        arguments = (x, None, 1024, 1, bits, symmetric)
        actual = triton.hadamard_quantize(*arguments)
        expected = reference.hadamard_quantize(*arguments)
        for a, b in zip(actual, expected, strict=True):
            assert_same_bits(a, b)  # type: ignore[operator]


@pytest.mark.parametrize(("n", "order", "stride"), BLOCKS[:5])
def test_blocks_of_any_values(n: int, order: int, stride: int) -> None:
    x = activations(2, n)
    run(x, torch.rand(n) + 0.5, order, stride, 4, False)
    for transpose in (False, True):
        values = x.float()
        actual = triton.transform(values, None, order, stride, transpose)
        expected = reference.transform(values, None, order, stride, transpose)
        error = (actual - expected).abs().max() / expected.abs().max()
        assert error <= TRANSFORM_ERROR


@pytest.mark.parametrize(
    ("arch", "n", "kept"),
    [("sm_90", 28672, True), ("sm_80", 28672, False), ("sm_80", 14336, True)],
)
def test_what_stays_in_registers(arch: str, n: int, kept: bool) -> None:
    assert blocks_of(n, n // 8, 1, False, CPU, arch).kept == kept


@pytest.mark.parametrize(
    ("arch", "n"), [("sm_80", 8192), ("sm_90", 16384), ("unknown", 8192)]
)
def test_tiles_that_chips_hold(arch: str, n: int) -> None:
    assert tile_of(n, n, 1, False, CPU, arch) is not None
    assert tile_of(2 * n, 2 * n, 1, False, CPU, arch) is None
    assert tile_of(16384, 128, 1, False, CPU, arch) is not None
    assert tile_of(16512, 128, 1, False, CPU, arch) is None


@pytest.mark.parametrize(
    ("order", "stride"), [(1, 1), (128, 1), (1536, 1), (192, 1), (12, 64)]
)
def test_transform_and_its_inverse(order: int, stride: int) -> None:
    x = torch.randn(3, 2, 1536)
    rotated = triton.transform(x, None, order, stride)
    expected = reference.transform(x, None, order, stride)
    assert (rotated - expected).abs().max() <= TRANSFORM_ERROR * expected.abs().max()
    assert rotated.data_ptr() != x.data_ptr()
    back = triton.transform(rotated, None, order, stride, True)
    assert (back - x).abs().max() <= 2 * TRANSFORM_ERROR * x.abs().max()


@pytest.mark.parametrize(("n", "order"), [(512, 1), (512, 512), (384, 192)])
@pytest.mark.parametrize("symmetric", [True, False])
def test_fused_prologues(n: int, order: int, symmetric: bool) -> None:
    grid = IntGrid(4, symmetric, clip_ratio=0.9)
    x, weight = activations(2, n), torch.rand(n).bfloat16() + 0.5
    rest = (None, order, 1, 4, symmetric, 0.9)
    v = x.float()
    normed = v * torch.rsqrt(v.square().mean(-1, keepdim=True) + 1e-5) * weight.float()
    check(
        triton.rms_norm_hadamard_quantize(x, weight, 1e-5, *rest),
        reference.rms_norm_hadamard_quantize(x, weight, 1e-5, *rest),
        reference.transform(normed, None, order, 1),
        grid,
    )
    both = torch.cat((activations(2, n), torch.randn(2, n).bfloat16()), 1)
    gated = torch.nn.functional.silu(both[:, :n].float()) * both[:, n:].float()
    check(
        triton.swiglu_hadamard_quantize(both, *rest),
        reference.swiglu_hadamard_quantize(both, *rest),
        reference.transform(gated, None, order, 1),
        grid,
    )


@pytest.mark.parametrize(("n", "order"), [(256, 1), (256, 256), (512, 256)])
@pytest.mark.parametrize(("bits", "symmetric"), GRIDS)
def test_degenerate_rows(
    n: int, order: int, bits: int, symmetric: bool, assert_same_bits: object
) -> None:
    """All zero, tiny, one element, constant, Inf, NaN, and sums beyond float32."""
    x = torch.zeros(8, n)
    x[1] = 2.0**-120
    x[2, 0] = 3.0
    x[3] = -1.5
    x[4, 7] = torch.inf
    x[5, 9] = torch.nan
    x[6, 0] = 2.0**127
    x[7] = torch.tensor([3.0e38, -3.0e38]).repeat(n // 2)
    arguments = (x, None, order, 1, bits, symmetric)
    actual = triton.hadamard_quantize(*arguments)
    expected = reference.hadamard_quantize(*arguments)
    for a, b in zip(actual, expected, strict=True):
        assert_same_bits(a, b)  # type: ignore[operator]


def test_rows_apart_in_memory() -> None:
    wide = activations(6, 1024)
    for x in (wide[:, 256:768], wide[::2, :512], wide.t()[:24, :6]):
        run(x, None, x.shape[1] if x.shape[1] > 6 else 1, 1, 4, True)


def test_no_rows() -> None:
    codes, scale, zero = triton.hadamard_quantize(
        torch.empty(0, 64), None, 64, 1, 4, True
    )
    assert codes.shape == (0, 64) and scale.shape == zero.shape == (0, 1)


@settings(max_examples=25, deadline=None)
@given(
    m=st.integers(1, 5),
    blocks=st.integers(1, 3),
    order=st.sampled_from([1, 2, 4, 12, 20, 28, 36, 64, 96, 128, 224, 256, 320, 1024]),
    stride=st.sampled_from([1, 1, 3, 16, 33]),
    grid=st.sampled_from(GRIDS),
)
def test_any_shape(
    m: int, blocks: int, order: int, stride: int, grid: tuple[int, bool]
) -> None:
    run(activations(m, blocks * order * stride), None, order, stride, *grid)


@pytest.mark.slow
@pytest.mark.parametrize("blocks", [1, 8])
@pytest.mark.parametrize("n", [4096, 8192, 12288, 14336, 18944, 25600, 28672])
def test_rows_of_models(n: int, blocks: int) -> None:
    """Few codes differ at all."""
    for bits, symmetric in GRIDS:
        differing = run(activations(4, n), None, n // blocks, 1, bits, symmetric)
        assert differing <= 4 * n / 200
