# SPDX-License-Identifier: Apache-2.0
"""Perplexity of a text in windows, and the text's tokens."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch


@dataclass(frozen=True)
class Perplexity:
    """Result of :func:`perplexity`.

    Attributes:
        perplexity: exp of the mean negative log-likelihood.
        tokens: number of predicted tokens.
    """

    perplexity: float
    tokens: int


def tokenize(model: str, text: Path, max_tokens: int) -> torch.Tensor:
    """First ``max_tokens`` token ids of a text file, int64.

    Raises:
        ValueError: when the text is shorter than that.
    """
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    # Enough characters for the tokens asked for: none is longer than 32 on average.
    ids = tokenizer(text.read_text()[: 32 * max_tokens], verbose=False)["input_ids"]
    if len(ids) < max_tokens:
        raise ValueError(f"{text} has {len(ids)} tokens, {max_tokens} were asked for")
    return torch.tensor(ids[:max_tokens])


def perplexity(
    logits_of: Callable[[torch.Tensor], torch.Tensor],
    token_ids: torch.Tensor,
    seq_len: int,
) -> Perplexity:
    """Perplexity over windows that do not overlap.

    Every window is scored on its own; its first token is not predicted.

    Args:
        logits_of: from token ids ``[n]`` to logits ``[n, vocabulary]``.
        token_ids: int64 ``[tokens]``.
        seq_len: window length.
    """
    loss, count = 0.0, 0
    for window in token_ids.split(seq_len):
        if len(window) < 2:
            continue
        log_probs = logits_of(window)[:-1].double().log_softmax(-1)
        loss -= float(log_probs.gather(1, window[1:, None]).sum())
        count += len(window) - 1
    return Perplexity(math.exp(loss / count), count)
