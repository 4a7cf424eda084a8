# SPDX-License-Identifier: Apache-2.0
"""vLLM's own engine inside this process, for as long as a block runs.

The only module of this package that needs vLLM, and only when it is used.
"""

import gc
import logging
import math
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from pydantic import ValidationError

from ..errors import LowbitError, UnsupportedError
from .perplexity import Scored, batches

# Of the longest length; shorter ones share their cache.
WINDOWS_AT_ONCE = 4
SEQUENCES_AT_ONCE = 16
# Float32 logits of so many tokens are in memory at once.
MAX_BATCHED_TOKENS = 2048
MIN_CACHE_BYTES = 64 << 20
# Caches are handed out in blocks of at most this many tokens.
BLOCK_TOKENS = 256


@contextmanager
def offline_engine(
    model: str, seq_len: int, token_bytes: int, verbose: bool, **arguments: Any
) -> Iterator[Any]:
    """A ``vllm.LLM`` that scores windows; nothing of it is left afterwards.

    Args:
        model: local directory.
        seq_len: tokens of the longest window, at most what the model supports.
        token_bytes: of KV cache that one token takes, at most.
        verbose: whether vLLM logs as usual, instead of errors only.
        arguments: others of ``vllm.LLM``.

    Raises:
        LowbitError: when the engine does not start, with its reason.
    """
    cache = WINDOWS_AT_ONCE * (seq_len + BLOCK_TOKENS) * token_bytes
    settings = {
        "model": model,
        # One more than is scored: vLLM insists on generating a token.
        "max_model_len": seq_len + 1,
        "max_num_seqs": SEQUENCES_AT_ONCE,
        "max_num_batched_tokens": MAX_BATCHED_TOKENS,
        "kv_cache_memory_bytes": max(cache, MIN_CACHE_BYTES),
        "enable_prefix_caching": False,
        "enforce_eager": True,
        "skip_tokenizer_init": True,
        "use_tqdm_on_load": False,
    }
    with _environment(verbose):
        from vllm import LLM

        # The CPU worker replaces torch.set_num_threads by one that does nothing.
        set_num_threads, threads = torch.set_num_threads, torch.get_num_threads()
        llm = None
        try:
            llm = _start(LLM, {**settings, **arguments})
            yield llm
        finally:
            release(llm)
            torch.set_num_threads = set_num_threads
            torch.set_num_threads(threads)


def prompt_losses(llm: Any, sequences: Iterable[Scored]) -> Iterator[float]:
    """Negative log-likelihood of each sequence's scored tokens, in nats.

    Args:
        llm: an engine of :func:`offline_engine`.
        sequences: what is scored.
    """
    from vllm import SamplingParams

    parameters = SamplingParams(
        max_tokens=1, temperature=0, prompt_logprobs=0, detokenize=False
    )
    for part in batches(sequences, MAX_BATCHED_TOKENS):
        prompts = [{"prompt_token_ids": scored.token_ids.tolist()} for scored in part]
        outputs = llm.generate(prompts, parameters, use_tqdm=False)
        for scored, output in zip(part, outputs, strict=True):
            yield -math.fsum(
                entry[token].logprob
                for token, entry in zip(
                    output.prompt_token_ids[scored.start :],
                    output.prompt_logprobs[scored.start :],
                    strict=True,
                )
            )


def _start(engine: Callable[..., Any], settings: Mapping[str, Any]) -> Any:
    try:
        return engine(**settings)
    except LowbitError:
        raise
    except ValidationError as error:
        messages = (problem["msg"] for problem in error.errors())
        reason = "; ".join(m.removeprefix("Value error, ") for m in messages)
    except (ValueError, RuntimeError, OSError) as error:
        reason = str(error)
    raise UnsupportedError(f"vLLM did not start on {settings['model']}: {reason}")


@contextmanager
def _environment(verbose: bool) -> Iterator[None]:
    """vLLM's settings that are environment variables, and its logging."""
    settings = {
        # An engine in a process of its own would hide why it did not start.
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        # The one token more may lie beyond what the model supports: it is not fed back.
        "VLLM_ALLOW_LONG_MAX_MODEL_LEN": "1",
    }
    if not verbose:
        settings["VLLM_LOGGING_LEVEL"] = "ERROR"
        # For what is logged before vLLM reads that.
        logging.getLogger("vllm").setLevel(logging.ERROR)
    before = {name: os.environ.get(name) for name in settings}
    os.environ.update(settings)
    try:
        with warnings.catch_warnings():
            if not verbose:
                warnings.simplefilter("ignore")
            yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def release(llm: Any) -> None:
    """Shut the engine down and free what it holds, also when it did not start."""
    from vllm.distributed import cleanup_dist_env_and_memory

    if llm is not None:
        llm.llm_engine.engine_core.shutdown()
        # Others may still hold the object: it must hold nothing.
        vars(llm).clear()
    gc.collect()
    cleanup_dist_env_and_memory()
