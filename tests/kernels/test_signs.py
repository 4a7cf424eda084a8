# SPDX-License-Identifier: Apache-2.0
"""Signs from a seed: pinned for ever, because checkpoints record only the seed."""

import hashlib

import pytest
import torch

from vllm_lowbit.kernels.hadamard.signs import random_signs


def test_first_signs_are_pinned() -> None:
    assert random_signs(0, 16).tolist() == [
        1 if bit == "0" else -1
        for byte in hashlib.shake_256(b"0").digest(2)
        for bit in f"{byte:08b}"[::-1]
    ]
    assert random_signs(12345, 8).tolist() == [1, 1, 1, 1, 1, -1, -1, 1]


@pytest.mark.parametrize("size", [0, 1, 7, 8, 9, 1000])
def test_sizes_are_prefixes_of_one_stream(size: int) -> None:
    signs = random_signs(3, size)
    assert signs.shape == (size,) and signs.dtype == torch.int8
    assert torch.equal(signs, random_signs(3, 2000)[:size])


def test_signs_are_balanced_and_seeds_differ() -> None:
    a, b = random_signs(0, 4096).long(), random_signs(1, 4096).long()
    assert set(a.tolist()) == {-1, 1}
    # Four standard deviations of a sum of 4096 signs.
    assert abs(int(a.sum())) < 256 and abs(int((a * b).sum())) < 256


@pytest.mark.parametrize(("seed", "size"), [(-1, 4), (0, -1)])
def test_negative_arguments_are_refused(seed: int, size: int) -> None:
    with pytest.raises(ValueError, match="must not be negative"):
        random_signs(seed, size)
