# SPDX-License-Identifier: Apache-2.0
"""Integer matrix products by floating-point GEMMs that cannot round.

Every product and partial sum of small integers below 2^24 (float32) or 2^53
(float64) is exact, whatever order a BLAS adds them in. So the result does not
depend on the number of rows, their order, the thread count or the machine.
"""

import torch

_BLOCK_ELEMENTS = 1 << 20


def exact_dtype(bound: int) -> torch.dtype:
    """Narrowest float type in which sums of magnitude up to ``bound`` are exact.

    Raises:
        ValueError: when the bound exceeds what float64 holds exactly.
    """
    if bound <= 1 << 24:
        return torch.float32
    if bound <= 1 << 53:
        return torch.float64
    raise ValueError(f"integer sums up to {bound} do not fit float64 exactly")


def exact_matmul(
    a: torch.Tensor, b: torch.Tensor, a_max: int, b_max: int
) -> torch.Tensor:
    """``a @ b.T`` for integer-valued a and integer codes b.

    Args:
        a: ``[m, k]``, any dtype, integer values of magnitude up to a_max.
        b: ``[n, k]``, integer dtype, magnitude up to b_max. Converted a block of
            rows at a time, so no float copy of the whole matrix exists.
        a_max: bound on ``|a|``.
        b_max: bound on ``|b|``.

    Returns:
        ``[m, n]`` in the float dtype that holds the sums exactly.

    Raises:
        ValueError: when the sums would not be exact.
    """
    dtype = exact_dtype(a_max * b_max * a.shape[-1])
    a = a.to(dtype)
    rows = max(1, _BLOCK_ELEMENTS // max(1, b.shape[1]))
    out = a.new_empty(a.shape[0], b.shape[0])
    for start in range(0, b.shape[0], rows):
        block = b[start : start + rows].to(dtype)
        torch.mm(a, block.t(), out=out[:, start : start + rows])
    return out


def fixed_point(
    x: torch.Tensor, fraction_bits: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Round rows to integers times a power of two, for :func:`exact_matmul`.

    Args:
        x: ``[..., n]`` float; a row is the last dimension.
        fraction_bits: the largest magnitude of a row maps to below
            ``2^fraction_bits``.

    Returns:
        integer-valued float64 ``[..., n]`` and the unit, float64 ``[..., 1]``, with
        ``x ~ integers * unit``. An Inf or NaN stays one, so its row turns to NaN.
    """
    x = x.double()
    low, high = torch.aminmax(x, dim=-1, keepdim=True)
    exponent = torch.frexp(torch.maximum(high, -low)).exponent
    # Not below the smallest normal: dividing by a unit of 0 would make NaNs.
    exponent = (exponent - fraction_bits).clamp_(min=-1022)
    unit = torch.ldexp(torch.ones_like(high), exponent)
    return (x / unit).round_(), unit
