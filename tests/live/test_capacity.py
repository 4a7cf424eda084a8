# SPDX-License-Identifier: Apache-2.0
"""The same memory holds the computed multiple of bf16's tokens."""

from pathlib import Path
from typing import Any

import pytest

from vllm_lowbit.kernels.kv4_store.layout import bytes_per_token

pytestmark = pytest.mark.live

BYTES = 96 << 20


@pytest.mark.parametrize("head_dim", [64, 128])
def test_capacity_grows_by_the_computed_ratio(
    engine: Any, tiny_model: Any, tmp_path: Path, head_dim: int
) -> None:
    model = str(tiny_model(tmp_path, head_dim=head_dim))
    blocks = {}
    for quantization in ("lowbit", None):
        with engine(
            model=model,
            quantization=quantization,
            kv_cache_memory_bytes=BYTES,
            dtype="bfloat16",
            max_model_len=256,
            skip_tokenizer_init=True,
        ) as llm:
            cache = llm.llm_engine.vllm_config.cache_config
            blocks[quantization] = cache.num_gpu_blocks
            assert cache.block_size == 128
    bf16_bytes = 2 * head_dim * 2
    ratio = bf16_bytes / bytes_per_token(head_dim)
    assert ratio == pytest.approx({64: 3.56, 128: 3.76}[head_dim], abs=0.005)
    # Each pool holds a whole number of blocks: at most one lost on either side.
    assert abs(blocks["lowbit"] - blocks[None] * ratio) <= ratio
