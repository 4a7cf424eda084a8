# SPDX-License-Identifier: Apache-2.0
"""vLLM's config of a small model, and configs of its checkpoints."""

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from vllm_lowbit.schema import LowbitConfig, Scheme, scheme_from_name

from .tensors import HIDDEN, INTERMEDIATE, VOCAB

SIZES = {
    "hidden_size": HIDDEN,
    "intermediate_size": INTERMEDIATE,
    "head_dim": 64,
    "vocab_size": VOCAB,
    "num_hidden_layers": 1,
}


@pytest.fixture(scope="module")
def engine(tmp_path_factory: Any, tiny_model: Any, engine_config: Any) -> Iterator[Any]:
    """vLLM's config of a small tied model, set as the current one."""
    from vllm.config import set_current_vllm_config

    directory = tiny_model(
        tmp_path_factory.mktemp("layers"), tie_word_embeddings=True, **SIZES
    )
    config = engine_config(directory, dtype="float32")
    with set_current_vllm_config(config):
        yield config


@pytest.fixture
def quant(engine: Any) -> Any:
    """``quant(scheme, vocab_bits, **rotations)``: config of a checkpoint."""
    from vllm_lowbit.config import LowbitQuantizationConfig

    def build(scheme: str | Scheme, vocab_bits: int = 16, **rotations: Any) -> Any:
        if isinstance(scheme, str):
            scheme = scheme_from_name(scheme, vocab_bits=vocab_bits)
        data = {"scheme": scheme.model_dump(), "rotations": rotations}
        config = LowbitQuantizationConfig(stored=LowbitConfig.parse(data, "test"))
        config._resolved, config._checked_engine = config.stored, True
        config._verification = SimpleNamespace(finish=lambda: None)
        return config

    return build
