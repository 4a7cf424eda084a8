# SPDX-License-Identifier: Apache-2.0
"""Perplexity of a float or quantized model, by the reference or by vLLM itself."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from ..errors import ConfigError
from .perplexity import Scored, mean_perplexity, tokenize, windows
from .scoring import Scorer, Target, check_backend, open_scorer

Progress = Callable[[int, int], object]


@dataclass(frozen=True)
class Evaluation:
    """What was measured, and on what.

    Attributes:
        perplexity: exp of the mean negative log-likelihood.
        tokens: predicted tokens.
        scheme: name of what was run, ``float`` for an unquantized model.
        backend: ``reference`` or ``vllm``.
        dtype: that was computed in, such as ``bfloat16``.
        seq_len: tokens of a window.
        data: the text file.
        model: the checkpoint.
    """

    perplexity: float
    tokens: int
    scheme: str
    backend: str
    dtype: str
    seq_len: int
    data: str
    model: str


def evaluate(
    model: str,
    data: Path,
    seq_len: int = 512,
    max_tokens: int | None = None,
    backend: str = "reference",
    scheme: str | None = None,
    dtype: str = "auto",
    progress: Progress = lambda done, total: None,
    verbose: bool = False,
) -> Evaluation:
    """Perplexity of a text, in windows that do not overlap.

    Every window is scored on its own; its first token is not predicted.

    Args:
        model: directory of a plain or quantized checkpoint, with its tokenizer.
        data: UTF-8 text.
        seq_len: tokens of a window.
        max_tokens: of the text, from its start; None is all of it.
        scheme: a plain model is quantized to while loading, None for the float model.
        progress: called with the windows done and their number.
        backend, dtype, verbose: as in :func:`.scoring.open_scorer`.

    Raises:
        ConfigError: for an argument or a text that cannot be used.
        CheckpointError, UnsupportedError: for a model that cannot.
        ModuleNotFoundError: where transformers or, if asked for, vLLM is missing.
    """
    check_backend(backend, dtype)
    target = Target.open(model, scheme)
    parts = text_windows(target, data, seq_len, max_tokens)
    with open_scorer(target, seq_len, backend, dtype, verbose) as scorer:
        return text_perplexity(scorer, parts, seq_len, str(data), progress)


def text_windows(
    target: Target, data: Path, seq_len: int, max_tokens: int | None
) -> list[torch.Tensor]:
    """The windows of a text; arguments and errors as in :func:`evaluate`."""
    if not 2 <= seq_len <= target.max_positions:
        raise ConfigError(
            f"seq_len must be from 2 to max_position_embeddings "
            f"{target.max_positions} of {target.model}, got {seq_len}"
        )
    if max_tokens is not None and max_tokens < 2:
        raise ConfigError(f"max_tokens must be at least 2, got {max_tokens}")
    ids = tokenize(target.model, data, max_tokens)
    if len(ids) < 2:
        raise ConfigError(f"{data} has {len(ids)} tokens, at least 2 are needed")
    target.check_tokens([int(ids.max())])
    return windows(ids, seq_len)


def text_perplexity(
    scorer: Scorer,
    parts: list[torch.Tensor],
    seq_len: int,
    data: str,
    progress: Progress = lambda done, total: None,
) -> Evaluation:
    """Perplexity of windows by a model that runs.

    Args:
        scorer: of :func:`.scoring.open_scorer`.
        parts: of :func:`text_windows`, of ``seq_len`` tokens.
        data: what the result calls the text.
        progress: called with the windows done and their number.
    """
    losses: list[float] = []
    progress(0, len(parts))
    for loss in scorer.losses(Scored(window) for window in parts):
        losses.append(loss)
        progress(len(losses), len(parts))
    result = mean_perplexity(losses, sum(len(window) - 1 for window in parts))
    return Evaluation(
        perplexity=result.perplexity,
        tokens=result.tokens,
        scheme=scorer.target.scheme,
        backend=scorer.backend,
        dtype=scorer.dtype,
        seq_len=seq_len,
        data=data,
        model=scorer.target.model,
    )
