# SPDX-License-Identifier: Apache-2.0
"""What verifying every checksum adds to the time a lowbit checkpoint takes to load.

    python -m benchmarks.loading

A random checkpoint of 0.55B parameters is loaded by vLLM's own loader, alternately with
and without the verification that runs beside it, each time in a new process and from
the page cache. Writes results/loading.json and results/loading.md.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from .environment import as_line, describe
from .memory import KV_BYTES, LARGE

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results"
SCHEME = "w4a4kv4"
ARMS = ("verified", "not verified")
WITHOUT = """
import vllm_lowbit.config
class Nothing:
    def __init__(self, *arguments): pass
    def finish(self): pass
vllm_lowbit.config.Verification = Nothing
"""
LOAD = """
import json, time
from vllm import LLM
from vllm.model_executor.model_loader.base_loader import BaseModelLoader
load, seconds = BaseModelLoader.load_model, []
def timed(*arguments, **named):
    started = time.perf_counter()
    model = load(*arguments, **named)
    seconds.append(time.perf_counter() - started)
    return model
BaseModelLoader.load_model = timed
"""


def write_checkpoint(directory: Path) -> int:
    """Write a random lowbit checkpoint; returns the bytes of its tensors."""
    import torch
    from transformers import LlamaConfig

    from vllm_lowbit.architecture import ModelShape
    from vllm_lowbit.calibrate.writer import CheckpointWriter
    from vllm_lowbit.checkpoint import TensorSpec
    from vllm_lowbit.kernels.packing import pack
    from vllm_lowbit.lowbit_checkpoint import expected_tensors
    from vllm_lowbit.schema import LowbitConfig, Rotations, scheme_from_name

    model = LlamaConfig(
        architectures=["LlamaForCausalLM"],
        dtype="bfloat16",
        max_position_embeddings=512,
        tie_word_embeddings=False,
        **LARGE,
    ).to_dict()
    config = LowbitConfig(scheme=scheme_from_name(SCHEME), rotations=Rotations())
    shape = ModelShape.from_config(model, "config")
    specs = {
        name: TensorSpec(spec.dtypes[:1], spec.shape)
        for name, spec in expected_tensors(shape, config).items()
    }
    generator = torch.Generator().manual_seed(0)
    with CheckpointWriter(directory, specs) as writer:
        for name, spec in specs.items():
            if spec.dtypes == ("I32",):
                codes = (spec.shape[0], spec.shape[1] * 8)
                tensor = pack(torch.randint(-7, 8, codes, generator=generator), 4)
            else:
                tensor = torch.rand(spec.shape, generator=generator) + 0.5
                tensor = tensor if spec.dtypes == ("F32",) else tensor.bfloat16()
            writer.add(name, tensor)
        size = writer.tensor_bytes
        writer.commit(model | {"quantization_config": config.model_dump(mode="json")})
    return size


def measure(model: Path, arm: str) -> float:
    """Seconds of one load in a process of its own."""
    start = (
        f"llm = LLM({str(model)!r}, enforce_eager=True, skip_tokenizer_init=True,\n"
        f"    max_model_len=256, kv_cache_memory_bytes={KV_BYTES})\n"
        "print(json.dumps(seconds))\n"
    )
    script = (WITHOUT if arm == "not verified" else "") + LOAD + start
    environment = {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_LOGGING_LEVEL": "ERROR",
    }
    done = subprocess.run(
        [sys.executable, "-c", script],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"loading failed:\n{done.stderr[-4000:]}")
    (seconds,) = json.loads(done.stdout.splitlines()[-1])
    return float(seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=5, help="of each arm")
    runs = parser.parse_args().runs
    seconds: dict[str, list[float]] = {arm: [] for arm in ARMS}
    with tempfile.TemporaryDirectory() as directory:
        model = Path(directory) / "model"
        size = write_checkpoint(model)
        measure(model, ARMS[0])  # into the page cache
        for _ in range(runs):
            for arm in ARMS:
                seconds[arm].append(round(measure(model, arm), 3))
    _write(seconds, size)


def _write(seconds: dict[str, list[float]], size: int) -> None:
    environment = describe()
    medians = {arm: statistics.median(values) for arm, values in seconds.items()}
    # Whatever else the machine did only adds time.
    added = min(seconds[ARMS[0]]) / min(seconds[ARMS[1]]) - 1
    result: dict[str, Any] = {"checkpoint_bytes": size, "seconds": seconds}
    result |= {"median": medians, "added_fraction": round(added, 4)}
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "loading.json").write_text(
        json.dumps({"environment": environment, **result}, indent=2) + "\n"
    )
    lines = [
        "# Time of loading with every checksum verified",
        "",
        f"A {SCHEME} checkpoint of 0.55B random parameters, {size / 1e6:.0f} MB, from",
        "the page cache; vLLM's load_model, alternating processes. Verification adds",
        f"{100 * added:.1f}% to the fastest load.",
        "",
        f"`python -m benchmarks.loading`: {as_line(environment)}",
        "",
        "| | lowest s | median | highest |",
        "|---|---|---|---|",
        *(
            f"| {arm} | {min(values):.2f} | {medians[arm]:.2f} | {max(values):.2f} |"
            for arm, values in seconds.items()
        ),
    ]
    (RESULTS / "loading.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
