# SPDX-License-Identifier: Apache-2.0
"""Wrong arguments are refused by name before anything is launched."""

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch

from vllm_lowbit.kernels.gpu.configs import LinearConfig
from vllm_lowbit.kernels.gpu.weights import pack
from vllm_lowbit.kernels.hadamard_quantize import triton as quantize
from vllm_lowbit.kernels.linear_w4a4 import triton as integer
from vllm_lowbit.kernels.linear_w4a4.triton import MAX_K, linear_w4a4
from vllm_lowbit.kernels.linear_wna16 import triton as weight_only
from vllm_lowbit.kernels.linear_wna16.triton import linear_wna16

M, N, K = 3, 8, 128


def packed(bits: int, widen: bool, groups: int = 1) -> Any:
    codes = torch.zeros(N, K, dtype=torch.int8)
    return pack(codes, torch.ones(N, groups), None, bits, widen=widen)


def integer_arguments() -> dict[str, Any]:
    weight = packed(4, True)
    return {
        "codes": torch.zeros(M, K, dtype=torch.int8),
        "scale": torch.ones(M, 1),
        "zero_point": None,
        "weight": weight.weight,
        "weight_scale": weight.scale,
        "weight_zero": None,
        "weight_sum": weight.sum,
        "bias": None,
        "activation_bits": 4,
        "out_dtype": torch.float32,
    }


def float_arguments() -> dict[str, Any]:
    weight = packed(4, False)
    return {
        "x": torch.zeros(M, K, dtype=torch.bfloat16),
        "weight": weight.weight,
        "weight_scale": weight.scale,
        "weight_zero": None,
        "bias": None,
        "weight_bits": 4,
        "out_dtype": torch.float32,
    }


def quantize_arguments() -> dict[str, Any]:
    return {
        "x": torch.zeros(M, K),
        "input_scale": None,
        "order": K,
        "stride": 1,
        "bits": 4,
        "symmetric": True,
    }


def refused(
    function: Callable[..., Any], arguments: dict[str, Any], **wrong: Any
) -> str:
    with pytest.raises(ValueError) as error:
        function(**{**arguments, **wrong})
    return str(error.value)


META = torch.empty(M, K, dtype=torch.int8, device="meta")


