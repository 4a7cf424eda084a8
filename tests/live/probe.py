# SPDX-License-Identifier: Apache-2.0
"""A vLLM worker extension that records what the served operators get and compute.

Loaded by the test server through ``--worker-extension-cls probe.Probe``; called over
``/collective_rpc``. Operators are opaque even in a compiled graph, and implementations
for the dispatch key CPU come before the registered ones: they see the real model.
"""

from typing import Any

import torch
from safetensors.torch import save_file


class Probe:
    """Mixed into the worker: ``self`` is vLLM's worker."""

    def lowbit_record(self) -> None:
        """Start recording every integer linear and every KV store."""
        from vllm_lowbit.kernels.implementations import implementation
        from vllm_lowbit.kernels.linear_packed.cpu import linear_packed

        self.seen: dict[str, list[Any]] = {"input": [], "linear": [], "kv": []}
        observed = torch.library.Library("lowbit", "IMPL")
        self.undo = [observed._destroy]
        store = implementation("kv4_store")

        def linear(x: torch.Tensor, *rest: Any) -> torch.Tensor:
            out = linear_packed(x, *rest)
            self._keep("input", x)
            self._keep("linear", *_integers(x, *rest), out)
            return out

        def kv(key: torch.Tensor, value: torch.Tensor, *rest: Any) -> None:
            store(key, value, *rest)
            self._keep("kv", key)
            self._keep("kv", value)

        observed.impl("linear_packed", linear, "CPU")
        observed.impl("kv4_store", kv, "CPU")

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


def _integers(
    x: torch.Tensor,
    input_scale: torch.Tensor | None,
    order: int,
    stride: int,
    activation_bits: int,
    symmetric: bool,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    weight_zero: torch.Tensor | None,
    weight_sum: torch.Tensor,
    bias: torch.Tensor | None,
    n: int,
    weight_bits: int,
    out_dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes, zero points and sums ``[tokens, 1, n]`` inside a call of linear_packed.

    By the same compiled kernels, on the live weight: with scales of one an output is
    the accumulator, which float32 holds below 2^24.
    """
    from vllm_lowbit.kernels.hadamard_quantize.cpu import hadamard_quantize
    from vllm_lowbit.kernels.linear_w4a4.cpu import PackedWeight, linear_w4a4

    codes, scale, zero_point = hadamard_quantize(
        x, input_scale, order, stride, activation_bits, symmetric
    )
    assert len(weight_scale) == 1
    packed = PackedWeight(
        weight, torch.ones_like(weight_scale), weight_zero, weight_sum
    )
    sums = linear_w4a4(
        codes,
        torch.ones_like(scale),
        zero_point,
        packed,
        n,
        weight_bits,
        None,
        torch.float32,
    )
    assert sums.abs().max() < 1 << 24
    return codes, zero_point, sums.to(torch.int32).unsqueeze(1)
