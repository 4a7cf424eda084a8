# SPDX-License-Identifier: Apache-2.0
"""Codes, scales and zero points against the tools' own ways of reading a weight."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from vllm_lowbit.errors import CheckpointError
from vllm_lowbit.kernels.grid import decode
from vllm_lowbit.takeover.checkpoint import read_quantization
from vllm_lowbit.takeover.foreign import ForeignFormat

LAYER = "model.layers.0."
LINEARS = (("self_attn.k_proj", 128, 128), ("mlp.down_proj", 128, 256))
Tensors = dict[str, torch.Tensor]
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def read(directory: Path, linear: str) -> tuple[ForeignFormat, Tensors]:
    foreign = read_quantization(str(directory))[1]
    assert isinstance(foreign, ForeignFormat)
    prefix = f"{LAYER}{linear}."
    tensors = load_file(directory / "model.safetensors")
    return foreign, {
        name.removeprefix(prefix): tensor
        for name, tensor in tensors.items()
        if name.startswith(prefix)
    }


def converted(foreign: ForeignFormat, tensors: Tensors, n: int, k: int) -> torch.Tensor:
    """The weight our operators compute with, float32 ``[n, k]``."""
    weight = foreign.convert("x", tensors, n, k)
    assert weight.codes.dtype == torch.int8 and weight.codes.shape == (n, k)
    assert weight.scale.dtype == torch.float32 and weight.input_scale is None
    assert (weight.zero_point is None) is foreign.scheme.weights.symmetric
    zero_point = torch.zeros_like(weight.scale, dtype=torch.int32)
    if weight.zero_point is not None:
        assert weight.zero_point.shape == weight.scale.shape
        zero_point = weight.zero_point.int()
    groups = weight.codes.unflatten(1, (weight.scale.shape[1], -1))
    return decode(groups, weight.scale[..., None], zero_point[..., None]).flatten(1)


@pytest.mark.parametrize("kind", ["packed", "w4a4", "w8a8", "int4"])
@pytest.mark.parametrize(("linear", "n", "k"), LINEARS)
def test_compressed_tensors_library(
    originals: dict[str, Path], kind: str, linear: str, n: int, k: int
) -> None:
    """Its own decompression, in float32, gives the same weight bit for bit."""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationScheme

    foreign, tensors = read(originals[kind], linear)
    weights = foreign.scheme.weights
    scheme = QuantizationScheme(
        targets=["Linear"],
        weights={
            "num_bits": weights.bits,
            "symmetric": weights.symmetric,
            "group_size": weights.group_size,
            "strategy": "channel" if weights.group_size is None else "group",
        },
    )
    name = foreign.name.partition(" ")[2]
    state = {**tensors, "weight_scale": tensors["weight_scale"].float()}
    theirs = BaseCompressor.get_value_from_registry(name).decompress(state, scheme)
    assert torch.equal(converted(foreign, tensors, n, k), theirs["weight"])


def fields(words: torch.Tensor, bits: int, order: Any, dim: int) -> torch.Tensor:
    """Unpacked one field at a time, in Python's integers."""
    rows = words.t() if dim == 0 else words
    out = torch.zeros(len(rows), rows.shape[1] * len(order), dtype=torch.int64)
    for i, row in enumerate(rows.tolist()):
        for j, word in enumerate(row):
            for place, column in enumerate(order):
                field = (word % (1 << 32)) // (1 << bits * place) % (1 << bits)
                out[i, j * len(order) + column] = field
    return out.t() if dim == 0 else out


