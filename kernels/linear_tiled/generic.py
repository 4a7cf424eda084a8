# SPDX-License-Identifier: Apache-2.0
"""16-bit linear for the vocabulary matrix by the BLAS of torch."""

import torch

TILE = 16


def linear_tiled(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """``x @ weight.T + bias`` with every GEMM of the same shape.

    BLAS libraries choose another kernel, and another order of additions, for
    another number of rows. Here each call has TILE rows, the last padded with
    zeros, so that a token's logits do not change with its neighbours. They may with
    the number of threads, by which a BLAS cuts its sums (``cpu`` does not).

    Args:
        x: ``[tokens, k]``.
        weight: ``[n, k]``, same dtype.
        bias: ``[n]`` or None.

    Returns:
        ``[tokens, n]`` in the dtype of x.
    """
    tokens = x.shape[0]
    padded = torch.nn.functional.pad(x, (0, 0, 0, -tokens % TILE))
    tiles = [
        torch.nn.functional.linear(tile, weight, bias) for tile in padded.split(TILE)
    ]
    return torch.cat(tiles)[:tokens] if len(tiles) != 1 else tiles[0][:tokens]
