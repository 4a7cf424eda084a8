# SPDX-License-Identifier: Apache-2.0
"""Arguments of another form: a ValueError that names one, or the right result.

The kernels get bare pointers, so what the Python side lets through is read as it says.
Every argument is changed in every way listed here, up to three at once.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_lowbit.kernels.grid import IntGrid
from vllm_lowbit.kernels.hadamard import matrices
from vllm_lowbit.kernels.hadamard.cpu import arguments as transform_arguments
from vllm_lowbit.kernels.hadamard.cpu import transform
from vllm_lowbit.kernels.hadamard_quantize import reference as activations
from vllm_lowbit.kernels.hadamard_quantize.cpu import hadamard_quantize
from vllm_lowbit.kernels.linear_packed.cpu import linear_packed
from vllm_lowbit.kernels.linear_tiled.cpu import linear_tiled
from vllm_lowbit.kernels.linear_w4a4 import cpu, reference
from vllm_lowbit.kernels.linear_w4a4.cpu import PackedWeight, pack, unpack_rows
from vllm_lowbit.kernels.linear_wna16 import reference as weight_only
from vllm_lowbit.kernels.linear_wna16.cpu import linear_wna16
from vllm_lowbit.kernels.quantize_weight import cpu as weight_cpu
from vllm_lowbit.kernels.quantize_weight import reference as weight_reference

Arguments = dict[str, Any]
Tensors = tuple[torch.Tensor, ...]

# Small, ragged, in groups: 19 channels, 3 groups of 20 columns.
N, K, GROUPS, BITS = 19, 60, 3, 4
random = torch.Generator().manual_seed(0)
CODES = torch.randint(-8, 8, (N, K), dtype=torch.int8, generator=random)
SCALE = torch.rand(N, GROUPS, generator=random)
ZERO = torch.randint(-8, 8, (N, GROUPS), dtype=torch.int8, generator=random)
BIAS = torch.randn(N, generator=random)
X = torch.randn(5, K, generator=random)
INPUT_SCALE = torch.rand(K, generator=random) + 0.5


@dataclass(frozen=True)
class Wrapper:
    """A function with sound arguments, and what it has to return for others."""

    call: Callable[..., Any]
    expected: Callable[..., Any]
    arguments: Callable[[], Arguments]
    tolerance: float = 0.0


SCALED = {"x": X, "input_scale": INPUT_SCALE}
INTEGER = {"n": N, "bits": BITS, "bias": BIAS, "out_dtype": torch.float32}


def packed_fields() -> Arguments:
    weight, scale, zero, sums = pack(CODES, SCALE, ZERO, BITS)
    names = ("weight", "weight_scale", "weight_zero", "weight_sum")
    return dict(zip(names, (weight, scale, zero, sums), strict=True))


def call_integer(
    codes: Any, scale: Any, zero_point: Any, n: Any, bits: Any, **rest: Any
) -> torch.Tensor:
    bias, out_dtype = rest.pop("bias"), rest.pop("out_dtype")
    weight = PackedWeight(*rest.values())
    return cpu.linear_w4a4(codes, scale, zero_point, weight, n, bits, bias, out_dtype)


def call_weight_only(x: Any, n: Any, bits: Any, **rest: Any) -> torch.Tensor:
    bias, out_dtype = rest.pop("bias"), rest.pop("out_dtype")
    return linear_wna16(x, PackedWeight(*rest.values()), n, bits, bias, out_dtype)


def channels(out: torch.Tensor, n: int) -> torch.Tensor:
    """Of n channels where the weight has N: those it lacks are zero."""
    return torch.nn.functional.pad(out, (0, n - N))


def integer(
    codes: torch.Tensor,
    scale: torch.Tensor,
    zero_point: torch.Tensor,
    n: int,
    bits: int,
    bias: torch.Tensor | None,
    out_dtype: torch.dtype,
    **_: Any,
) -> torch.Tensor:
    assert bits == BITS and n - n % -16 == N - N % -16
    out = reference.linear_w4a4(
        codes, scale, zero_point, CODES, SCALE, ZERO, None, torch.float32
    )
    out = channels(out, n)
    return (out if bias is None else out + bias.float()).to(out_dtype)


def floating(
    x: torch.Tensor,
    n: int,
    bits: int,
    bias: torch.Tensor | None,
    out_dtype: torch.dtype,
    **_: Any,
) -> torch.Tensor:
    assert bits == BITS
    out = weight_only.linear_wna16(x, CODES, SCALE, ZERO, None, torch.float64)
    out = channels(out, n)
    return (out if bias is None else out + bias.double()).to(out_dtype)


def whole(
    x: torch.Tensor,
    input_scale: torch.Tensor | None,
    order: int,
    stride: int,
    activation_bits: int,
    symmetric: bool,
    weight_bits: int,
    group_size: int | None = None,
    **rest: Any,
) -> torch.Tensor:
    if activation_bits == 16:
        rows = activations.transform(x, input_scale, order, stride)
        return floating(rows, bits=weight_bits, **rest)
    quantized = activations.hadamard_quantize(
        x, input_scale, order, stride, activation_bits, symmetric, 1.0, group_size
    )
    return integer(*quantized, bits=weight_bits, **rest)


def product(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    out = x.double() @ weight.double().t()
    return (out if bias is None else out + bias.double()).to(x.dtype)


def call_pack(**arguments: Any) -> torch.Tensor:
    """The weight ``[n, k]`` that a packed one multiplies with."""
    packed, (n, k) = pack(**arguments), arguments["codes"].shape
    rows, ones = torch.eye(k, dtype=torch.int8), torch.ones(k, 1)
    zeros = torch.zeros(k, 1, dtype=torch.int32)
    out = cpu.linear_w4a4(
        rows, ones, zeros, packed, n, arguments["bits"], None, torch.float32
    )
    return out.t()


def decoded(
    codes: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor | None, bits: int
) -> torch.Tensor:
    assert int(codes.abs().max()) <= 1 << (bits - 1)
    parts = codes.float().view(len(codes), scale.shape[1], -1)
    if zero_point is not None:
        parts = parts - zero_point.unsqueeze(-1)
    return (parts * scale.unsqueeze(-1)).flatten(1)


def integer_arguments(group_size: int | None = None) -> Arguments:
    codes, scale, zero_point = IntGrid(4, False, group_size=group_size).quantize(X)
    rows = {"codes": codes, "scale": scale, "zero_point": zero_point}
    return rows | INTEGER | packed_fields()


def whole_arguments(bits: int) -> Arguments:
    rows = SCALED | {"order": 12, "stride": 1}
    grid = {"activation_bits": bits, "symmetric": False, "weight_bits": BITS}
    rest = {"bias": BIAS, "n": N, "out_dtype": torch.float32}
    return rows | grid | rest | packed_fields()


def tiled_arguments() -> Arguments:
    weight = torch.randn(N, K, generator=torch.Generator().manual_seed(1))
    return {"x": X, "weight": weight, "bias": BIAS}


def unpack_arguments() -> Arguments:
    fields = pack(EIGHT_BITS, torch.ones(N, 1), None, 8).weight
    index = torch.tensor([3, 18, 0])
    return {"fields": fields, "index": index, "n": N, "k": K, "bits": 8}


EIGHT_BITS = torch.randint(-128, 128, (N, K), dtype=torch.int8, generator=random)
WRAPPERS = {
    "hadamard": Wrapper(
        transform,
        activations.transform,
        lambda: SCALED | {"order": 12, "stride": 1, "transpose": False},
    ),
    "hadamard_quantize": Wrapper(
        hadamard_quantize,
        activations.hadamard_quantize,
        lambda: SCALED | {"order": 4, "stride": 5, "bits": 4, "symmetric": False},
    ),
    "hadamard_quantize in groups": Wrapper(
        hadamard_quantize,
        activations.hadamard_quantize,
        lambda: (
            SCALED
            | {"order": 4, "stride": 5, "bits": 4, "symmetric": False}
            | {"group_size": 20}
        ),
    ),
    "quantize_weight": Wrapper(
        lambda weight, group_size, bits: weight_cpu.quantize_weight(
            weight, IntGrid(bits, False), group_size
        ),
        lambda weight, group_size, bits: weight_reference.quantize_weight(
            weight, IntGrid(bits, False), group_size
        ),
        lambda: {"weight": X, "group_size": 20, "bits": 4},
    ),
    "pack": Wrapper(
        call_pack,
        decoded,
        lambda: {"codes": CODES, "scale": SCALE, "zero_point": ZERO, "bits": BITS},
    ),
    "unpack_rows": Wrapper(
        unpack_rows,
        lambda fields, index, n, k, bits: EIGHT_BITS[index],
        unpack_arguments,
    ),
    "linear_w4a4": Wrapper(call_integer, integer, integer_arguments),
    "linear_w4a4 in groups": Wrapper(
        call_integer, integer, lambda: integer_arguments(20)
    ),
    "linear_wna16": Wrapper(
        call_weight_only,
        floating,
        lambda: {"x": X} | INTEGER | packed_fields(),
        tolerance=1e-4,
    ),
    "linear_tiled": Wrapper(linear_tiled, product, tiled_arguments, tolerance=1e-4),
    "linear_packed": Wrapper(
        linear_packed, whole, lambda: whole_arguments(4), tolerance=1e-5
    ),
    "linear_packed in groups": Wrapper(
        linear_packed,
        whole,
        lambda: whole_arguments(4) | {"group_size": 20},
        tolerance=1e-5,
    ),
    "linear_packed of 16 bits": Wrapper(
        linear_packed, whole, lambda: whole_arguments(16), tolerance=1e-4
    ),
}


def wider(x: torch.Tensor, dim: int, by: int) -> torch.Tensor:
    """With one element more or less along a dimension, or none."""
    if dim >= x.dim():
        return x
    size = 0 if by == 0 else x.shape[dim] + by
    return x.index_select(dim, torch.arange(size) % x.shape[dim])


def shifted(x: torch.Tensor) -> torch.Tensor:
    """The same values, in the middle of their memory."""
    return torch.cat((x.flatten()[:1], x.flatten()))[1:].view(x.shape)


# Ways to change the form of a tensor; the values may change with it.
FORMS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    **{
        str(dtype): lambda x, dtype=dtype: x.to(dtype)
        for dtype in (
            *(torch.float32, torch.float64, torch.bfloat16, torch.float16),
            *(torch.int8, torch.uint8, torch.int32, torch.int64, torch.bool),
        )
    },
    "flat": lambda x: x.flatten(),
    "rank 0": lambda x: x.flatten()[0],
    "one dimension more": lambda x: x.unsqueeze(0),
    "first row": lambda x: x[0],
    "row less": lambda x: wider(x, 0, -1),
    "row more": lambda x: wider(x, 0, 1),
    "no rows": lambda x: wider(x, 0, 0),
    "column less": lambda x: wider(x, 1, -1),
    "column more": lambda x: wider(x, 1, 1),
    "no columns": lambda x: wider(x, 1, 0),
    "every second": lambda x: x.repeat_interleave(2, -1)[..., ::2],
    "turned": lambda x: x.t().contiguous().t() if x.dim() == 2 else x,
    "transposed": lambda x: x.t() if x.dim() == 2 else x,
    "one row for all": lambda x: x[:1].expand_as(x) if x.dim() == 2 else x,
    "shifted": shifted,
    "meta": lambda x: x.to("meta"),
}
NUMBERS = (-(1 << 63), -4, -1, 0, 1, 2, 3, 5, 6, 8, 9, 16, 20, 32, 60, 1 << 31, 1 << 40)
OUT_DTYPES = (torch.bfloat16, torch.float16, torch.float64, torch.int32, torch.bool)


def changes(arguments: Arguments) -> list[tuple[str, str, Any]]:
    """Every change: of which argument, its name, and the value it gets."""
    found: list[tuple[str, str, Any]] = []
    for name, value in arguments.items():
        if isinstance(value, torch.Tensor):
            found += [(name, form, change(value)) for form, change in FORMS.items()]
            if name in ("bias", "input_scale"):
                found.append((name, "None", None))
        elif isinstance(value, bool):
            found.append((name, "other", not value))
        elif isinstance(value, torch.dtype):
            found += [(name, str(dtype), dtype) for dtype in OUT_DTYPES]
        else:
            found += [(name, str(number), number) for number in NUMBERS]
    return found


ALL_CHANGES = {name: changes(w.arguments()) for name, w in WRAPPERS.items()}


def assert_close(actual: Any, expected: Any, tolerance: float) -> None:
    if isinstance(actual, tuple):
        for a, b in zip(actual, expected, strict=True):
            assert_close(a, b, tolerance)
        return
    assert (actual.dtype, actual.shape) == (expected.dtype, expected.shape)
    eps = 0.0 if actual.dtype == torch.int8 else tolerance
    if tolerance and actual.dtype in (torch.bfloat16, torch.float16):
        eps = 2 * torch.finfo(actual.dtype).eps
    torch.testing.assert_close(actual, expected, rtol=eps, atol=eps * 10)


def check(wrapper: Wrapper, changed: Arguments) -> str | None:
    """The message of the error, or None when the result is right."""
    try:
        actual = wrapper.call(**changed)
    except ValueError as error:
        return str(error)
    assert_close(actual, wrapper.expected(**changed), wrapper.tolerance)
    return None


@pytest.mark.parametrize("name", WRAPPERS)
def test_sound_arguments(name: str) -> None:
    assert check(WRAPPERS[name], WRAPPERS[name].arguments()) is None


@pytest.mark.parametrize("name", WRAPPERS)
def test_one_change(name: str) -> None:
    """Errors name an argument; where only its own form is wrong, that one."""
    wrapper = WRAPPERS[name]
    sound = wrapper.arguments()
    refused = 0
    for argument, form, value in ALL_CHANGES[name]:
        message = check(wrapper, {**sound, argument: value})
        if message is None:
            continue
        refused += 1
        words = set(re.findall(r"\w+", message))
        named = words & {*sound, "groups", "blocks", "order", "bits", "columns"}
        if form in ("rank 0", "meta", "every second"):
            named &= {argument}
        assert named, (argument, form, message)
    assert refused > 10


@pytest.mark.parametrize("name", WRAPPERS)
@given(data=st.data())
@settings(max_examples=150)
def test_several_changes(name: str, data: st.DataObject) -> None:
    wrapper = WRAPPERS[name]
    changed = wrapper.arguments()
    drawn = st.lists(st.sampled_from(range(len(ALL_CHANGES[name]))), max_size=3)
    for place in data.draw(drawn):
        argument, _, value = ALL_CHANGES[name][place]
        changed[argument] = value
    check(wrapper, changed)


@pytest.mark.parametrize("name", WRAPPERS)
def test_default_device_does_not_matter(name: str) -> None:
    """vLLM builds models with another default device: results stay on the CPU."""
    wrapper = WRAPPERS[name]
    arguments = wrapper.arguments()
    expected = wrapper.call(**arguments)
    for cached in (transform_arguments, matrices.core_matrix, matrices.matrix):
        cached.cache_clear()
    with torch.device("meta"):
        actual = wrapper.call(**arguments) if name != "pack" else pack(**arguments)
    if name == "pack":
        actual, expected = tuple(actual), tuple(pack(**arguments))
    assert_close(actual, expected, 0.0)


@pytest.mark.parametrize(("name", "value"), [("codes", 8), ("zero_point", -9)])
def test_codes_outside_of_their_width(name: str, value: int) -> None:
    arguments = WRAPPERS["pack"].arguments()
    arguments[name] = arguments[name].clone()
    arguments[name][3, 1] = value
    with pytest.raises(ValueError, match=rf"{name} of 4 bits must lie in \[-8, 7\]"):
        pack(**arguments)


def test_full_range_weights_are_refused() -> None:
    with pytest.raises(ValueError, match="full_range"):
        weight_cpu.quantize_weight(X, IntGrid(4, full_range=True), None)


@pytest.mark.parametrize("order", [3, 22, 268])
def test_unknown_order(order: int) -> None:
    x = torch.ones(2, order)
    for call in (
        lambda: transform(x, None, order, 1),
        lambda: hadamard_quantize(x, None, order, 1, 4, True),
    ):
        with pytest.raises(ValueError, match=f"no Hadamard matrix of order {order}"):
            call()
