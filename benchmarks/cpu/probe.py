# SPDX-License-Identifier: Apache-2.0
"""Runs inside vLLM's worker: the time of loading and the memory of what was loaded."""

import ctypes
import time
from pathlib import Path
from typing import Any

from vllm.model_executor.model_loader.base_loader import BaseModelLoader

_seconds: list[float] = []
_load_model = BaseModelLoader.load_model


def _timed(*arguments: Any, **named: Any) -> Any:
    started = time.perf_counter()
    model = _load_model(*arguments, **named)
    _seconds.append(time.perf_counter() - started)
    return model


# vLLM imports this module in the worker before it loads the model.
BaseModelLoader.load_model = _timed


class Probe:
    """A worker extension: ``collective_rpc`` finds its methods."""

    model_runner: Any

    def benchmark_memory(self) -> dict[str, Any]:
        """Bytes of parameters and buffers, anonymous memory, seconds of loading."""
        storages = {}
        model = self.model_runner.get_model()
        for tensor in (*model.parameters(), *model.buffers()):
            storage = tensor.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
        held = _anonymous_bytes()
        # What the allocator keeps of memory that was freed is not the weights'.
        ctypes.CDLL(None).malloc_trim(0)
        return {
            "load_seconds": _seconds[-1],
            "tensor_bytes": sum(storages.values()),
            "anonymous_bytes": held,
            "trimmed_bytes": _anonymous_bytes(),
        }


def _anonymous_bytes() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("/proc/self/status has no RssAnon")
