# SPDX-License-Identifier: Apache-2.0
"""Embedding, final norm and head: folded, quantized and written."""

from dataclasses import dataclass

import torch

from ..load_time import check_finite
from ..lowbit_checkpoint import HEAD_SCALE, VOCABULARY
from ..schema import Scheme
from .quantize import Add, round_to_nearest
from .source import Source
from .transforms import Orthogonal, fold_embedding, fold_head

EMBEDDING, NORM, HEAD = "model.embed_tokens", "model.norm.weight", "lm_head"


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


def plain_vocabulary(source: Source) -> Vocabulary:
    """That of the float model.

    Raises:
        CheckpointError: naming a matrix that is not finite.
    """
    embedding = head = source.tensor(f"{EMBEDDING}.weight").float()
    check_finite(embedding, f"{EMBEDDING}.weight")
    if not source.shape.tie_word_embeddings:
        head = source.tensor(f"{HEAD}.weight").float()
        check_finite(head, f"{HEAD}.weight")
    return Vocabulary(embedding, source.tensor(NORM).float(), head)


def served_vocabulary(
    add: Add, source: Source, scheme: Scheme, residual: Orthogonal | None
) -> Vocabulary:
    """Fold, quantize and write it; returns it as it will be served.

    A tied matrix stays one matrix: the server rotates after the look-up and back before
    the head, which here are folded into the two tables that are returned.
    """
    norm = source.tensor(NORM)
    embedding = source.tensor(f"{EMBEDDING}.weight")
    stored_norm = norm if residual is None else torch.ones_like(norm)
    add(NORM, stored_norm)
    if source.shape.tie_word_embeddings:
        table = head = _store(add, EMBEDDING, embedding, embedding.dtype, scheme)
        if residual is not None:
            add(HEAD_SCALE, norm.float())
            table = fold_embedding(table, residual).float()
            head = fold_head(head, norm, residual).float()
        return Vocabulary(table, stored_norm.float(), head)
    folded = fold_embedding(embedding, residual)
    table = _store(add, EMBEDDING, folded, embedding.dtype, scheme)
    weight = source.tensor(f"{HEAD}.weight")
    folded = weight if residual is None else fold_head(weight, norm, residual)
    head = _store(add, HEAD, folded, weight.dtype, scheme)
    return Vocabulary(table, stored_norm.float(), head)


def _store(
    add: Add, name: str, weight: torch.Tensor, dtype: torch.dtype, scheme: Scheme
) -> torch.Tensor:
    if scheme.vocab_bits == 8:
        quantized = round_to_nearest(weight, VOCABULARY)
        quantized.write(add, name)
        return quantized.decoded()
    stored = weight.to(dtype)
    add(f"{name}.weight", stored)
    return stored.float()
