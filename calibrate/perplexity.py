# SPDX-License-Identifier: Apache-2.0
"""Perplexity of a text in windows, and the text's tokens."""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from ..errors import ConfigError, LowbitError
from .files import read_text
from .text import CHARACTERS_PER_TOKEN, token_ids

MAX_LOSS = 700.0  # nats; exp of more overflows


@dataclass(frozen=True)
class Perplexity:
    """Result of :func:`perplexity`.

    Attributes:
        perplexity: exp of the mean negative log-likelihood.
        tokens: number of predicted tokens.
    """

    perplexity: float
    tokens: int


@dataclass(frozen=True)
class Scored:
    """A sequence and which of its tokens are scored.

    Attributes:
        token_ids: int64 ``[n]``.
        start: the first token whose likelihood counts, from 1; those before it are
            only seen.
    """

    token_ids: torch.Tensor
    start: int = 1


def batches(sequences: Iterable[Scored], tokens: int) -> Iterator[list[Scored]]:
    """Sequences in their order, in groups of at most ``tokens`` where one fits."""
    group: list[Scored] = []
    size = 0
    for sequence in sequences:
        length = len(sequence.token_ids)
        if group and size + length > tokens:
            yield group
            group, size = [], 0
        group.append(sequence)
        size += length
    if group:
        yield group


def tokenize(model: str, text: Path, max_tokens: int | None = None) -> torch.Tensor:
    """First ``max_tokens`` token ids of a text file, all by default; int64.

    Raises:
        ConfigError: as :func:`.files.read_text` and :func:`.text.token_ids`, or when
            the text has fewer tokens than asked for.
    """
    characters = -1 if max_tokens is None else CHARACTERS_PER_TOKEN * max_tokens
    ids = token_ids(model, read_text(text, characters))
    if max_tokens is not None and len(ids) < max_tokens:
        raise ConfigError(f"{text} has {len(ids)} tokens, {max_tokens} were asked for")
    return torch.tensor(ids[:max_tokens], dtype=torch.int64)


def windows(token_ids: torch.Tensor, seq_len: int) -> list[torch.Tensor]:
    """Windows of ``seq_len`` tokens that do not overlap; the last may be shorter.

    A last window of one token is left out: it predicts nothing.
    """
    return [window for window in token_ids.split(seq_len) if len(window) > 1]


def negative_log_likelihood(
    logits: torch.Tensor, token_ids: torch.Tensor, start: int = 1
) -> float:
    """Of the tokens from ``start`` on, in nats, summed in float64.

    Args:
        logits: ``[n, vocabulary]``.
        token_ids: int64 ``[n]``.
        start: from 1, as nothing predicts the first token.
    """
    log_probs = logits[start - 1 : -1].double().log_softmax(-1)
    return -float(log_probs.gather(1, token_ids[start:, None]).sum())


def mean_perplexity(losses: Iterable[float], tokens: int) -> Perplexity:
    """Perplexity of windows whose negative log-likelihoods are ``losses``.

    Args:
        losses: in nats, one sum per window.
        tokens: number of predicted tokens in all windows.

    Raises:
        LowbitError: when there is no finite perplexity.
    """
    mean = math.fsum(losses) / tokens
    if not mean < MAX_LOSS:
        raise LowbitError(
            f"the mean loss is {mean} nats per token: the model's logits are not "
            "finite, or far out of range"
        )
    return Perplexity(math.exp(mean), tokens)


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
    parts = windows(token_ids, seq_len)
    losses = (negative_log_likelihood(logits_of(window), window) for window in parts)
    return mean_perplexity(losses, sum(len(window) - 1 for window in parts))