@pytest.mark.parametrize("kind", ["gptq", "gptq8", "gptq_v2", "awq", "awq_symmetric"])
@pytest.mark.parametrize(("linear", "n", "k"), LINEARS)
def test_gptq_and_awq_by_hand(
    originals: dict[str, Path], kind: str, linear: str, n: int, k: int
) -> None:
    foreign, tensors = read(originals[kind], linear)
    bits = foreign.scheme.weights.bits
    plain = range(32 // bits)
    awq = kind.startswith("awq")
    u = fields(tensors["qweight"], bits, AWQ_ORDER if awq else plain, int(awq))
    z = fields(tensors["qzeros"], bits, AWQ_ORDER if awq else plain, 1)
    z += int(kind in ("gptq", "gptq8"))
    size = k // len(z)
    expected = torch.stack(
        [(u[i] - z[i // size]) * tensors["scales"][i // size].float() for i in range(k)]
    )
    assert torch.equal(converted(foreign, tensors, n, k), expected.t())


@pytest.mark.parametrize("kind", ["packed", "w8a8", "gptq", "gptq_v2", "awq"])
def test_is_close_to_what_was_rounded(originals: dict[str, Path], kind: str) -> None:
    plain = load_file(originals["plain"] / "model.safetensors")
    for linear, n, k in LINEARS:
        foreign, tensors = read(originals[kind], linear)
        weight = plain[f"{LAYER}{linear}.weight"].float()
        apart = (converted(foreign, tensors, n, k) - weight).norm() / weight.norm()
        assert apart < (0.02 if kind == "w8a8" else 0.2)


@pytest.mark.parametrize("kind", ["w4a4", "gptq", "awq_symmetric"])
def test_lowest_symmetric_code(originals: dict[str, Path], kind: str) -> None:
    """Words of zeros are the field 0: a code that our own checkpoints never hold."""
    foreign, tensors = read(originals[kind], "self_attn.k_proj")
    for name in ("weight_packed", "qweight"):
        if name in tensors:
            tensors[name].zero_()
    weight = foreign.convert("x", tensors, 128, 128)
    assert weight.codes.unique().tolist() == [-8] == [foreign.grid.code_min]
    assert foreign.grid.max_difference == 8


@pytest.mark.parametrize(
    ("kind", "tensor", "value", "message"),
    [
        (
            "packed",
            "weight_scale",
            0.0,
            "x.weight_scale holds 0.0; scales are positive",
        ),
        ("w4a4", "weight_scale", float("nan"), "x.weight_scale holds nan"),
        ("gptq", "scales", -1.0, "x.scales holds -1.0"),
        ("awq", "scales", float("inf"), "x.scales holds inf"),
        ("int4", "weight", 8, r"x.weight holds the code 8, outside of \[-8, 7\]"),
        ("int4", "weight_zero_point", -9, "x.weight_zero_point holds the value -9"),
        ("gptq", "qzeros", 0x33333333, "x.qzeros holds the zero point 4; config.json"),
        ("awq_symmetric", "qzeros", 0, "holds the zero point 0; .* is 8 throughout"),
        ("gptq8", "qzeros", 0, "holds the zero point 1; .* is 128 throughout"),
        ("gptq8", "qzeros", -1, "x.qzeros holds the field 255, a zero point of 0 or 2"),
        (
            "gptq",
            "qzeros",
            -1,
            "holds the field 15, .* of 0 or 16; .*Supported: gptq_v2",
        ),
    ],
)
def test_values_that_cannot_be(
    originals: dict[str, Path], kind: str, tensor: str, value: float, message: str
) -> None:
    foreign, tensors = read(originals[kind], "self_attn.k_proj")
    tensors[tensor][-1, -1] = value
    with pytest.raises(CheckpointError, match=message):
        foreign.convert("x", tensors, 128, 128)


def test_gptq_v2_has_every_zero_point(originals: dict[str, Path]) -> None:
    foreign, tensors = read(originals["gptq_v2"], "self_attn.k_proj")
    for value, zero_point in ((0, -8), (-1, 7)):
        tensors["qzeros"].fill_(value)
        found = foreign.convert("x", tensors, 128, 128).zero_point
        assert found is not None and found.unique().tolist() == [zero_point]
