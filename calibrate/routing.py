# SPDX-License-Identifier: Apache-2.0
"""Which experts a token goes through, and with what weights."""

import torch

from ..architecture import ModelShape


def route(logits: torch.Tensor, shape: ModelShape) -> tuple[torch.Tensor, torch.Tensor]:
    """The experts with the largest probability, that one first.

    Args:
        logits: ``[..., num_experts]``, of the router.
        shape: of the model.

    Returns:
        weights and indices of the experts, ``[..., experts_per_token]`` each.
    """
    probabilities = logits.softmax(dim=-1)
    weights, chosen = probabilities.topk(shape.experts_per_token, dim=-1)
    if shape.renormalize:
        weights = weights / weights.sum(dim=-1, keepdim=True)
    return weights, chosen
