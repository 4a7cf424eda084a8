# SPDX-License-Identifier: Apache-2.0
"""QSUR: how much of a quantizer's cube the data fills (Hu et al., 2025, section 3).

The ratio of two volumes in d dimensions: of the ellipsoid of one standard deviation of
zero-mean data with second moment S, and of the cube from ``-max_j sqrt(S_jj)`` to
``+max_j sqrt(S_jj)`` in every dimension, which a grid with one scale has to cover. A
rotation changes the cube only, a scale both. A diagnostic: nothing is optimised by it.
"""

import math

import torch

# Of the mean of the diagonal, added to it: without, data of fewer samples than
# dimensions has no volume.
DAMPING = 1e-6


class SecondMoment:
    """``E[x^T x]`` of rows that come in parts, float64 ``[d, d]``."""

    def __init__(self, size: int) -> None:
        self.sum = torch.zeros(size, size, dtype=torch.float64)
        self.rows = 0

    def add(self, x: torch.Tensor) -> None:
        """Add the rows of x ``[..., d]``."""
        rows = x.detach().double().flatten(0, -2)
        self.sum += rows.t() @ rows
        self.rows += len(rows)

    @property
    def value(self) -> torch.Tensor:
        return self.sum / max(1, self.rows)


def log_qsur(moment: torch.Tensor, damping: float = DAMPING) -> float:
    """Natural logarithm of QSUR, per dimension.

    Args:
        moment: second moment ``[d, d]``, or a covariance.
        damping: added to the diagonal, as a fraction of the diagonal's mean.

    Returns:
        ``(log v_d + log det(S) / 2) / d - log 2 - log(max_j S_jj) / 2``, v_d the volume
        of the unit ball; it is largest, :func:`log_qsur_limit`, for a multiple of the
        identity. NaN for data that is all zero.
    """
    moment = moment.double()
    mean = float(moment.diagonal().mean())
    if mean == 0:
        return math.nan
    size = len(moment)
    damped = moment + damping * mean * torch.eye(size, dtype=torch.float64)
    log_det = float(torch.linalg.slogdet(damped).logabsdet)
    largest = float(damped.diagonal().max())
    return log_qsur_limit(size) + log_det / (2 * size) - math.log(largest) / 2


def log_qsur_limit(size: int) -> float:
    """The largest value in ``size`` dimensions: a ball in its cube, per dimension."""
    log_ball = size / 2 * math.log(math.pi) - math.lgamma(size / 2 + 1)
    return log_ball / size - math.log(2)