def elsewhere(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


def askew(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Zeros at an odd address."""
    memory = bytearray(4 * torch.Size(shape).numel() + 1)
    count = torch.Size(shape).numel()
    return torch.frombuffer(memory, dtype=dtype, offset=1)[:count].view(shape)


INT, BYTE = torch.int32, torch.uint8


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("codes", torch.zeros(M, K), r"torch.int8 \[any, any\], got torch.float32"),
        ("codes", torch.zeros(K, dtype=torch.int8), r"got torch.int8 \[128\]"),
        ("codes", META, r"must be on a GPU \(cuda\), got meta"),
        ("codes", torch.zeros(K, M, dtype=torch.int8).t(), "must be contiguous"),
        ("codes", torch.zeros(M, 300, dtype=torch.int8), r"\[8, 192\], got"),
        ("scale", torch.ones(M), r"\[3, any\], got torch.float32 \[3\]"),
        ("scale", torch.ones(M, 2), r"^scale must have 1 column, got \[3, 2\]"),
        ("zero_point", torch.zeros(M, 2, dtype=INT), r"zero_point must .* \[3, 1\]"),
        ("zero_point", torch.zeros(M, 1), "torch.int32"),
        ("weight", torch.zeros(N, 64), "torch.uint8 or torch.int8"),
        ("weight", torch.zeros(N, 60, dtype=torch.uint8), r"\[8, 64\], got"),
        ("weight_scale", torch.ones(N, 1), "8 groups|must be"),
        ("weight_scale", torch.ones(3, N), "3 groups, which do not divide K 128"),
        ("weight_scale", torch.ones(2, N), r"weight_sum must be .* \[2, 8\]"),
        ("weight_scale", torch.ones(8, N), "group_size must be 32, 64 or a multiple"),
        ("weight_zero", torch.zeros(1, N), "torch.int32"),
        ("weight_sum", torch.zeros(1, N), "torch.int32"),
        ("bias", torch.zeros(N + 1), r"\[8\], got torch.float32 \[9\]"),
        ("bias", torch.zeros(N, dtype=torch.float64), "torch.bfloat16 or"),
        ("out_dtype", torch.float64, "bfloat16, float16 or float32, got"),
        ("activation_bits", 1, "activation_bits must be 2 to 8, got 1"),
        ("activation_bits", 9, "activation_bits must be 2 to 8, got 9"),
        ("weight", elsewhere(N, 64, dtype=BYTE), "weight must be on cpu, got meta"),
        ("weight_scale", elsewhere(1, N), "weight_scale must be on cpu, got meta"),
        ("weight_zero", elsewhere(1, N, dtype=INT), "weight_zero must be on cpu, got"),
        ("weight_sum", elsewhere(1, N, dtype=INT), "weight_sum must be on cpu, got"),
        ("scale", elsewhere(M, 1), "^scale must be on cpu, got meta"),
        ("zero_point", elsewhere(M, 1, dtype=INT), "zero_point must be on cpu, got"),
        ("bias", elsewhere(N), "bias must be on cpu, got meta"),
        ("weight_scale", askew(1, N), "weight_scale must be aligned to 4 bytes, its"),
        ("weight_sum", askew(1, N, dtype=INT), "weight_sum must be aligned to 4 bytes"),
        ("bias", askew(N, dtype=torch.float16), "bias must be aligned to 2 bytes"),
    ],
)
def test_integer_linear(name: str, value: Any, message: str) -> None:
    text = refused(linear_w4a4, integer_arguments(), **{name: value})
    assert re.search(message, text), text


def test_sums_that_might_not_fit() -> None:
    k = MAX_K
    text = refused(
        linear_w4a4,
        integer_arguments(),
        codes=torch.zeros(1, k, dtype=torch.int8),
        scale=torch.ones(1, 1),
        weight=torch.zeros(N, k // 2, dtype=torch.uint8),
    )
    assert f"K below {MAX_K}, got {k}" in text
    k = 70016
    text = refused(
        linear_w4a4,
        integer_arguments(),
        codes=torch.zeros(1, k, dtype=torch.int8),
        scale=torch.ones(1, 1),
        zero_point=torch.zeros(1, 1, dtype=torch.int32),
        weight=torch.zeros(N, k, dtype=torch.int8),
        activation_bits=8,
    )
    assert "do not fit int32" in text


E4M3 = LinearConfig(16, 16, 4, 2, True, e4m3=True)


def test_e4m3_of_wider_codes() -> None:
    text = refused(linear_w4a4, integer_arguments(), config=E4M3, activation_bits=5)
    assert "e4m3 is for codes of up to 4 bits, got activation_bits 5 and" in text
    weight = packed(8, True).weight
    text = refused(linear_w4a4, integer_arguments(), config=E4M3, weight=weight)
    assert "got activation_bits 4 and weights of 8 bits" in text


@pytest.mark.parametrize("arch", ["sm_89", "sm_100", "gfx942"])
def test_e4m3_on_other_chips(arch: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(integer, "architecture", lambda device: arch)
    text = refused(linear_w4a4, integer_arguments(), config=E4M3)
    assert text == f"config.e4m3 is supported on sm_90, sm_103, not on {arch}"


def test_wider_codes_of_a_table_with_e4m3(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are multiplied as int8, with the same tile."""
    taken: list[bool] = []

    class Kernel:
        def __getitem__(self, grid: Any) -> Callable[..., None]:
            return lambda *arguments, **options: taken.append(options["E4M3"])

    monkeypatch.setattr(integer, "architecture", lambda device: "sm_103")
    monkeypatch.setattr(integer, "linear_kernel", Kernel())
    for bits in (4, 5, 8):
        linear_w4a4(**{**integer_arguments(), "activation_bits": bits})
    assert taken == [True, False, False]


# Chip, operator, stored bits, groups, tile and what it is refused for, a bound of what
# the compiler takes (155,648 and 73,728 bytes and 576 columns of the first three).
TOO_LARGE = [
    ("sm_86", weight_only, 3, 1, (128, 128, 8, 3), "155648 bytes of shared memory"),
    ("gfx942", weight_only, 3, 1, (128, 128, 8, 2), "77824 bytes of shared memory"),
    ("sm_100", weight_only, 3, 4, (128, 128, 8, 3), "columns of tensor memory"),
    ("sm_120", integer, 4, 1, (256, 256, 8, 4), "147456 bytes of shared memory"),
]


@pytest.mark.parametrize(
    ("arch", "module", "bits", "groups", "tile", "message"), TOO_LARGE
)
def test_tile_beyond_a_chips_memory(
    arch: str,
    module: Any,
    bits: int,
    groups: int,
    tile: tuple[int, int, int, int],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It is refused before anything is compiled or launched; one that fits is not."""
    launched: list[int] = []

    class Kernel:
        def __getitem__(self, grid: Any) -> Callable[..., None]:
            return lambda *arguments, **options: launched.append(options["BLOCK_M"])

    monkeypatch.setattr(module, "architecture", lambda device: arch)
    monkeypatch.setattr(module, "linear_kernel", Kernel())
    k = 256
    codes = torch.zeros(N, k, dtype=torch.int8)
    weight = pack(codes, torch.ones(N, groups), None, bits, widen=module is integer)
    if module is integer:
        operator, arguments = linear_w4a4, integer_arguments()
        given = {"codes": torch.zeros(M, k, dtype=torch.int8), "weight_sum": weight.sum}
    else:
        operator, arguments = linear_wna16, float_arguments()
        given = {"x": torch.zeros(M, k, dtype=torch.bfloat16), "weight_bits": bits}
    given |= {"weight": weight.weight, "weight_scale": weight.scale}
    large = LinearConfig(*tile, True)
    text = refused(operator, arguments, **given, config=large)
    assert message in text and f"{arch} has " in text
    assert f"{large}" in text and launched == []
    operator(**{**arguments, **given, "config": None})
    assert launched


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("x", torch.zeros(M, K), "torch.bfloat16 or torch.float16"),
        ("weight_bits", 5, r"one of \(2, 3, 4, 6, 8\), got 5"),
        ("weight_bits", 8, "weight must be torch.int8"),
        ("weight_bits", 3, r"\[any, 96\], got torch.uint8 \[8, 64\]"),
        ("weight_scale", torch.ones(1, N + 1), r"weight_scale must be"),
        ("weight_zero", torch.zeros(1, N), "weight_zero must be torch.int32"),
        ("bias", torch.zeros(1, N), r"bias must be .*\[8\]"),
        ("out_dtype", torch.int32, "out_dtype must be"),
        ("config", E4M3, "config.e4m3 is of linear_w4a4, got it for linear_wna16"),
        ("x", elsewhere(M, K, dtype=torch.half), r"x must be on a GPU \(cuda\), got"),
        ("x", askew(M, K, dtype=torch.half), "x must be aligned to 2 bytes"),
        ("weight", elsewhere(N, 64, dtype=BYTE), "weight must be on cpu, got meta"),
        ("weight_scale", elsewhere(1, N), "weight_scale must be on cpu, got meta"),
        ("weight_zero", elsewhere(1, N, dtype=INT), "weight_zero must be on cpu, got"),
        ("bias", elsewhere(N), "bias must be on cpu, got meta"),
    ],
)
def test_float_linear(name: str, value: Any, message: str) -> None:
    text = refused(linear_wna16, float_arguments(), **{name: value})
    assert re.search(message, text), text


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("x", torch.zeros(M, K).double(), "x must be torch.bfloat16 or"),
        ("x", torch.zeros(K), "x must be"),
        ("x", torch.zeros(M, K, device="meta"), r"x must be on a GPU \(cuda\)"),
        ("input_scale", torch.ones(K + 1), r"input_scale must be .*\[128\]"),
        ("input_scale", torch.ones(K).bfloat16(), "input_scale must be torch.float32"),
        ("order", 64 + 1, "blocks of order 65 x stride 1 do not divide"),
        ("order", 0, "blocks of order 0"),
        ("stride", 3, "blocks of order 128 x stride 3 do not divide"),
        ("bits", 9, "bits must be 2 to 8, got 9"),
    ],
)
def test_quantization(name: str, value: Any, message: str) -> None:
    text = refused(quantize.hadamard_quantize, quantize_arguments(), **{name: value})
    assert re.search(message, text), text


def test_prologues() -> None:
    arguments = {**quantize_arguments(), "weight": torch.ones(K - 1), "epsilon": 1e-5}
    text = refused(quantize.rms_norm_hadamard_quantize, arguments)
    assert "weight must be" in text and "[128], got torch.float32 [127]" in text
    text = refused(
        quantize.swiglu_hadamard_quantize, quantize_arguments(), x=torch.zeros(M, 7)
    )
    assert "x must have an even number of columns, got 7" in text


def test_scalar_transform() -> None:
    with pytest.raises(ValueError, match="x must have a dimension"):
        quantize.transform(torch.tensor(1.0), None, 1, 1)
