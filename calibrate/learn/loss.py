# SPDX-License-Identifier: Apache-2.0
"""How far the logits of the quantized model are from those of the float model."""

import torch
from torch.nn import functional


def kl_top(
    student: torch.Tensor, teacher: torch.Tensor, top_k: int, renormalise: bool = False
) -> torch.Tensor:
    """KL-Top of OSTQuant (Hu et al., 2025, section 3.4): KL over the teacher's top k.

    Args:
        student: logits ``[..., vocab]``.
        teacher: the same of the float model.
        top_k: tokens that count; capped by the vocabulary.
        renormalise: whether both distributions are restricted to those tokens, so that
            they sum to 1 there; otherwise their terms of the KL over all tokens.

    Returns:
        mean over positions, in nats.
    """
    top, index = teacher.topk(min(top_k, teacher.shape[-1]), dim=-1, sorted=False)
    chosen = student.gather(-1, index)
    if renormalise:
        p, q = top.log_softmax(-1), chosen.log_softmax(-1)
    else:
        p = top - teacher.logsumexp(-1, keepdim=True)
        q = chosen - student.logsumexp(-1, keepdim=True)
    return (p.exp() * (p - q)).sum(dim=-1).mean()


def mean_squared(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """Mean squared difference of all logits."""
    return functional.mse_loss(student, teacher)


def cross_entropy(student: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Mean over the tokens of each window after its first.

    Args:
        student: logits ``[windows, tokens, vocab]``.
        ids: int64 ``[windows, tokens]``.
    """
    return functional.cross_entropy(student[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
