# SPDX-License-Identifier: Apache-2.0
"""What the user chose, and the sizes of the models."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parents[1] / "results"
CACHE = Path("~/.cache/vllm-lowbit/benchmarks").expanduser()

# config.json of the Llama-3.2-1B shape; the context is what is measured, not more.
LLAMA_1B: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "dtype": "bfloat16",
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "vocab_size": 128256,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
    "bos_token_id": 0,
    "eos_token_id": 1,
}
LLAMA_8B = LLAMA_1B | {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "head_dim": 128,
    "tie_word_embeddings": False,
}
# Large enough to be a model, small enough to start in seconds.
TINY = LLAMA_1B | {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 16384,
}


@dataclass(frozen=True)
class Options:
    """How to run.

    Attributes:
        cache: folder of the checkpoints, outside of the repository.
        results: folder of cpu.json, cpu.md and the plots.
        threads: CPUs that every arm is bound to, from CPU 0 on.
        llama_bench: path of llama.cpp's llama-bench, None for none.
        full: compute every prompt and every decode step of the end-to-end workloads.
        quick: tiny sizes, to try the harness out; its figures mean nothing.
    """

    cache: Path
    results: Path
    threads: int
    llama_bench: Path | None
    full: bool
    quick: bool

    @property
    def model(self) -> dict[str, Any]:
        """config.json of the model that is served."""
        return TINY if self.quick else LLAMA_1B

    @property
    def model_name(self) -> str:
        """Folder of its checkpoints."""
        return "tiny" if self.quick else "llama-1b"

    def arguments(self) -> list[str]:
        """The same options for a process of one cell."""
        words = ["--cache", str(self.cache), "--results", str(self.results)]
        words += ["--threads", str(self.threads)]
        if self.llama_bench is not None:
            words += ["--llama-bench", str(self.llama_bench)]
        return words + ["--full"] * self.full + ["--quick"] * self.quick

    def environment(self, kernels: bool) -> dict[str, str]:
        """Environment of a cell.

        Args:
            kernels: operators run in the cell itself, on threads bound as vLLM binds
                those of its workers; else vLLM starts workers and binds theirs.
        """
        cpus = ",".join(str(cpu) for cpu in range(self.threads))
        environment = os.environ | {
            "VLLM_CPU_OMP_THREADS_BIND": f"0-{self.threads - 1}",
            "VLLM_LOGGING_LEVEL": os.environ.get("VLLM_LOGGING_LEVEL", "WARNING"),
            "HF_HUB_OFFLINE": "1",
        }
        environment.pop("OMP_NUM_THREADS", None)
        if kernels:
            environment |= {
                "OMP_NUM_THREADS": str(self.threads),
                "OMP_PLACES": f"{{{cpus}}}",
                "OMP_PROC_BIND": "true",
            }
        return environment
