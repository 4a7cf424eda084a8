# SPDX-License-Identifier: Apache-2.0
"""Registration of the operators with torch.library: schema, kernel, fake.

Ops are opaque to torch.compile. Importing this module registers
``torch.ops.lowbit.*`` once per process; the functions behind them document the
arguments.
"""

from collections.abc import Callable
from typing import Any

import torch

from .hadamard_quantize import reference as quantize_reference
from .implementations import (
    EXPERTS,
    IMPLEMENTATIONS,
    QUANTIZE,
    implementation,
    on_call,
)
from .linear_experts import cpu as experts_cpu
from .linear_experts import generic as experts_generic
from .linear_packed.cpu import linear_packed
from .linear_w4a4.generic import linear_w4a4
from .linear_wna16.generic import linear_wna16

LIBRARY = torch.library.Library("lowbit", "DEF")


def _register(
    signature: str,
    kernel: Callable[..., object],
    fake: Callable[..., object],
    gpu: Callable[..., object] | None = None,
) -> None:
    """Define an op; gpu runs it on CUDA and ROCm devices in place of kernel."""
    name = signature.partition("(")[0]
    LIBRARY.define(signature)
    LIBRARY.impl(name, kernel, "CompositeExplicitAutograd")
    if gpu is not None:
        LIBRARY.impl(name, gpu, "CUDA")
    torch.library.register_fake(f"lowbit::{name}", fake, lib=LIBRARY)


