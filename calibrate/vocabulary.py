# SPDX-License-Identifier: Apache-2.0
"""Embedding, learned positions, final norm and head: folded, quantized, written."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch.nn import functional

from ..architecture import POSITIONS
from ..load_time import check_finite
from ..lowbit_checkpoint import HEAD_SCALE, VOCABULARY
from ..schema import Scheme
from .elementwise import embedding_scale, soft_capped
from .quantize import Add, QuantizedMatrix, round_to_nearest
from .rotations import Orthogonal
from .scratch import Scratch
from .source import Source
from .transforms import fold_embedding, fold_head, folded_norm, gain

EMBEDDING, NORM, HEAD = "model.embed_tokens", "model.norm.weight", "lm_head"
NORM_BIAS = "model.norm.bias"
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
        norm_bias: of the final norm, ``[hidden]``, None for none.
        positions: added to the rows, ``[positions, hidden]``; None for none.
    """

    embedding: torch.Tensor
    norm: torch.Tensor
    head: torch.Tensor
    scale: float = 1.0
    logits_cap: float | None = None
    norm_bias: torch.Tensor | None = None
    positions: torch.Tensor | None = None

    @property
    def final_norm(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Weight and bias of the final norm."""
        return self.norm, self.norm_bias

    def look_up(self, ids: torch.Tensor) -> torch.Tensor:
        """Hidden states ``[..., tokens, hidden]`` of token ids ``[..., tokens]``."""
        rows = functional.embedding(ids, self.embedding)
        rows = rows if self.scale == 1 else rows * self.scale
        return (
            rows if self.positions is None else rows + self.positions[: ids.shape[-1]]
        )

    def logits(self, normed: torch.Tensor) -> torch.Tensor:
        """``[..., vocab]`` of what the final norm returned."""
        return soft_capped(functional.linear(normed, self.head), self.logits_cap)

    def to(self, device: str) -> "Vocabulary":
        """It on a device."""
        bias, positions = (
            None if tensor is None else tensor.to(device)
            for tensor in (self.norm_bias, self.positions)
        )
        return replace(
            self,
            embedding=self.embedding.to(device),
            norm=self.norm.to(device),
            head=self.head.to(device),
            norm_bias=bias,
            positions=positions,
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
    norm = source.tensor(NORM), _norm_bias(source)
    return _vocabulary(source, embedding, norm, head, _positions(source))


def _norm_bias(source: Source) -> torch.Tensor | None:
    return source.tensor(NORM_BIAS) if source.shape.architecture.layer_norm else None


def _positions(source: Source) -> torch.Tensor | None:
    return source.tensor(POSITIONS) if source.shape.positions else None


def _vocabulary(
    source: Source,
    embedding: torch.Tensor,
    norm: tuple[torch.Tensor, torch.Tensor | None],
    head: torch.Tensor,
    positions: torch.Tensor | None,
) -> Vocabulary:
    """As a server in the dtype of the base model has it; matrices are float32."""
    shape, (weight, bias) = source.shape, norm
    first = shape.architecture.position_rows
    return Vocabulary(
        embedding,
        weight.float(),
        head,
        embedding_scale(shape, weight.dtype),
        shape.logits_cap,
        None if bias is None else bias.float(),
        None if positions is None else positions[first:].float(),
    )


def served_vocabulary(
    add: Add,
    source: Source,
    scheme: Scheme,
    residual: Orthogonal | None,
    scratch: Scratch,
) -> Vocabulary:
    """Fold, quantize and write it; returns it as it will be served.

    A tied matrix stays one matrix: the server rotates after the look-up and back before
    the head, which here are folded into the two tables that are returned. With
    LayerNorms it becomes two (see :func:`.plan.served_shape`).
    """
    shape, norm, bias = source.shape, source.tensor(NORM), _norm_bias(source)
    embedding, positions = source.tensor(f"{EMBEDDING}.weight"), _positions(source)
    own, stored = gain(norm.float(), shape), (norm, bias)
    if residual is not None:
        stored = folded_norm(norm, shape)
        if positions is not None:
            positions = fold_embedding(positions, residual).to(positions.dtype)
    for name, tensor in (
        (NORM, stored[0]),
        (NORM_BIAS, stored[1]),
        (POSITIONS, positions),
    ):
        if tensor is not None:
            add(name, tensor)

    def into_embedding(rows: torch.Tensor) -> torch.Tensor:
        return fold_embedding(rows, residual)

    def into_head(rows: torch.Tensor) -> torch.Tensor:
        return rows if residual is None else fold_head(rows, own, bias, residual)

    tied = shape.tie_word_embeddings
    if tied and (residual is None or not shape.architecture.layer_norm):
        table = head = _store(add, EMBEDDING, embedding, None, scheme, scratch)
        if residual is not None:
            add(HEAD_SCALE, own)
            table = _as_float(head, scratch, into_embedding)
            head = _as_float(head, scratch, into_head)
        return _vocabulary(source, table, stored, head, positions)
    table = _store(add, EMBEDDING, embedding, into_embedding, scheme, scratch)
    weight = embedding if tied else source.tensor(f"{HEAD}.weight")
    head = _store(add, HEAD, weight, into_head, scheme, scratch)
    return _vocabulary(source, table, stored, head, positions)


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
