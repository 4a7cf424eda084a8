# SPDX-License-Identifier: Apache-2.0
"""What the weights of each arm take in a served process, and how long loading takes.

The worker's anonymous memory after a request, less that of a worker with a model of
next to no weights and the same KV pool. Parameters and buffers alone would leave out
what stock vLLM holds inside oneDNN. Eager, so that no compiler's memory is in it.
"""

import time
from pathlib import Path
from typing import Any

from .arms import ARMS, LOWBIT, OURS_W4A16, STOCK, engine_arguments
from .checkpoints import tiny_checkpoint
from .options import Options

NAME = "memory"
BASELINE = "baseline"
KV_BYTES = 128 << 20


def cells(options: Options) -> list[str]:
    """The baseline and every arm whose weights differ."""
    return [BASELINE, *(name for name in (*STOCK, *LOWBIT) if name != OURS_W4A16)]


def measure(cell: str, options: Options) -> dict[str, Any]:
    """Bytes in the worker, and seconds of loading."""
    from vllm import LLM, SamplingParams

    arm = ARMS.get(cell)
    model = tiny_checkpoint(options) if arm is None else arm.checkpoint(options)
    quantization = {} if arm is None else arm.quantization()
    started = time.perf_counter()
    llm = LLM(
        str(model),
        skip_tokenizer_init=True,
        enforce_eager=True,
        worker_extension_cls="benchmarks.cpu.probe.Probe",
        **engine_arguments() | {"kv_cache_memory_bytes": KV_BYTES},
        **quantization,
    )
    start_seconds = time.perf_counter() - started
    parameters = SamplingParams(max_tokens=2, ignore_eos=True, detokenize=False)
    prompt = {"prompt_token_ids": list(range(2, 66))}
    llm.generate([prompt], parameters, use_tqdm=False)
    (measured,) = llm.collective_rpc("benchmark_memory")
    result = measured | {"start_seconds": round(start_seconds, 1)}
    if arm is not None:
        result["weight_bytes"] = arm.weight_bytes(options.model)
        result["checkpoint_bytes"] = _tensor_bytes(model)
    return result


def _tensor_bytes(directory: Path) -> int:
    return sum(path.stat().st_size for path in directory.glob("*.safetensors"))
