# SPDX-License-Identifier: Apache-2.0
"""From the experts a token chose to tokens in the order of experts, and back.

Plain torch without a look at the data, so that torch.compile traces it and a CUDA graph
holds it. On every device: vLLM's ``moe_align_block_size``, whose ``sorted_token_ids``
pad each expert's tokens to whole tiles, is an operator of its GPU builds alone, and
these modules run without vLLM.
"""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Routing:
    """Pairs of a token and one of its experts, in the order of experts.

    Attributes:
        order: int64 ``[pairs]``, which pair comes here; pair ``t * experts_per_token
            + j`` is token t's j-th choice. Those of one expert keep this order.
        rows: int64 ``[pairs]``, the token of each.
        offsets: int32 ``[experts + 1]``: those of expert e are
            ``offsets[e]:offsets[e + 1]``.
    """

    order: torch.Tensor
    rows: torch.Tensor
    offsets: torch.Tensor


def by_expert(topk_ids: torch.Tensor, num_experts: int) -> Routing:
    """Sort the choices of every token.

    Args:
        topk_ids: integer ``[tokens, experts_per_token]``, in ``[0, num_experts)``.
        num_experts: how many there are.
    """
    chosen, order = topk_ids.flatten().sort(stable=True)
    experts = torch.arange(num_experts + 1, device=chosen.device, dtype=chosen.dtype)
    offsets = torch.searchsorted(chosen, experts, out_int32=True)
    return Routing(order, order // topk_ids.shape[1], offsets)


def combine(
    x: torch.Tensor, routing: Routing, topk_weights: torch.Tensor
) -> torch.Tensor:
    """The weighted sum of what every token's experts gave.

    A token's experts are added in the order in which it chose them, in float32, so its
    sum does not depend on other tokens.

    Args:
        x: ``[pairs, n]``, in the order of experts.
        routing: of the pairs.
        topk_weights: float ``[tokens, experts_per_token]``.

    Returns:
        ``[tokens, n]`` in the dtype of x.
    """
    chosen = x[torch.argsort(routing.order)].float()
    chosen = chosen.unflatten(0, topk_weights.shape)
    weights = topk_weights.float().unsqueeze(-1)
    total = chosen[:, 0] * weights[:, 0]
    for choice in range(1, topk_weights.shape[1]):
        total = total + chosen[:, choice] * weights[:, choice]
    return total.to(x.dtype)
