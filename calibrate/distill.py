# SPDX-License-Identifier: Apache-2.0
"""The loss between a quantized model and the float model that it is to follow."""

import torch
from torch.nn import functional


def kl_top(
    student: torch.Tensor, teacher: torch.Tensor, top_k: int, renormalise: bool = False
) -> torch.Tensor:
    """KL-Top: divergence on the teacher's most likely tokens (OSTQuant, 2025, eq. 8).

    Args:
        student: logits ``[..., vocabulary]``.
        teacher: logits, the same shape.
        top_k: tokens of the teacher that count; capped by the vocabulary.
        renormalise: to probabilities over those tokens; otherwise they keep their
            share of the whole vocabulary's.

    Returns:
        ``sum p (log p - log q)`` over those tokens, in nats, the mean over positions.
    """
    if top_k < teacher.shape[-1]:
        if not renormalise:
            student, teacher = student.log_softmax(-1), teacher.log_softmax(-1)
        teacher, index = teacher.topk(top_k, sorted=False)
        student = student.gather(-1, index)
        if not renormalise:
            return _divergence(student, teacher)
    return _divergence(student.log_softmax(-1), teacher.log_softmax(-1))


def _divergence(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    summed = functional.kl_div(student, teacher, reduction="sum", log_target=True)
    return summed / student[..., 0].numel()
