# SPDX-License-Identifier: Apache-2.0
"""Optimisers on the orthogonal group.

A step multiplies R with the Cayley transform of a skew-symmetric matrix, so R stays
orthogonal to rounding. Its direction comes from ``(R^T G - G^T R) / 2``, the Riemannian
gradient seen from R itself: there all tangent spaces are the same skew-symmetric
matrices, and moments of earlier steps need no transport.

Parameters are ``[..., n, n]``: any number of square orthogonal matrices.
"""

import math
from abc import abstractmethod
from collections.abc import Iterable
from typing import Any

import torch
from torch.optim import Optimizer


def cayley(skew: torch.Tensor) -> torch.Tensor:
    """``(I - skew / 2)^-1 (I + skew / 2)``, orthogonal, ``[..., n, n]``."""
    half = skew / 2
    eye = torch.eye(skew.shape[-1], dtype=skew.dtype, device=skew.device)
    return torch.linalg.solve(eye - half, eye + half)


class OrthogonalOptimizer(Optimizer):
    """A rule for the skew-symmetric matrix of a step."""

    def __init__(self, params: Iterable[torch.Tensor], lr: float) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Turn every parameter by its gradient; a closure is not supported."""
        for group in self.param_groups:
            for rotation in group["params"]:
                seen = rotation.mT @ rotation.grad
                gradient = (seen - seen.mT) / 2
                turn = self.turn(gradient, self.state[rotation], group["lr"])
                rotation.copy_(rotation @ cayley(turn))

    @abstractmethod
    def turn(
        self, gradient: torch.Tensor, state: dict[str, Any], lr: float
    ) -> torch.Tensor:
        """Skew-symmetric ``[..., n, n]``, from a gradient that is too."""


class RiemannianAdam(OrthogonalOptimizer):
    """Adam (Kingma and Ba, 2015) on matrices, after Becigneul and Ganea, 2019.

    The second moments are those of single entries of the Riemannian gradient. A step is
    divided by the square root of n: ``lr`` is then about the root mean square of the
    angles, in radians, that a step turns by, for every size.
    """

    beta1, beta2, eps = 0.9, 0.999, 1e-12

    def turn(
        self, gradient: torch.Tensor, state: dict[str, Any], lr: float
    ) -> torch.Tensor:
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32)
            state["first"] = torch.zeros_like(gradient)
            state["second"] = torch.zeros_like(gradient)
        state["step"] += 1
        first, second = state["first"], state["second"]
        first.lerp_(gradient, 1 - self.beta1)
        second.lerp_(gradient.square(), 1 - self.beta2)
        steps = int(state["step"])
        mean = first / (1 - self.beta1**steps)
        deviation = (second / (1 - self.beta2**steps)).sqrt()
        length = lr / math.sqrt(gradient.shape[-1])
        return -length * mean / (deviation + self.eps)


class CayleySGD(OrthogonalOptimizer):
    """SGD with momentum, after Li et al., 2020, algorithm 1.

    A step is cut where it would turn further than the Cayley transform is good for:
    its length is ``min(lr, 1 / |direction|)``, in the norm of the largest column sum.
    """

    momentum = 0.9

    def turn(
        self, gradient: torch.Tensor, state: dict[str, Any], lr: float
    ) -> torch.Tensor:
        first = state.setdefault("first", torch.zeros_like(gradient))
        first.mul_(self.momentum).add_(gradient)
        norm = first.abs().sum(dim=-2, keepdim=True).amax(dim=-1, keepdim=True)
        tiny = torch.finfo(norm.dtype).tiny
        return -first * (1 / norm.clamp(min=tiny)).clamp(max=lr)
