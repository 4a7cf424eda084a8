# SPDX-License-Identifier: Apache-2.0
"""Registered operators of the GPU: schema, fakes and torch.compile."""

from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from vllm_lowbit.kernels import ops  # noqa: F401 (registers torch.ops.lowbit)
from vllm_lowbit.kernels.gpu.weights import pack
from vllm_lowbit.kernels.implementations import IMPLEMENTATIONS
from vllm_lowbit.kernels.linear_experts.routing import by_expert

NAMES = (
    "gpu_linear_w4a4",
    "gpu_linear_wna16",
    "gpu_linear_experts_w4a4",
    "gpu_linear_experts_wna16",
)


SHARED = (
    "hadamard",
    "hadamard_quantize",
    "rms_norm_hadamard_quantize",
    "swiglu_hadamard_quantize",
    "kv4_store",
    "rope_kv4_store",
    "kv4_attention",
    "kv4_attention_out",
)
Samples = dict[str, list[tuple[Any, ...]]]


def samples(name: str, shared_samples: Samples) -> list[tuple[Any, ...]]:
    if name in shared_samples:
        return shared_samples[name]
    weight = torch.randint(-7, 8, (24, 128), dtype=torch.int8)
    zeros, bias = torch.randint(-8, 8, (24, 2)), torch.randn(24)
    channel = pack(weight, torch.rand(24, 1), None, 4, widen=True)
    grouped = pack(weight, torch.rand(24, 2), zeros, 4, widen=True)
    codes, scale = torch.randint(-8, 8, (5, 128), dtype=torch.int8), torch.rand(5, 1)
    zero_point = torch.randint(-8, 8, (5, 1), dtype=torch.int32)
    x = torch.randn(5, 128)
    routing = by_expert(torch.rand(5, 3).topk(2)[1], 3)
    sent = routing.rows, routing.offsets
    experts = [None if t is None else torch.stack([t] * 3) for t in grouped]
    if name == "gpu_linear_experts_w4a4":
        return [
            (codes, scale, None, *sent, *experts, 4, torch.float32),
            (codes, scale, zero_point, *sent, *experts, 4, torch.float16),
        ]
    if name == "gpu_linear_experts_wna16":
        return [(x.half(), *sent, *experts[:3], 4, torch.float32)]
    if name == "gpu_linear_w4a4":
        return [
            (codes, scale, None, *channel, None, 4, torch.float32),
            (codes, scale, zero_point, *grouped, bias, 4, torch.float16),
            (codes, scale.expand(5, 2).clone(), None, *grouped, bias)
            + (4, torch.float16),
        ]
    return [
        (x.bfloat16(), *channel[:3], None, 4, torch.float32),
        (x.half(), *grouped[:3], bias, 4, torch.float16),
    ]


@pytest.mark.parametrize("name", NAMES + SHARED)
def test_opcheck(name: str, gpu_ops: None, shared_samples: Samples) -> None:
    """Schema against what is mutated or aliased, and the fake against the result."""
    checks = ["test_schema", "test_faketensor"]
    for arguments in samples(name, shared_samples):
        operator = getattr(torch.ops.lowbit, name).default
        torch.library.opcheck(operator, arguments, test_utils=checks)


@pytest.mark.parametrize("name", NAMES + SHARED)
def test_fake_has_the_form_of_the_result(
    name: str, gpu_ops: None, shared_samples: Samples
) -> None:
    def forms(result: Any) -> list[tuple[Any, ...]]:
        tensors = result if isinstance(result, tuple) else (result,)
        return [(t.dtype, t.shape, t.stride()) for t in tensors if t is not None]

    operator = getattr(torch.ops.lowbit, name).default
    for arguments in samples(name, shared_samples):
        real = operator(*arguments)
        with FakeTensorMode() as mode:
            fake = operator(
                *(
                    mode.from_tensor(a) if isinstance(a, torch.Tensor) else a
                    for a in arguments
                )
            )
        assert forms(fake) == forms(real)


def test_ops_of_a_cpu_run_its_own_kernels(shared_samples: Samples) -> None:
    """Those checks above were of other functions."""
    arguments = shared_samples["kv4_attention"][0]
    expected = torch.ops.lowbit.kv4_attention(*arguments)
    triton = IMPLEMENTATIONS["kv4_attention", "triton"](*arguments)
    assert not torch.equal(triton, expected)
    assert (triton - expected).abs().max() < 0.01


def test_compiled_linear() -> None:
    """Quantization and product in one graph, for any number of rows."""
    weight = torch.randint(-7, 8, (24, 128), dtype=torch.int8)
    packed = pack(weight, torch.rand(24, 1), None, 4, widen=True)

    def linear(x: torch.Tensor) -> torch.Tensor:
        codes, scale, zero_point = torch.ops.lowbit.hadamard_quantize(
            x * 2, None, 128, 1, 4, False
        )
        return 1 + torch.ops.lowbit.gpu_linear_w4a4(
            codes, scale, zero_point, *packed, None, 4, torch.float32
        )

    torch._dynamo.reset()
    compiled = torch.compile(linear, fullgraph=True, dynamic=True, backend="aot_eager")
    for rows in (5, 9):
        x = torch.randn(rows, 128)
        assert torch.equal(compiled(x), linear(x))
