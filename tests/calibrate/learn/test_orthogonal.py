# SPDX-License-Identifier: Apache-2.0
"""Optimisers stay on the orthogonal group and find its minima."""

import math

import pytest
import torch

from vllm_lowbit.calibrate.learn.orthogonal import (
    CayleySGD,
    OrthogonalOptimizer,
    RiemannianAdam,
    cayley,
)

OPTIMIZERS = [(RiemannianAdam, 0.1), (CayleySGD, 2e-3)]


def _random(*size: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(size, dtype=torch.float64, generator=generator)


def _off(rotation: torch.Tensor) -> float:
    eye = torch.eye(rotation.shape[-1], dtype=rotation.dtype)
    return float((rotation.detach() @ rotation.detach().mT - eye).abs().max())


@pytest.mark.parametrize("size", [1, 2, 7, 64])
def test_cayley_is_orthogonal_and_turns_by_its_argument(size: int) -> None:
    skew = _random(3, size, size)
    skew = skew - skew.mT
    assert _off(cayley(skew)) < 1e-12
    small = skew * 1e-5
    assert torch.allclose(cayley(small), torch.linalg.matrix_exp(small), atol=1e-12)


@pytest.mark.parametrize(("kind", "lr"), OPTIMIZERS)
def test_procrustes(kind: type[OrthogonalOptimizer], lr: float) -> None:
    """``|X R - Y|`` over a batch of rotations; the minimum is known in closed form."""
    x, noise = _random(3, 50, 16), _random(3, 50, 16, seed=1) * 0.1
    hidden, _ = torch.linalg.qr(_random(3, 16, 16, seed=2))
    start, _ = torch.linalg.qr(_random(3, 16, 16, seed=3))
    # Steps cannot leave the half of the group they start in.
    start[:, :, 0] *= (torch.linalg.det(start) * torch.linalg.det(hidden)).unsqueeze(-1)
    y = x @ hidden + noise
    u, _, v = torch.linalg.svd(x.mT @ y)
    best = (x @ (u @ v) - y).square().sum()

    rotation = start.requires_grad_()
    optimizer = kind([rotation], lr=lr)
    steps = 400
    for step in range(steps):
        loss = (x @ rotation - y).square().sum()
        (rotation.grad,) = torch.autograd.grad(loss, [rotation])
        for group in optimizer.param_groups:
            group["lr"] = lr * (1 + math.cos(math.pi * step / steps)) / 2
        optimizer.step()
        assert _off(rotation) < 1e-6
    assert _off(rotation) < 1e-11
    assert float((loss.detach() - best) / best) < 1e-3


def test_lr_of_adam_is_the_angle_of_a_step() -> None:
    """In radians, for every size."""
    for size in (8, 128):
        rotation, _ = torch.linalg.qr(_random(size, size))
        before = rotation.clone()
        rotation.requires_grad_()
        optimizer = RiemannianAdam([rotation], lr=0.01)
        rotation.grad = _random(size, size, seed=1)
        optimizer.step()
        turn = torch.linalg.eigvals(before.t() @ rotation.detach()).angle()
        assert float(turn.square().mean().sqrt()) == pytest.approx(0.01, rel=0.1)


@pytest.mark.parametrize(("kind", "lr"), OPTIMIZERS)
def test_zero_gradient_does_not_move(
    kind: type[OrthogonalOptimizer], lr: float
) -> None:
    rotation = torch.eye(4, dtype=torch.float64, requires_grad=True)
    optimizer = kind([rotation], lr=lr)
    rotation.grad = torch.zeros_like(rotation)
    optimizer.step()
    assert torch.equal(rotation.detach(), torch.eye(4, dtype=torch.float64))


def test_long_steps_of_sgd_are_cut() -> None:
    rotation = torch.eye(8, dtype=torch.float64, requires_grad=True)
    optimizer = CayleySGD([rotation], lr=1e9)
    rotation.grad = _random(8, 8)
    optimizer.step()
    turn = torch.linalg.eigvals(rotation.detach()).angle().abs().max()
    assert 0.1 < float(turn) < 1.0
