# SPDX-License-Identifier: Apache-2.0
"""Hadamard transform in plain torch, float32, any device.

Order of operations (every backend that promises equal codes follows it): the
butterflies of the power of two, distance 1 first; then the core, as a sum over its
columns in ascending order; then one multiplication by ``1 / sqrt(order)`` in
float32. All of it is elementwise, so a row never depends on its neighbours.
"""

import torch

from .matrices import core_matrix, factor
from .reference import check_blocks


def hadamard(
    x: torch.Tensor, order: int, stride: int = 1, *, transpose: bool = False
) -> torch.Tensor:
    """As the reference, computed and returned in float32."""
    check_blocks(x.shape[-1], order, stride)
    core, power = factor(order)
    y = x.float().reshape(-1, core, power, stride)
    distance = 1
    while distance < power:
        a, b = y.unflatten(2, (-1, 2, distance)).unbind(3)
        y = torch.stack((a + b, a - b), dim=3).reshape(y.shape)
        distance *= 2
    if core > 1:
        y = _apply_core(y, core, transpose)
    scale = torch.tensor(order**-0.5, dtype=torch.float32)
    return (y * scale).reshape(x.shape)


def _apply_core(y: torch.Tensor, core: int, transpose: bool) -> torch.Tensor:
    h = core_matrix(core).to(device=y.device, dtype=torch.float32)
    columns = (h if transpose else h.T).view(core, 1, core, 1, 1)
    total = columns[0] * y[:, :1]
    for j in range(1, core):
        total = total + columns[j] * y[:, j : j + 1]
    return total
