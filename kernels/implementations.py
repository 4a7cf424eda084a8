# SPDX-License-Identifier: Apache-2.0
"""The function behind each operator and backend."""

import functools
from collections.abc import Callable
from importlib import import_module
from typing import Any

from .dispatch import select
from .hadamard.cpu import transform as cpu_transform
from .hadamard_quantize import cpu as quantize_cpu
from .hadamard_quantize import reference as quantize_generic
from .kv4_attention import cpu as attention_cpu
from .kv4_attention import generic as attention_generic
from .kv4_store import cpu as store_cpu
from .kv4_store import generic as store_generic
from .linear_experts import cpu as experts_cpu
from .linear_experts import generic as experts_generic
from .linear_packed.cpu import linear_packed
from .linear_tiled import blas as tiled_blas
from .linear_tiled import cpu as tiled_cpu
from .linear_tiled import generic as tiled_generic
from .linear_w4a4.generic import linear_w4a4
from .linear_wna16.generic import linear_wna16
from .quantize_weight import cpu as weight_cpu
from .quantize_weight import reference as weight_generic
from .rope_kv4_store import reference as rope_store_generic


def on_call(path: str) -> Callable[..., Any]:
    """A function of this package that is imported when it is first called.

    Triton is imported only where its kernels run.
    """
    module, _, name = path.rpartition(".")

    @functools.cache
    def load() -> Callable[..., Any]:
        return getattr(import_module(f".{module}", __package__), name)

    return lambda *arguments: load()(*arguments)


QUANTIZE = "hadamard_quantize.triton"
EXPERTS = "linear_experts.triton"
# Linears of the backends take weights of different form: the compiled ones are both
# linear_packed.
IMPLEMENTATIONS: dict[tuple[str, str], Callable[..., Any]] = {
    ("hadamard", "cpu"): cpu_transform,
    ("hadamard", "triton"): on_call(f"{QUANTIZE}.transform"),
    ("hadamard", "generic"): quantize_generic.transform,
    ("hadamard_quantize", "cpu"): quantize_cpu.hadamard_quantize,
    ("hadamard_quantize", "triton"): on_call(f"{QUANTIZE}.hadamard_quantize"),
    ("hadamard_quantize", "generic"): quantize_generic.hadamard_quantize,
    ("linear_w4a4", "cpu"): linear_packed,
    ("linear_w4a4", "triton"): on_call("linear_w4a4.triton.linear_w4a4"),
    ("linear_w4a4", "generic"): linear_w4a4,
    ("linear_wna16", "cpu"): linear_packed,
    ("linear_wna16", "triton"): on_call("linear_wna16.triton.linear_wna16"),
    ("linear_wna16", "generic"): linear_wna16,
    ("linear_experts", "cpu"): experts_cpu.linear_experts,
    ("linear_experts", "triton"): on_call(f"{EXPERTS}.linear_experts_w4a4"),
    ("linear_experts", "generic"): experts_generic.linear_experts,
    ("linear_tiled", "cpu"): tiled_cpu.linear_tiled,
    ("linear_tiled", "blas"): tiled_blas.linear_tiled,
    ("linear_tiled", "generic"): tiled_generic.linear_tiled,
    ("quantize_weight", "cpu"): weight_cpu.quantize_weight,
    ("quantize_weight", "generic"): weight_generic.quantize_weight,
    ("kv4_store", "cpu"): store_cpu.kv4_store,
    ("kv4_store", "triton"): on_call("kv4_store.triton.kv4_store"),
    ("kv4_store", "generic"): store_generic.kv4_store,
    ("rope_kv4_store", "triton"): on_call("rope_kv4_store.triton.rope_kv4_store"),
    ("rope_kv4_store", "generic"): rope_store_generic.rope_kv4_store,
    ("kv4_attention", "cpu"): attention_cpu.kv4_attention,
    ("kv4_attention", "triton"): on_call("kv4_attention.triton.kv4_attention"),
    ("kv4_attention", "generic"): attention_generic.kv4_attention,
}


def implementation(operator: str, device: str = "cpu") -> Callable[..., Any]:
    """The function of the backend that the dispatch table chooses for an operator.

    Raises:
        ValueError: when no backend runs it on the device.
    """
    return IMPLEMENTATIONS[operator, select(operator, device).backend]
