# SPDX-License-Identifier: Apache-2.0
"""16-bit linear for the vocabulary matrix of a GPU, by its BLAS."""

import torch


def linear_tiled(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """``x @ weight.T + bias`` in one GEMM.

    Tiles of a few rows would read a matrix of a gigabyte once each. The library chooses
    its kernel by the number of rows, so a token's last bits may change with its
    neighbours.

    Args:
        x: ``[tokens, k]``.
        weight: ``[n, k]``, same dtype.
        bias: ``[n]`` or None.

    Returns:
        ``[tokens, n]`` in the dtype of x.
    """
    return torch.nn.functional.linear(x, weight, bias)
