# SPDX-License-Identifier: Apache-2.0
"""``vllm bench latency`` and ``vllm bench throughput`` as a user types them.

``serve.py`` runs the same workloads step by step; these are the check that its figures
are those of vLLM's own tools. Sampling is random here, as the tools have it.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from .arms import ARMS, as_flags, engine_arguments
from .options import Options

KINDS = ("latency", "throughput")
PROMPTS = 8
WORDS = {
    "latency": [
        *("--input-len", "128", "--output-len", "128", "--batch-size", "1"),
        *("--num-iters-warmup", "1", "--num-iters", "2", "--disable-detokenize"),
        "--skip-tokenizer-init",
    ],
    "throughput": [
        *("--dataset-name", "random", "--num-prompts", str(PROMPTS)),
        *("--random-input-len", "128", "--random-output-len", "128"),
        *("--random-range-ratio", "0.0", "--disable-detokenize"),
    ],
}


def measure(kind: str, name: str, options: Options) -> dict[str, Any]:
    """Run one command.

    Args:
        kind: one of KINDS.
        name: of the arm.
        options: of this run.
    """
    arm = ARMS[name]
    vllm = Path(sys.executable).parent / "vllm"
    arguments = engine_arguments() | arm.quantization()
    words = ["bench", kind, "--model", str(arm.checkpoint(options)), *WORDS[kind]]
    words += as_flags(arguments)
    with tempfile.TemporaryDirectory() as directory:
        output = Path(directory) / "result.json"
        command = [str(vllm), *words, "--output-json", str(output)]
        subprocess.run(command, check=True)
        found = json.loads(output.read_text())
    result: dict[str, Any] = {"command": _shown(words, options)}
    if kind == "latency":
        seconds = sorted(found["latencies"])
        return result | {"seconds": seconds}
    return result | {
        "seconds": found["elapsed_time"],
        "requests_per_s": found["requests_per_second"],
        "tokens_per_s": found["tokens_per_second"],
    }


def _shown(words: list[str], options: Options) -> str:
    """The command without the folder it ran in."""
    quoted = (f"'{word}'" if "{" in word else word for word in words)
    return " ".join(("vllm", *quoted)).replace(f"{options.cache}/", "")
