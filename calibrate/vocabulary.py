# SPDX-License-Identifier: Apache-2.0
"""Embedding, final norm and head: folded, quantized and written."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch.nn import functional

from ..load_time import check_finite
from ..lowbit_checkpoint import HEAD_SCALE, VOCABULARY
from ..schema import Scheme
from .elementwise import embedding_scale, soft_capped
from .quantize import Add, QuantizedMatrix, round_to_nearest
from .scratch import Scratch
from .source import Source
from .transforms import Orthogonal, fold_embedding, fold_head, gain, norm_weight

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
        scale: rows of the embedding are multiplied by it.
        logits_cap: soft cap of the logits, None for none.
    """

    embedding: torch.Tensor
    norm: torch.Tensor
    head: torch.Tensor
    scale: float = 1.0
    logits_cap: float | None = None

    def look_up(self, ids: torch.Tensor) -> torch.Tensor:
        """Hidden states ``[..., hidden]`` of token ids ``[...]``."""
        rows = functional.embedding(ids, self.embedding)
        return rows if self.scale == 1 else rows * self.scale

    def logits(self, normed: torch.Tensor) -> torch.Tensor:
        """``[..., vocab]`` of what the final norm returned."""
        return soft_capped(functional.linear(normed, self.head), self.logits_cap)

    def to(self, device: str) -> "Vocabulary":
        """It on a device."""
        return replace(
            self,
            embedding=self.embedding.to(device),
            norm=self.norm.to(device),
            head=self.head.to(device),
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
    norm = source.tensor(NORM).float()
    return _vocabulary(source, embedding, norm, head)


def _vocabulary(
    source: Source, embedding: torch.Tensor, norm: torch.Tensor, head: torch.Tensor
) -> Vocabulary:
    """Of float32 tensors, as a server in the dtype of the base model has it."""
    shape, dtype = source.shape, source.tensor(NORM).dtype
    scale = embedding_scale(shape, dtype)
    return Vocabulary(embedding, norm, head, scale, shape.logits_cap)


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
    norm, shape = source.tensor(NORM), source.shape
    embedding = source.tensor(f"{EMBEDDING}.weight")
    own = gain(norm.float(), shape)
    stored_norm = norm
    if residual is not None:
        stored_norm = norm_weight(torch.ones_like(norm), shape)
    add(NORM, stored_norm)

    def into_embedding(rows: torch.Tensor) -> torch.Tensor:
        return fold_embedding(rows, residual)

    def into_head(rows: torch.Tensor) -> torch.Tensor:
        return rows if residual is None else fold_head(rows, own, residual)

    if source.shape.tie_word_embeddings:
        table = head = _store(add, EMBEDDING, embedding, None, scheme, scratch)
        if residual is not None:
            add(HEAD_SCALE, own)
            table = _as_float(head, scratch, into_embedding)
            head = _as_float(head, scratch, into_head)
        return _vocabulary(source, table, stored_norm.float(), head)
    table = _store(add, EMBEDDING, embedding, into_embedding, scheme, scratch)
    weight = source.tensor(f"{HEAD}.weight")
    head = _store(add, HEAD, weight, into_head, scheme, scratch)
    return _vocabulary(source, table, stored_norm.float(), head)


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
