# SPDX-License-Identifier: Apache-2.0
"""A vLLM worker extension that records what the served kernels see and compute.

Loaded by the test server through ``--worker-extension-cls probe.Probe``; called over
``/collective_rpc``. The kernels are opaque ops even in a compiled graph, so wrapping
the functions they call shows the values of the real model.
"""

from collections.abc import Callable
from typing import Any

import torch
from safetensors.torch import save_file


class Probe:
    """Mixed into the worker: ``self`` is vLLM's worker."""

    def lowbit_record(self) -> None:
        """Start recording every integer linear and every KV store."""
        from vllm_lowbit.kernels.hadamard_quantize import reference as quantize
        from vllm_lowbit.kernels.kv4_store import generic as store
        from vllm_lowbit.kernels.linear_w4a4 import generic as linear

        self.seen: dict[str, list[Any]] = {"input": [], "linear": [], "kv": []}
        self.undo = [
            _wrap(quantize, "transform", lambda x, *_, out: self._keep("input", x)),
            _wrap(
                linear,
                "accumulators",
                lambda codes, zero, *_, out: self._keep("linear", codes, zero, out),
            ),
            _wrap(store, "encode_heads", lambda x, *_, out, **__: self._keep("kv", x)),
        ]

    def _keep(self, kind: str, *tensors: torch.Tensor) -> None:
        self.seen[kind].append([t.detach().clone() for t in tensors])

    def lowbit_save(self, path: str) -> None:
        """Stop recording; write what was seen, and layer 0's pages, to safetensors."""
        for undo in self.undo:
            undo()
        attention = self.model_runner.model.model.layers[0].self_attn.attn  # type: ignore[attr-defined]
        tensors = {"pages": attention.kv_cache.contiguous()}
        for kind, calls in self.seen.items():
            for i, values in enumerate(calls):
                for j, value in enumerate(values):
                    tensors[f"{kind}.{i}.{j}"] = value.contiguous()
        save_file(tensors, path)


def _wrap(module: Any, name: str, observe: Callable[..., None]) -> Callable[[], None]:
    original = getattr(module, name)

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        out = original(*args, **kwargs)
        observe(*args, **kwargs, out=out)
        return out

    setattr(module, name, wrapped)
    return lambda: setattr(module, name, original)
