# SPDX-License-Identifier: Apache-2.0
"""QSUR against closed forms."""

import math

import pytest
import torch

from vllm_lowbit.calibrate.qsur import SecondMoment, log_qsur, log_qsur_limit


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def rotation(size: int) -> torch.Tensor:
    return torch.linalg.qr(torch.randn(size, size, dtype=torch.float64)).Q


@pytest.mark.parametrize(
    ("size", "volume"), [(1, 2.0), (2, math.pi), (3, 4 / 3 * math.pi)]
)
def test_a_ball_in_its_cube(size: int, volume: float) -> None:
    """The volumes everybody knows, over that of the cube of side 2."""
    assert math.exp(size * log_qsur_limit(size)) == pytest.approx(volume / 2**size)


@pytest.mark.parametrize("size", [1, 2, 64, 1000])
@pytest.mark.parametrize("deviation", [1e-3, 1.0, 50.0])
def test_isotropic(size: int, deviation: float) -> None:
    """The limit, whatever the deviation."""
    moment = deviation**2 * torch.eye(size, dtype=torch.float64)
    assert log_qsur(moment) == pytest.approx(log_qsur_limit(size), abs=1e-12)


def test_isotropic_samples() -> None:
    """Of samples: logdet is short by d / (2 n) per dimension, and the largest of d
    variances is above 1 by about ``sqrt(4 log(d) / n)``."""
    size, count = 32, 50_000
    moment = SecondMoment(size)
    for part in torch.randn(count, size).split(7000):
        moment.add(3 * part)
    assert moment.rows == count
    bound = size / count + math.sqrt(4 * math.log(size) / count)
    assert log_qsur(moment.value) == pytest.approx(log_qsur_limit(size), abs=bound)


def test_outlier_channel() -> None:
    """One of d deviations is c times larger: (1/d - 1) log c below the limit."""
    size, factor = 128, 30.0
    diagonal = torch.ones(size, dtype=torch.float64)
    diagonal[5] = factor**2
    expected = log_qsur_limit(size) + (1 / size - 1) * math.log(factor)
    assert log_qsur(diagonal.diag(), 0) == pytest.approx(expected, abs=1e-12)


def test_outlier_channel_spread_by_a_hadamard() -> None:
    """Its energy on all channels alike: the cube shrinks to their mean."""
    size, factor = 128, 30.0
    h = torch.ones(1, 1, dtype=torch.float64)
    while len(h) < size:
        h = torch.cat((torch.cat((h, h), 1), torch.cat((h, -h), 1))) / math.sqrt(2)
    diagonal = torch.ones(size, dtype=torch.float64)
    diagonal[5] = factor**2
    mean = (size - 1 + factor**2) / size
    expected = log_qsur_limit(size) + math.log(factor) / size - math.log(mean) / 2
    found = log_qsur(h.t() @ diagonal.diag() @ h, 0)
    assert found == pytest.approx(expected, abs=1e-12)
    assert found > log_qsur(diagonal.diag(), 0) + 1


@pytest.mark.parametrize("size", [2, 17, 64])
def test_rotated(size: int) -> None:
    """The determinant stays; the cube is that of the new diagonal."""
    variances = torch.rand(size, dtype=torch.float64) + 0.1
    r = rotation(size)
    rotated = r.t() @ variances.diag() @ r
    moved = log_qsur(rotated, 0) - log_qsur(variances.diag(), 0)
    cubes = float(variances.max().log() - rotated.diagonal().max().log()) / 2
    assert moved == pytest.approx(cubes, abs=1e-10)
    assert moved >= 0


def test_two_dimensions() -> None:
    """Deviations a and b, turned by 45 degrees: pi a b / (2 (a^2 + b^2))."""
    a, b, turn = 3.0, 0.5, math.sqrt(0.5)
    r = torch.tensor([[turn, turn], [-turn, turn]], dtype=torch.float64)
    moment = torch.tensor([[a * a, 0.0], [0.0, b * b]], dtype=torch.float64)
    expected = math.pi * a * b / (2 * (a * a + b * b))
    assert math.exp(2 * log_qsur(r.t() @ moment @ r, 0)) == pytest.approx(expected)


def test_scales_that_whiten_reach_the_limit() -> None:
    variances = torch.rand(48, dtype=torch.float64) + 0.1
    scaled = variances.diag() / variances
    assert log_qsur(scaled) == pytest.approx(log_qsur_limit(48), abs=1e-6)


def test_degenerate() -> None:
    """Fewer samples than dimensions give a number; no data none."""
    moment = SecondMoment(16)
    assert math.isnan(log_qsur(moment.value))
    moment.add(torch.randn(2, 2, 16))
    assert -20 < log_qsur(moment.value) < log_qsur_limit(16)
