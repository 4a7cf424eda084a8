# SPDX-License-Identifier: Apache-2.0
"""The 16-bit vocabulary: embedding and head, checked and batch-independent."""

from typing import Any

import torch
from vllm.model_executor.layers.vocab_parallel_embedding import (
    UnquantizedEmbeddingMethod,
)

from .kernels.linear_tiled.generic import linear_tiled
from .load_time import check_finite


class EmbeddingMethod(UnquantizedEmbeddingMethod):
    """vLLM's embedding, with two differences.

    The head's logits do not depend on the batch, and no second, repacked copy of the
    matrix is kept.
    """

    def __init__(self, prefix: str) -> None:
        self.prefix = prefix

    def process_weights_after_loading(self, layer: Any) -> None:
        """Raise CheckpointError for a non-finite weight."""
        check_finite(layer.weight.data, f"{self.prefix}.weight")

    def apply(
        self,
        layer: Any,
        x: torch.Tensor,
        bias: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Logits ``[tokens, vocabulary]`` of ``x [tokens, hidden]``."""
        return linear_tiled(x, layer.weight, bias)
