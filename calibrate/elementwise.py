# SPDX-License-Identifier: Apache-2.0
"""What architectures compute element by element, each in its own way."""

import torch
from torch.nn import functional

from ..architecture import ModelShape


def activated(x: torch.Tensor, shape: ModelShape) -> torch.Tensor:
    """An MLP's activation, of gate where there is one and else of up."""
    match shape.architecture.activation:
        case "silu":
            return functional.silu(x)
        case "relu":
            return functional.relu(x)
    return functional.gelu(x, approximate="tanh")


def soft_capped(x: torch.Tensor, cap: float | None) -> torch.Tensor:
    """``cap * tanh(x / cap)``, x itself without a cap."""
    return x if cap is None else torch.tanh(x / cap) * cap


def embedding_scale(shape: ModelShape, dtype: torch.dtype) -> float:
    """What looked-up rows are multiplied by in a model of a dtype."""
    if not shape.architecture.scaled_embedding:
        return 1.0
    return float(torch.tensor(shape.hidden_size**0.5, dtype=dtype))
