# SPDX-License-Identifier: Apache-2.0
"""Peak anonymous memory of starting a server that quantizes while loading.

    python -m benchmarks.memory

A random two-shard Llama of 0.55B parameters is served with the flag alone. Anonymous
memory is summed over the process tree, every 20 ms from launch until it answers; that
of the same server with a tiny model, KV pool of the same size included, is subtracted:
what remains is the model's. Writes results/memory.json and results/memory.md.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from .environment import as_line, describe

RESULTS = Path(__file__).parent / "results"
KV_BYTES = 128 << 20
LARGE = {
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 8,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "vocab_size": 16384,
}
TINY = {**LARGE, "hidden_size": 128, "intermediate_size": 256, "vocab_size": 256}
MIB = 1 << 20


@dataclass(frozen=True)
class Run:
    """Peak anonymous bytes of a start, and its seconds."""

    peak: int
    seconds: float


def write_model(directory: Path, sizes: dict[str, int], shards: int) -> int:
    """Write a random bf16 checkpoint; returns its number of parameters."""
    import torch
    from safetensors.torch import save_file
    from transformers import LlamaConfig

    from vllm_lowbit.architecture import ModelShape

    config = LlamaConfig(
        architectures=["LlamaForCausalLM"],
        dtype="bfloat16",
        max_position_embeddings=512,
        tie_word_embeddings=False,
        **sizes,
    )
    config.save_pretrained(directory)
    shapes = ModelShape.from_config(config.to_dict(), "config").tensors()
    names = sorted(shapes)
    generator = torch.Generator().manual_seed(0)
    weight_map = {}
    for shard in range(shards):
        file = f"model-{shard + 1:05}-of-{shards:05}.safetensors"
        part = names[shard * len(names) // shards : (shard + 1) * len(names) // shards]
        tensors = {
            name: torch.randn(shapes[name], generator=generator).bfloat16()
            for name in part
        }
        save_file(tensors, directory / file)
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    return sum(_numel(shape) for shape in shapes.values())


def measure(model: Path) -> Run:
    """Start an engine in a process of its own; it generates one token and ends."""
    script = (
        "from vllm import LLM, SamplingParams\n"
        "if __name__ == '__main__':\n"
        f"    llm = LLM({str(model)!r}, quantization='lowbit', enforce_eager=True,\n"
        f"        skip_tokenizer_init=True, max_model_len=256,\n"
        f"        kv_cache_memory_bytes={KV_BYTES})\n"
        "    llm.generate([{'prompt_token_ids': [1, 2]}],\n"
        "        SamplingParams(max_tokens=1, detokenize=False))\n"
    )
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "start.py"
        path.write_text(script)
        started = time.monotonic()
        process = subprocess.Popen([sys.executable, str(path)])
        watch = _Watch(process.pid)
        code = process.wait()
        seconds = time.monotonic() - started
        peak = watch.stop()
    if code:
        raise RuntimeError(f"the engine ended with exit code {code}")
    return Run(peak, seconds)


class _Watch(threading.Thread):
    """Samples a process tree until stopped."""

    def __init__(self, pid: int) -> None:
        super().__init__(daemon=True)
        self.root, self.peak, self.done = psutil.Process(pid), 0, threading.Event()
        self.start()

    def run(self) -> None:
        while not self.done.wait(0.02):
            self.peak = max(self.peak, _anonymous(self.root))

    def stop(self) -> int:
        self.done.set()
        self.join()
        return self.peak


def _anonymous(root: psutil.Process) -> int:
    total = 0
    try:
        tree = [root, *root.children(recursive=True)]
    except psutil.NoSuchProcess:
        return 0
    for process in tree:
        try:
            status = Path(f"/proc/{process.pid}/status").read_text()
        except OSError:
            continue
        for line in status.splitlines():
            if line.startswith("RssAnon"):
                total += int(line.split()[1]) * 1024
    return total


def quantized_bytes(sizes: dict[str, int]) -> int:
    """Bytes the server holds: a byte per linear weight (the portable backend keeps
    4-bit codes in int8), float32 scales, 16-bit vocabulary and norms."""
    from vllm_lowbit.architecture import ModelShape

    config = {"architectures": ["LlamaForCausalLM"], **sizes}
    total = 0
    for name, shape in ModelShape.from_config(config, "config").tensors().items():
        linear = "_proj" in name
        total += _numel(shape) if linear else 2 * _numel(shape)
        total += 4 * sum(shape) if linear else 0
    return total


def two_largest_layers(sizes: dict[str, int]) -> int:
    """bf16 bytes of the two largest linears as vLLM fuses them."""
    return 2 * 2 * (2 * sizes["intermediate_size"] * sizes["hidden_size"])


def _numel(shape: tuple[int, ...]) -> int:
    size = 1
    for extent in shape:
        size *= extent
    return size


def run() -> dict[str, Any]:
    """Measure both models; every figure in bytes unless named otherwise."""
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "0-1")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    with tempfile.TemporaryDirectory() as directory:
        tiny, large = Path(directory) / "tiny", Path(directory) / "large"
        write_model(tiny, TINY, 1)
        parameters = write_model(large, LARGE, 2)
        baseline, loaded = measure(tiny), measure(large)
    return {
        "parameters": parameters,
        "peak": loaded.peak,
        "baseline_peak": baseline.peak,
        "model_peak": loaded.peak - baseline.peak,
        "quantized_model": quantized_bytes(LARGE) - quantized_bytes(TINY),
        "two_largest_layers": two_largest_layers(LARGE),
        "bf16_model": 2 * parameters,
        "start_seconds": loaded.seconds,
        "baseline_start_seconds": baseline.seconds,
    }


def main() -> None:
    argparse.ArgumentParser(description=__doc__).parse_args()
    result, environment = run(), describe()
    allowed = result["quantized_model"] + result["two_largest_layers"]
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "memory.json").write_text(
        json.dumps({"environment": environment, **result}, indent=2) + "\n"
    )
    rows = [
        ("peak of the process tree, tiny model subtracted", result["model_peak"]),
        ("allowed: quantized model + two largest layers in bf16", allowed),
        ("quantized model", result["quantized_model"]),
        ("bf16 model", result["bf16_model"]),
        ("peak of the process tree", result["peak"]),
        ("the same with the tiny model", result["baseline_peak"]),
    ]
    lines = [
        "# Peak memory of quantizing while loading",
        "",
        f"{result['parameters'] / 1e9:.2f}B random parameters in two shards, w4a4kv4,",
        "anonymous memory. From launch to the first token",
        f"{result['start_seconds']:.0f} s, the tiny model",
        f"{result['baseline_start_seconds']:.0f} s.",
        "",
        f"`python -m benchmarks.memory`: {as_line(environment)}",
        "",
        "| | MiB |",
        "|---|---|",
        *(f"| {name} | {size / MIB:.0f} |" for name, size in rows),
    ]
    (RESULTS / "memory.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
