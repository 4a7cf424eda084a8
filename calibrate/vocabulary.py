# SPDX-License-Identifier: Apache-2.0
"""Embedding, final norm and head: folded, quantized and written."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from ..load_time import check_finite
from ..lowbit_checkpoint import HEAD_SCALE, VOCABULARY
from ..schema import Scheme
from .quantize import Add, QuantizedMatrix, round_to_nearest
from .scratch import Scratch
from .source import Source
from .transforms import Orthogonal, fold_embedding, fold_head

EMBEDDING, NORM, HEAD = "model.embed_tokens", "model.norm.weight", "lm_head"
# That are folded at a time, in float64.
ROWS = 4096
Fold = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Vocabulary:
    """What turns tokens into hidden states and those into logits, float32.

    Attributes:
        embedding: ``[vocab, hidden]``.
        norm: final norm's weight, ``[hidden]``.
        head: ``[vocab, hidden]``.
    """

    embedding: torch.Tensor
    norm: torch.Tensor
    head: torch.Tensor

    def to(self, device: str) -> "Vocabulary":
        """It on a device."""
        return Vocabulary(
            self.embedding.to(device), self.norm.to(device), self.head.to(device)
        )


def plain_vocabulary(source: Source, scratch: Scratch | None = None) -> Vocabulary:
    """That of the float model.

    Raises:
        CheckpointError: naming a matrix that is not finite.
    """
    scratch = scratch or Scratch()

    def matrix(name: str) -> torch.Tensor:
        tensor = source.tensor(name)
        check_finite(tensor, name)
        return _as_float(tensor, scratch)

    embedding = head = matrix(f"{EMBEDDING}.weight")
    if not source.shape.tie_word_embeddings:
        head = matrix(f"{HEAD}.weight")
    return Vocabulary(embedding, source.tensor(NORM).float(), head)


def served_vocabulary(
    add: Add,
    source: Source,
    scheme: Scheme,
    residual: Orthogonal | None,
    scratch: Scratch,
) -> Vocabulary:
    """Fold, quantize and write it; returns it as it will be served.

    A tied matrix stays one matrix: the server rotates after the look-up and back before
    the head, which here are folded into the two tables that are returned.
    """
    norm = source.tensor(NORM)
    embedding = source.tensor(f"{EMBEDDING}.weight")
    stored_norm = norm if residual is None else torch.ones_like(norm)
    add(NORM, stored_norm)

    def into_embedding(rows: torch.Tensor) -> torch.Tensor:
        return fold_embedding(rows, residual)

    def into_head(rows: torch.Tensor) -> torch.Tensor:
        return rows if residual is None else fold_head(rows, norm, residual)

    if source.shape.tie_word_embeddings:
        table = head = _store(add, EMBEDDING, embedding, None, scheme, scratch)
        if residual is not None:
            add(HEAD_SCALE, norm.float())
            table = _as_float(head, scratch, into_embedding)
            head = _as_float(head, scratch, into_head)
        return Vocabulary(table, stored_norm.float(), head)
    table = _store(add, EMBEDDING, embedding, into_embedding, scheme, scratch)
    weight = source.tensor(f"{HEAD}.weight")
    head = _store(add, HEAD, weight, into_head, scheme, scratch)
    return Vocabulary(table, stored_norm.float(), head)


def _store(
    add: Add,
    name: str,
    weight: torch.Tensor,
    fold: Fold | None,
    scheme: Scheme,
    scratch: Scratch,
) -> torch.Tensor:
    rows = len(weight)
    parts = (fold(part) if fold else part for part in weight.split(ROWS))
    if scheme.vocab_bits == 8:
        quantized = [round_to_nearest(part, VOCABULARY) for part in parts]
        QuantizedMatrix.stacked(quantized).write(add, name)
        return scratch.collect((part.decoded() for part in quantized), rows)
    stored = scratch.collect((part.to(weight.dtype) for part in parts), rows)
    add(f"{name}.weight", stored)
    return _as_float(stored, scratch)


def _as_float(
    weight: torch.Tensor, scratch: Scratch, fold: Fold | None = None
) -> torch.Tensor:
    parts = ((fold(p) if fold else p).float() for p in weight.split(ROWS))
    return scratch.collect(parts, len(weight))
