# SPDX-License-Identifier: Apache-2.0
"""Eager mode: token ids depend on the prompt alone, not on how it is scheduled."""

from typing import Any

import pytest

pytestmark = pytest.mark.live

TOKENS = 40
# 40 to 180 tokens each with a shared start, so that prefixes are worth caching.
REPEATS = (4, 9, 2, 12, 6, 3, 10, 7)


@pytest.fixture(scope="module")
def texts(prompts: list[str]) -> list[str]:
    shared = " ".join(prompts[:8])
    return [
        f"{shared} {' '.join(prompts[8 : 8 + n])} {prompts[i]}"
        for i, n in enumerate(REPEATS)
    ]


def _run(llm: Any, texts: list[str], batch: int) -> tuple[list[list[int]], int]:
    """Greedy tokens of each text, ``batch`` at a time, and cached prompt tokens."""
    from vllm import SamplingParams

    parameters = SamplingParams(max_tokens=TOKENS, temperature=0, ignore_eos=True)
    tokens, cached = [], 0
    for first in range(0, len(texts), batch):
        part = texts[first : first + batch]
        for output in llm.generate(part, parameters, use_tqdm=False):
            tokens.append(list(output.outputs[0].token_ids))
            cached += output.num_cached_tokens or 0
    return tokens, cached


@pytest.fixture(scope="module", params=["bfloat16", "float32"])
def dtype(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def plain(engine: Any, texts: list[str], dtype: str) -> list[list[int]]:
    """One request at a time, whole prompts, no prefix cache."""
    with engine(dtype=dtype, enable_prefix_caching=False) as llm:
        tokens, cached = _run(llm, texts, 1)
    assert cached == 0
    return tokens


def test_batch_and_prefix_cache(
    engine: Any, texts: list[str], dtype: str, plain: list[list[int]]
) -> None:
    with engine(dtype=dtype, enable_prefix_caching=True, block_size=32) as llm:
        assert _run(llm, texts, 8)[0] == plain
        again, cached = _run(llm, texts, 8)
        assert again == plain
        assert cached > 8 * 32
        shuffled, cached = _run(llm, texts[::-1], 3)
        assert shuffled[::-1] == plain
        assert cached > 8 * 32


@pytest.mark.parametrize("chunk", [1, 17, 64])
def test_chunked_prefill(
    engine: Any, texts: list[str], dtype: str, plain: list[list[int]], chunk: int
) -> None:
    seqs = min(chunk, 8)
    with engine(
        dtype=dtype,
        max_num_batched_tokens=chunk,
        max_num_seqs=seqs,
        enable_prefix_caching=False,
        enable_chunked_prefill=True,
    ) as llm:
        part = slice(2, 3) if chunk == 1 else slice(None)
        assert _run(llm, texts[part], seqs)[0] == plain[part]


def test_preemption(
    engine: Any, texts: list[str], dtype: str, plain: list[list[int]]
) -> None:
    """So few pages that running requests are thrown out and recomputed."""
    with engine(
        dtype=dtype,
        max_model_len=320,
        block_size=32,
        num_gpu_blocks_override=20,
        enable_prefix_caching=False,
    ) as llm:
        scheduler = llm.llm_engine.engine_core.engine_core.scheduler
        preempted: list[str] = []
        preempt = scheduler._preempt_request

        def count(request: Any, *arguments: Any, **options: Any) -> None:
            preempted.append(request.request_id)
            preempt(request, *arguments, **options)

        scheduler._preempt_request = count
        assert _run(llm, texts, 8)[0] == plain
        assert preempted


def test_ngram_speculation(
    engine: Any, texts: list[str], dtype: str, plain: list[list[int]]
) -> None:
    with engine(
        multiprocessing=True,
        dtype=dtype,
        speculative_config={
            "method": "ngram",
            "num_speculative_tokens": 3,
            "prompt_lookup_max": 3,
        },
    ) as llm:
        assert _run(llm, texts, 4)[0] == plain
