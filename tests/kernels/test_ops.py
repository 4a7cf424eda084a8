# SPDX-License-Identifier: Apache-2.0
"""Registered operators: schema, fakes and torch.compile."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from vllm_lowbit.kernels import ops
from vllm_lowbit.kernels.grid import IntGrid
from vllm_lowbit.kernels.linear_experts.routing import by_expert
from vllm_lowbit.kernels.linear_w4a4.cpu import pack, unpack_rows

Arguments = tuple[Any, ...]

NAMES = (
    "hadamard",
    "hadamard_quantize",
    "rms_norm_hadamard_quantize",
    "swiglu_hadamard_quantize",
    "linear_w4a4",
    "linear_wna16",
    "linear_packed",
    "linear_experts_generic",
    "linear_experts_packed",
    "kv4_store",
    "rope_kv4_store",
    "kv4_attention",
    "kv4_attention_out",
)
# Kernels of Triton alone, checked in triton/test_gpu_ops.py.
ON_GPUS = (
    "gpu_linear_w4a4",
    "gpu_linear_wna16",
    "gpu_linear_experts_w4a4",
    "gpu_linear_experts_wna16",
)


def activations(dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(5, 128).to(dtype)


def integer_operands(
    bias: torch.Tensor | None, out_dtype: torch.dtype, group_size: int | None = None
) -> Arguments:
    grid = IntGrid(4, False, group_size=group_size)
    codes, scale, zero_point = grid.quantize(activations())
    weight = torch.randint(-7, 8, (24, 128), dtype=torch.int8)
    bounds = grid.max_difference, 7
    return codes, scale, zero_point, weight, torch.rand(24, 2), bias, *bounds, out_dtype


def packed_operands(
    bits: int, symmetric: bool, bias: torch.Tensor | None, dtype: torch.dtype
) -> Arguments:
    codes = torch.randint(-7, 8, (24, 128), dtype=torch.int8)
    zero_point = None if symmetric else torch.randint(-8, 8, (24, 2))
    weight = pack(codes, torch.rand(24, 2), zero_point, 4)
    return 64, 1, bits, False, *weight, bias, 24, 4, dtype


def routed() -> Arguments:
    """Five tokens, each sent to two of three experts."""
    routing = by_expert(torch.rand(5, 3).topk(2)[1], 3)
    return routing.rows, routing.offsets


def packed_experts(symmetric: bool, dtype: torch.dtype) -> Arguments:
    """Packed weights of three experts and what follows them."""
    *_, w, scale, zero, total, _, n, bits, dtype = packed_operands(
        4, symmetric, None, dtype
    )
    stacked = [None if t is None else torch.stack([t] * 3) for t in (w, scale, zero)]
    return *stacked, torch.stack([total] * 3), n, bits, dtype


def samples(name: str, shared_samples: dict[str, list[Arguments]]) -> list[Arguments]:
    """Arguments of an operator: optional ones both ways, every dtype."""
    if name in shared_samples:
        return shared_samples[name]
    input_scale = torch.rand(128) + 0.5
    bf16, fp16 = torch.bfloat16, torch.float16
    weight = torch.randint(-7, 8, (24, 128), dtype=torch.int8)
    return {
        "linear_w4a4": [
            integer_operands(None, torch.float32),
            integer_operands(torch.randn(24), bf16),
            integer_operands(torch.randn(24).to(fp16), fp16),
            integer_operands(torch.randn(24), bf16, 64),
        ],
        "linear_wna16": [
            (activations(), weight, torch.rand(24, 2), None, 7, bf16),
            (activations(bf16), weight, torch.rand(24, 1), torch.randn(24), 7, bf16),
            (activations(fp16), weight.short(), torch.rand(24, 1), None, 15, fp16),
        ],
        "linear_packed": [
            (activations(), None, *packed_operands(4, True, None, bf16)),
            (activations(bf16), input_scale, *packed_operands(8, False, None, bf16)),
            (activations(bf16), None, *packed_operands(4, False, None, bf16), 0.9, 64),
            (
                activations(fp16),
                input_scale,
                *packed_operands(16, True, torch.randn(24), torch.float32),
            ),
        ],
        "linear_experts_generic": [
            (activations(bf16), *routed(), scale, 64, 1, bits, False)
            + (weight.expand(3, -1, -1).clone(), torch.rand(3, 24, 2), 7, bf16)
            for scale, bits in ((input_scale, 4), (None, 16), (torch.rand(3, 128), 8))
        ]
        + [
            (activations(bf16), *routed(), None, 64, 1, 4, False)
            + (weight.expand(3, -1, -1).clone(), torch.rand(3, 24, 2), 7, bf16, 0.9, 64)
        ],
        "linear_experts_packed": [
            (activations(dtype), *routed(), scale, 64, 1, bits, False)
            + packed_experts(symmetric, dtype)
            for scale, bits, symmetric, dtype in (
                (input_scale, 4, True, bf16),
                (None, 16, False, torch.float32),
                (torch.rand(3, 128) + 0.5, 8, False, fp16),
            )
        ]
        + [
            (activations(bf16), *routed(), None, 64, 1, 4, False)
            + (*packed_experts(True, bf16), 0.9, 64)
        ],
    }[name]


def operator(name: str) -> Any:
    return getattr(torch.ops.lowbit, name).default


def test_names_are_all_that_is_registered() -> None:
    registered = torch._C._dispatch_get_all_op_names()
    assert {n for n in registered if n.startswith("lowbit::")} == {
        f"lowbit::{name}" for name in NAMES + ON_GPUS
    }
    assert ops.LIBRARY.ns == "lowbit"


@pytest.mark.parametrize("name", NAMES)
def test_opcheck(name: str, shared_samples: dict[str, list[Arguments]]) -> None:
    """Schema against what is mutated or aliased, fake against real, AOT dispatch."""
    for arguments in samples(name, shared_samples):
        torch.library.opcheck(operator(name), arguments)


@pytest.mark.parametrize("name", NAMES)
def test_fake_has_the_form_of_the_result(
    name: str, shared_samples: dict[str, list[Arguments]]
) -> None:
    def forms(result: Any) -> list[tuple]:
        tensors = result if isinstance(result, (tuple, list)) else (result,)
        return [(t.dtype, t.shape, t.stride(), t.device) for t in tensors]

    for arguments in samples(name, shared_samples):
        real = operator(name)(*arguments)
        with FakeTensorMode() as mode:
            fake = operator(name)(
                *(
                    mode.from_tensor(a) if isinstance(a, torch.Tensor) else a
                    for a in arguments
                )
            )
        if name in ("kv4_store", "rope_kv4_store", "kv4_attention_out"):
            assert real is fake is None
        else:
            assert forms(fake) == forms(real)


@pytest.mark.parametrize(
    "name",
    [
        "hadamard",
        "hadamard_quantize",
        "rms_norm_hadamard_quantize",
        "swiglu_hadamard_quantize",
        "kv4_store",
        "rope_kv4_store",
        "kv4_attention",
        "kv4_attention_out",
    ],
)
def test_gpus_have_a_kernel_of_their_own(name: str) -> None:
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    assert has(f"lowbit::{name}", "CUDA")


@pytest.mark.parametrize("name", ON_GPUS)
def test_gpu_linears_refuse_other_devices(name: str) -> None:
    x = torch.zeros(2, 128, dtype=torch.int8 if "w4a4" in name else torch.bfloat16)
    weight, scale = torch.zeros(8, 64, dtype=torch.uint8), torch.ones(1, 8)
    sums, bias = torch.zeros(1, 8, dtype=torch.int32), (None,)
    sent: Arguments = ()
    if "experts" in name:
        routing = by_expert(torch.zeros(2, 1, dtype=torch.int64), 1)
        sent, bias = (routing.rows, routing.offsets), ()
        weight, scale, sums = weight[None], scale[None], sums[None]
    rest: Arguments = (*sent, weight, scale, None, *bias, 4, torch.bfloat16)
    if "w4a4" in name:
        tokens = torch.ones(2, 1), None
        rest = (*tokens, *sent, weight, scale, None, sums, *bias, 4, torch.float32)
    with pytest.raises(ValueError, match=r"must be on a GPU \(cuda\), got cpu"):
        operator(name)(x, *rest)


@pytest.mark.parametrize("name", ["hadamard", "hadamard_quantize"])
@pytest.mark.parametrize("form", ["empty", "row stride", "one row"])
def test_fakes_of_other_row_layouts(name: str, form: str) -> None:
    x = {
        "empty": torch.randn(0, 64),
        "row stride": torch.randn(4, 128)[:, 64:],
        "one row": torch.randn(1, 64),
    }[form]
    rest = (4, False) if name == "hadamard_quantize" else ()
    torch.library.opcheck(operator(name), (x, None, 64, 1, *rest))


@pytest.mark.parametrize("name", ["hadamard", "hadamard_quantize"])
def test_fakes_of_transposed_rows(name: str) -> None:
    rest = (4, False) if name == "hadamard_quantize" else ()
    arguments = torch.randn(64, 5).t(), None, 64, 1, *rest
    torch.library.opcheck(operator(name), arguments)


def test_nothing_to_transform_is_not_an_alias() -> None:
    """An op may return its input only when its schema says so."""
    torch.library.opcheck(operator("hadamard"), (torch.randn(3, 64), None, 1, 1))


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_linear(backend: str) -> None:
    """Transform, quantization and GEMM in one graph, for any number of rows."""
    weight = torch.randint(-7, 8, (24, 128), dtype=torch.int8)
    weight_scale, bias = torch.rand(24, 1), torch.randn(24)

    def linear(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        codes, scale, zero = torch.ops.lowbit.hadamard_quantize(
            x * 2, None, 128, 1, 4, False
        )
        integer = torch.ops.lowbit.linear_w4a4(
            codes, scale, zero, weight, weight_scale, bias, 15, 7, torch.float32
        )
        rotated = torch.ops.lowbit.hadamard(x * 2, None, 128, 1)
        floating = torch.ops.lowbit.linear_wna16(
            rotated, weight, weight_scale, bias, 7, torch.float32
        )
        return integer, floating + 1

    torch._dynamo.reset()
    compiled = torch.compile(linear, fullgraph=True, dynamic=True, backend=backend)
    for rows in (5, 9) if backend == "aot_eager" else (5,):
        x = torch.randn(rows, 128)
        for actual, expected in zip(compiled(x), linear(x), strict=True):
            assert torch.equal(actual, expected)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_packed_linear(backend: str) -> None:
    """As a layer calls it, and a look-up of rows of an 8-bit weight, in one graph."""
    integer = packed_operands(4, False, torch.randn(24), torch.float32)
    floating = packed_operands(16, True, None, torch.float32)
    codes = torch.randint(-128, 128, (24, 128), dtype=torch.int8)
    table = pack(codes, torch.ones(24, 1), None, 8).weight

    def linear(x: torch.Tensor, index: torch.Tensor) -> tuple[torch.Tensor, ...]:
        rows = unpack_rows(table, index, 24, 128, 8).float() + x
        return (
            torch.ops.lowbit.linear_packed(rows, None, *integer),
            torch.ops.lowbit.linear_packed(rows * 2, None, *floating) + 1,
        )

    torch._dynamo.reset()
    compiled = torch.compile(linear, fullgraph=True, dynamic=True, backend=backend)
    for rows in (5, 9) if backend == "aot_eager" else (5,):
        arguments = torch.randn(rows, 128), torch.randint(24, (rows,))
        for actual, expected in zip(
            compiled(*arguments), linear(*arguments), strict=True
        ):
            assert torch.equal(actual, expected)


def test_compiled_attention(kv_batch: Callable[..., Any]) -> None:
    """The store is a mutation the graph must keep, before the read."""
    batch = kv_batch([40], [1])
    starts, lengths = torch.tensor([0, 1]), torch.tensor([40])
    slot = batch.block_table[0, 39 // 16].view(1) * 16 + 39 % 16

    def step(
        query: torch.Tensor, key: torch.Tensor, cache: torch.Tensor
    ) -> torch.Tensor:
        torch.ops.lowbit.kv4_store(key, key, cache, slot, True)
        return torch.ops.lowbit.kv4_attention(
            query, cache, batch.block_table, starts, lengths, 0.1, *(None,) * 3, True
        )

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    key = torch.randn(1, 2, 64)
    caches = batch.cache.clone(), batch.cache.clone()
    assert torch.equal(
        compiled(batch.query, key, caches[0]), step(batch.query, key, caches[1])
    )
    assert torch.equal(*caches)
    assert not torch.equal(caches[0], batch.cache)


def test_meta_tensors_run_the_fake() -> None:
    """Shapes without data, as loading on the meta device needs them."""
    x = torch.empty(3, 64, device="meta")
    codes, scale, zero_point = torch.ops.lowbit.hadamard_quantize(
        x, None, 64, 1, 4, True
    )
    assert codes.device.type == scale.device.type == zero_point.device.type == "meta"
    assert codes.shape == (3, 64) and codes.dtype == torch.int8