def _linear_out(
    x: torch.Tensor, weight: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    return x.new_empty((x.shape[0], weight.shape[0]), dtype=dtype)


def _linear_packed_out(x: torch.Tensor, *arguments: Any) -> torch.Tensor:
    # After input_scale, which is the first of them.
    n, out_dtype = arguments[10], arguments[12]
    return x.new_empty((x.shape[0], n), dtype=out_dtype)


def _linear_experts_generic_out(
    x: torch.Tensor, rows: torch.Tensor, *arguments: Any
) -> torch.Tensor:
    # After offsets, which is the first of them.
    weight, out_dtype = arguments[6], arguments[9]
    return x.new_empty((rows.shape[0], weight.shape[1]), dtype=out_dtype)


def _linear_experts_packed_out(
    x: torch.Tensor, rows: torch.Tensor, *arguments: Any
) -> torch.Tensor:
    n, out_dtype = arguments[10], arguments[12]
    return x.new_empty((rows.shape[0], n), dtype=out_dtype)


def _codes_out(
    x: torch.Tensor, n: int, arguments: tuple[Any, ...], group_size: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Of n columns; group_size is an index of the arguments, which may end before."""
    size = arguments[group_size] if len(arguments) > group_size else None
    groups = 1 if size is None else n // size
    return (
        x.new_empty((x.shape[0], n), dtype=torch.int8),
        x.new_empty((x.shape[0], groups), dtype=torch.float32),
        x.new_empty((x.shape[0], groups), dtype=torch.int32),
    )


_register(
    "hadamard(Tensor x, Tensor? input_scale, int order, int stride,"
    " bool transpose=False) -> Tensor",
    implementation("hadamard"),
    lambda x, *arguments: x.new_empty(x.shape, dtype=torch.float32),
    IMPLEMENTATIONS["hadamard", "triton"],
)
_register(
    "hadamard_quantize(Tensor x, Tensor? input_scale, int order, int stride,"
    " int bits, bool symmetric, float clip_ratio=1.0, int? group_size=None)"
    " -> (Tensor codes, Tensor scale, Tensor zero_point)",
    implementation("hadamard_quantize"),
    lambda x, *arguments: _codes_out(x, x.shape[1], arguments, 6),
    IMPLEMENTATIONS["hadamard_quantize", "triton"],
)
_register(
    "rms_norm_hadamard_quantize(Tensor x, Tensor weight, float epsilon,"
    " Tensor? input_scale, int order, int stride, int bits, bool symmetric,"
    " float clip_ratio=1.0, int? group_size=None)"
    " -> (Tensor codes, Tensor scale, Tensor zero_point)",
    quantize_reference.rms_norm_hadamard_quantize,
    lambda x, *arguments: _codes_out(x, x.shape[1], arguments, 8),
    on_call(f"{QUANTIZE}.rms_norm_hadamard_quantize"),
)
_register(
    "swiglu_hadamard_quantize(Tensor x, Tensor? input_scale, int order, int stride,"
    " int bits, bool symmetric, float clip_ratio=1.0, int? group_size=None)"
    " -> (Tensor codes, Tensor scale, Tensor zero_point)",
    quantize_reference.swiglu_hadamard_quantize,
    lambda x, *arguments: _codes_out(x, x.shape[1] // 2, arguments, 6),
    on_call(f"{QUANTIZE}.swiglu_hadamard_quantize"),
)
_register(
    "linear_w4a4(Tensor codes, Tensor scale, Tensor zero_point, Tensor weight,"
    " Tensor weight_scale, Tensor? bias, int code_max, int weight_max,"
    " ScalarType out_dtype) -> Tensor",
    linear_w4a4,
    lambda codes, scale, zero_point, weight, *rest: _linear_out(
        codes, weight, rest[-1]
    ),
)
_register(
    "linear_wna16(Tensor x, Tensor weight, Tensor weight_scale, Tensor? bias,"
    " int weight_max, ScalarType out_dtype) -> Tensor",
    linear_wna16,
    lambda x, weight, weight_scale, bias, weight_max, out_dtype: _linear_out(
        x, weight, out_dtype
    ),
)
_register(
    "linear_packed(Tensor x, Tensor? input_scale, int order, int stride,"
    " int activation_bits, bool symmetric, Tensor weight, Tensor weight_scale,"
    " Tensor? weight_zero, Tensor weight_sum, Tensor? bias, int n, int weight_bits,"
    " ScalarType out_dtype, float clip_ratio=1.0, int? group_size=None) -> Tensor",
    linear_packed,
    _linear_packed_out,
)
_register(
    "linear_experts_generic(Tensor x, Tensor rows, Tensor offsets,"
    " Tensor? input_scale, int order, int stride, int activation_bits,"
    " bool symmetric, Tensor weight, Tensor weight_scale, int weight_max,"
    " ScalarType out_dtype, float clip_ratio=1.0, int? group_size=None) -> Tensor",
    experts_generic.linear_experts,
    _linear_experts_generic_out,
)
_register(
    "linear_experts_packed(Tensor x, Tensor rows, Tensor offsets,"
    " Tensor? input_scale, int order, int stride, int activation_bits,"
    " bool symmetric, Tensor weight, Tensor weight_scale, Tensor? weight_zero,"
    " Tensor weight_sum, int n, int weight_bits, ScalarType out_dtype,"
    " float clip_ratio=1.0, int? group_size=None) -> Tensor",
    experts_cpu.linear_experts,
    _linear_experts_packed_out,
)
# Weights of these four are in the form of gpu/weights.py.
_register(
    "gpu_linear_w4a4(Tensor codes, Tensor scale, Tensor? zero_point, Tensor weight,"
    " Tensor weight_scale, Tensor? weight_zero, Tensor weight_sum, Tensor? bias,"
    " int activation_bits, ScalarType out_dtype) -> Tensor",
    IMPLEMENTATIONS["linear_w4a4", "triton"],
    lambda codes, scale, zero_point, weight, *rest: _linear_out(
        codes, weight, rest[-1]
    ),
)
_register(
    "gpu_linear_wna16(Tensor x, Tensor weight, Tensor weight_scale,"
    " Tensor? weight_zero, Tensor? bias, int weight_bits, ScalarType out_dtype)"
    " -> Tensor",
    IMPLEMENTATIONS["linear_wna16", "triton"],
    lambda x, weight, *rest: _linear_out(x, weight, rest[-1]),
)
_register(
    "gpu_linear_experts_w4a4(Tensor codes, Tensor scale, Tensor? zero_point,"
    " Tensor rows, Tensor offsets, Tensor weight, Tensor weight_scale,"
    " Tensor? weight_zero, Tensor weight_sum, int activation_bits,"
    " ScalarType out_dtype) -> Tensor",
    on_call(f"{EXPERTS}.linear_experts_w4a4"),
    lambda codes, scale, zero_point, rows, offsets, weight, *rest: codes.new_empty(
        (rows.shape[0], weight.shape[1]), dtype=rest[-1]
    ),
)
_register(
    "gpu_linear_experts_wna16(Tensor x, Tensor rows, Tensor offsets, Tensor weight,"
    " Tensor weight_scale, Tensor? weight_zero, int weight_bits,"
    " ScalarType out_dtype) -> Tensor",
    on_call(f"{EXPERTS}.linear_experts_wna16"),
    lambda x, rows, offsets, weight, *rest: x.new_empty(
        (rows.shape[0], weight.shape[1]), dtype=rest[-1]
    ),
)
_register(
    "kv4_store(Tensor key, Tensor value, Tensor(a!) kv_cache, Tensor slot_mapping,"
    " bool rotate_key) -> ()",
    implementation("kv4_store"),
    lambda key, value, kv_cache, slot_mapping, rotate_key: None,
    IMPLEMENTATIONS["kv4_store", "triton"],
)
_register(
    "rope_kv4_store(Tensor(a!) query, Tensor(b!) key, Tensor value, Tensor positions,"
    " Tensor cos_sin_cache, Tensor(c!) kv_cache, Tensor slot_mapping, bool rotate_key)"
    " -> ()",
    implementation("rope_kv4_store"),
    lambda *arguments: None,
    IMPLEMENTATIONS["rope_kv4_store", "triton"],
)
_register(
    "kv4_attention(Tensor query, Tensor kv_cache, Tensor block_table,"
    " Tensor query_start_loc, Tensor seq_lens, float softmax_scale,"
    " int? sliding_window, float? logits_soft_cap, Tensor? sinks, bool rotate_query)"
    " -> Tensor",
    implementation("kv4_attention"),
    lambda query, *arguments: torch.empty_like(query),
    IMPLEMENTATIONS["kv4_attention", "triton"],
)


def _attention_out(*arguments: Any) -> None:
    """Into ``out``, the last but one; only GPUs need the workspace after it."""
    *inputs, out, _ = arguments
    out.copy_(implementation("kv4_attention")(*inputs))


_register(
    "kv4_attention_out(Tensor query, Tensor kv_cache, Tensor block_table,"
    " Tensor query_start_loc, Tensor seq_lens, float softmax_scale,"
    " int? sliding_window, float? logits_soft_cap, Tensor? sinks, bool rotate_query,"
    " Tensor(a!) out, Tensor(b!)? workspace) -> ()",
    _attention_out,
    lambda *arguments: None,
    on_call("kv4_attention.triton.kv4_attention_out"),
)
