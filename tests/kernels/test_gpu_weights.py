# SPDX-License-Identifier: Apache-2.0
"""Weights in the form of the GPU kernels: every code in its place, zero beside them."""

from typing import Any

import pytest
import torch

from vllm_lowbit.kernels.gpu import weights
from vllm_lowbit.kernels.gpu.weights import pack, padded, stored_bits, unpack


def codes_of(n: int, k: int, bits: int) -> torch.Tensor:
    half = 1 << bits - 1
    codes = torch.randint(-half, half, (n, k), dtype=torch.int8)
    codes[0], codes[-1] = half - 1, -half
    return codes


@pytest.mark.parametrize("widen", [False, True])
@pytest.mark.parametrize("bits", weights.WEIGHT_BITS)
@pytest.mark.parametrize(
    ("k", "group_size"),
    [(1, 0), (96, 32), (192, 64), (200, 0), (256, 0), (384, 128), (512, 256)],
)
def test_codes_and_the_zeros_that_fill_a_block(
    k: int, group_size: int, bits: int, widen: bool
) -> None:
    """Columns beyond K hold code 0: their products are nothing, whatever is read."""
    codes, groups = codes_of(5, k, bits), k // group_size if group_size else 1
    scale, zero = torch.rand(5, groups), torch.ones(5, groups, dtype=torch.int8)
    for zero_point in (None, zero):
        packed = pack(codes, scale, zero_point, bits, widen=widen)
        stored = stored_bits(bits, widen)
        width = padded(k, stored)
        assert packed.weight.shape == (5, width * stored // 8)
        assert packed.weight.is_contiguous() and width - k < 256
        row = unpack(packed.weight, width, stored, group_size)
        assert torch.equal(row[:, :k], codes) and not row[:, k:].any()
        assert torch.equal(unpack(packed.weight, k, stored, group_size), codes)
        differences = codes.int() - (0 if zero_point is None else 1)
        sums = differences.unflatten(1, (groups, -1)).sum(-1)
        assert torch.equal(packed.sum.t(), sums.int())
        assert torch.equal(packed.scale.t(), scale)


def test_no_rows() -> None:
    packed = pack(codes_of(2, 128, 4)[:0], torch.ones(0, 1), None, 4, widen=True)
    assert packed.weight.shape == (0, 64) and packed.sum.shape == (1, 0)


K = 768
CODES, SCALE = torch.zeros(3, K, dtype=torch.int8), torch.ones(3, 1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"codes": CODES[0]}, r"codes must be int8 \[n, k\], got torch.int8 \[768\]"),
        ({"codes": CODES.int()}, r"codes must be int8 .* got torch.int32 \[3, 768\]"),
        ({"scale": SCALE.double()}, r"scale must be float32 \[3, groups\], got .*64"),
        ({"scale": torch.ones(3)}, r"scale must be float32 .* got .* \[3\]"),
        ({"scale": torch.ones(2, 1)}, r"scale must be float32 .* got .* \[2, 1\]"),
        ({"scale": torch.ones(3, 5)}, "has 5 groups, which do not divide K 768"),
        ({"scale": torch.ones(3, 0)}, "has 0 groups, which do not divide K 768"),
        (
            {"scale": torch.ones(3, 16)},
            "group_size must be 32, 64 or a multiple of 128, got 48",
        ),
        (
            {"scale": torch.ones(3, 2), "bits": 3},
            "must be 32, 64, 128 or a multiple of 256 for 3 bits, got 384",
        ),
        ({"bits": 5}, r"weight_bits must be one of \(2, 3, 4, 6, 8\), got 5"),
        (
            {"codes": CODES - 9},
            r"codes of 4 bits must lie in \[-8, 7\], got \[-9, -9\]",
        ),
        (
            {"codes": CODES + 2, "bits": 2},
            r"codes of 2 bits .* \[-2, 1\], got \[2, 2\]",
        ),
        (
            {"zero_point": torch.zeros(3, 1)},
            r"zero_point must be integer \[3, 1\], got torch.float32 \[3, 1\]",
        ),
        (
            {"zero_point": torch.zeros(3, 2, dtype=torch.int32)},
            r"zero_point must be integer \[3, 1\], got torch.int32 \[3, 2\]",
        ),
        (
            {"zero_point": torch.full((3, 1), 8)},
            r"zero_point of 4 bits must lie in \[-8, 7\], got \[8, 8\]",
        ),
    ],
)
def test_what_is_refused(change: dict[str, Any], message: str) -> None:
    given = {"codes": CODES, "scale": SCALE, "zero_point": None, "bits": 4, **change}
    with pytest.raises(ValueError, match=message):
        pack(**given, widen=False)


def test_wide_groups_of_3_bits_are_nibbles_for_integer_products() -> None:
    packed = pack(CODES, torch.ones(3, 2), None, 3, widen=True)
    assert packed.weight.shape == (3, K // 2)
