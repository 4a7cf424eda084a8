# SPDX-License-Identifier: Apache-2.0
"""GPTQ and GPTAQ: rounding that makes up for each column's error in those after it.

Frantar et al., GPTQ, 2023, section 3.3: columns are quantized one after another with
the Cholesky factor of the inverse Hessian, in blocks so that most updates are GEMMs.
Li et al., GPTAQ, 2025, section 4: the output to keep is that of the float inputs, so
each column also hands on what its input has drifted from the float model's.
"""

from dataclasses import dataclass

import torch

from ..errors import CalibrationError
from ..kernels.grid import IntGrid, decode
from ..kernels.quantize_weight.reference import best_clip
from .quantize import Ranges


@dataclass(frozen=True)
class GPTQOptions:
    """Settings of :func:`gptq`.

    Attributes:
        damping: fraction of the Hessian's mean diagonal that is added to it.
        block_size: columns between two updates of the rest.
        act_order: take the columns by decreasing Hessian diagonal.
        correction: fraction of the inputs' drift that is made up for; of all of it,
            much is fitted to the calibration text alone.
    """

    damping: float = 0.01
    block_size: int = 128
    act_order: bool = False
    correction: float = 0.25


class Hessian:
    """Sums over a linear's inputs, in float64, over any number of calls.

    Attributes:
        sum: ``X^T X`` of the inputs X that it reads, ``[columns, columns]``.
        drift: ``(X' - X)^T X`` where X' are those of the float model; None while
            none were given.
        rows: how many inputs were added.
    """

    def __init__(self, columns: int, device: torch.device) -> None:
        self.rows = 0
        self.sum = torch.zeros(columns, columns, dtype=torch.float64, device=device)
        self.drift: torch.Tensor | None = None

    def add(self, x: torch.Tensor, plain: torch.Tensor | None = None) -> None:
        """Add the rows of x ``[..., columns]``, as the linear reads them.

        Args:
            x: the inputs.
            plain: those of the float model, of the same shape.
        """
        rows = x.flatten(0, -2)
        self.rows += len(rows)
        # float32 over a few thousand rows, float64 across.
        for part in rows.split(4096):
            self.sum += part.t() @ part
        if plain is None:
            return
        if self.drift is None:
            self.drift = torch.zeros_like(self.sum)
        difference = plain.flatten(0, -2) - rows
        for moved, part in zip(difference.split(4096), rows.split(4096), strict=True):
            self.drift += moved.t() @ part


@dataclass(frozen=True)
class Compensation:
    """How the columns of every weight that reads the same inputs make up for others.

    Attributes:
        order: in which columns are taken, int64 ``[k]``.
        factor: upper Cholesky factor of the damped Hessian's inverse, float32
            ``[k, k]``, in that order.
        handed_on: float32 ``[k, k]``, what a column hands on of its input's drift;
            makes it GPTAQ.
    """

    order: torch.Tensor
    factor: torch.Tensor
    handed_on: torch.Tensor | None

    @classmethod
    def of(cls, hessian: Hessian, options: GPTQOptions, name: str) -> "Compensation":
        """Work it out, in the memory of the Hessian, which is used up.

        Args:
            hessian: of the quantized inputs.
            options: damping, order and correction.
            name: of a linear that reads them, for errors.

        Raises:
            CalibrationError: when the Hessian is not finite or not positive definite.
        """
        total, drift = hessian.sum, hessian.drift
        del hessian.sum, hessian.drift
        order = torch.arange(len(total), device=total.device)
        if options.act_order:
            order = torch.argsort(total.diagonal(), descending=True, stable=True)
            total = _reordered(total, order)
            drift = None if drift is None else _reordered(drift, order)
        factor = _inverse_factor(total, options.damping, name)
        handed_on = None
        if drift is not None:
            # Row i, right of i: i's drift in least squares of the columns after it.
            moved = (drift @ factor.t()).triu_(1) @ factor
            handed_on = (options.correction * moved).float()
        return cls(order, factor.float().contiguous(), handed_on)


def gptq(
    weight: torch.Tensor,
    compensation: Compensation,
    grid: IntGrid,
    group_size: int | None,
    block_size: int,
    ranges: Ranges | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Quantize a weight so that its outputs on the calibration inputs change least.

    Scales are fixed before the first column (static groups), so the order of columns
    leaves no trace in the result's format.

    Args:
        weight: float32 ``[n, k]``.
        compensation: of its inputs.
        grid: the codes to use.
        group_size: elements of k that share a scale; None for whole rows.
        block_size: columns between two updates of the rest.
        ranges: of the groups; None takes those of the MSE clip search.

    Returns:
        codes int8 ``[n, k]``, scale float32 and zero_point int32 ``[n, groups]``.
    """
    n, k = weight.shape
    size = k if group_size is None else group_size
    if ranges is None:
        best = best_clip(weight.reshape(-1, size), grid)
        ranges = best[0].view(n, -1), best[1].view(n, -1)
    scale, zero_point = ranges
    codes = _round_columns(weight, compensation, grid, scale, zero_point, block_size)
    return codes, scale, zero_point


def _reordered(square: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """Rows and columns in another order, with one copy at a time."""
    rows = square[order]
    for part in rows.split(256):
        part.copy_(part[:, order])
    return rows


def _inverse_factor(hessian: torch.Tensor, damping: float, name: str) -> torch.Tensor:
    """Upper Cholesky factor of the damped Hessian's inverse, in its memory."""
    if not bool(torch.isfinite(hessian.sum())):
        raise CalibrationError(
            f"linear {name}: its calibration inputs hold an Inf or NaN"
        )
    diagonal = hessian.diagonal()
    mean = float(diagonal.mean()) or 1.0
    # An input that is always zero is rounded on its own.
    diagonal[diagonal == 0] = mean
    diagonal += damping * mean
    # LAPACK works in place on a matrix whose columns are in one piece.
    factor = hessian.mT
    failed = torch.empty((), dtype=torch.int32, device=hessian.device)
    torch.linalg.cholesky_ex(factor, out=(factor, failed))
    if not int(failed):
        torch.cholesky_inverse(factor, out=factor)
        torch.linalg.cholesky_ex(factor, upper=True, out=(factor, failed))
    if int(failed):
        raise CalibrationError(
            f"linear {name}: the Hessian of its inputs is not positive definite; "
            f"raise weights.damping (it is {damping}) or use more samples"
        )
    return factor


def _round_columns(
    weight: torch.Tensor,
    compensation: Compensation,
    grid: IntGrid,
    scale: torch.Tensor,
    zero_point: torch.Tensor,
    block_size: int,
) -> torch.Tensor:
    """Codes ``[n, k]`` with scale and zero_point ``[n, groups]``."""
    n, k = weight.shape
    order, factor = compensation.order, compensation.factor
    handed_on = compensation.handed_on
    # Rows of the transpose are columns in one piece of memory.
    rest, scale, zero_point = weight.t()[order], scale.t(), zero_point.t()
    group = (order // (k // len(scale))).tolist()
    codes = torch.empty(k, n, dtype=torch.int8, device=weight.device)
    for start in range(0, k, block_size):
        end = min(start + block_size, k)
        errors = torch.empty(end - start, n, dtype=rest.dtype, device=rest.device)
        for i in range(start, end):
            its = scale[group[i]], zero_point[group[i]]
            codes[i] = grid.encode(rest[i], *its)
            error = rest[i] - decode(codes[i], *its)
            error = error / factor[i, i]
            errors[i - start] = error
            rest[i + 1 : end] -= factor[i, i + 1 : end].unsqueeze(1) * error
            if handed_on is not None:
                rest[i + 1 : end] += handed_on[i, i + 1 : end].unsqueeze(1) * rest[i]
        rest[end:] -= factor[start:end, end:].t() @ errors
        if handed_on is not None:
            rest[end:] += handed_on[start:end, end:].t() @ rest[start:end]
    return codes[torch.argsort(order)].t().contiguous()
