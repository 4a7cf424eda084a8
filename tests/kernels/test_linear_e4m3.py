# SPDX-License-Identifier: Apache-2.0
"""4-bit codes as e4m3 numbers: their PTX, and sums as tensor cores are known to add."""

import operator

import pytest
import torch

pytest.importorskip("triton")

from vllm_lowbit.kernels.gpu import configs
from vllm_lowbit.kernels.gpu.target import E4M3_SUMS
from vllm_lowbit.kernels.linear_w4a4 import triton_kernel
from vllm_lowbit.kernels.linear_w4a4.triton import MAX_K

# After the leading one, of what a tensor core adds and of what it writes.
HOPPER, BLACKWELL = (13, 13), (25, 23)
OPERATIONS = {
    "shl.b32": operator.lshift,
    "shr.u32": operator.rshift,
    "and.b32": operator.and_,
    "add.u32": operator.add,
}


def executed(ptx: str, **registers: torch.Tensor) -> dict[str, torch.Tensor]:
    """Registers (int64 tensors of 32 bits) after a few kinds of instructions."""
    for line in ptx.strip("{} ").split(";"):
        name, _, operands = line.strip().partition(" ")
        target, *sources = (o.strip() for o in operands.split(","))
        if not name or name == ".reg":
            continue
        a, b, *rest = (
            registers[s] if s in registers else int(s, 16 if "x" in s else 10)
            for s in sources
        )
        if name == "prmt.b32":
            assert (b, rest) == (0, [0xBA98]), "replicates the signs of a's bytes"
            value = (a >> 7 & 0x01010101) * 0xFF
        elif name == "lop3.b32":
            assert rest[1] == (0xF0 ^ 0xCC) & 0xAA, "(a ^ b) & c"
            value = (a ^ b) & rest[0]
        else:
            value = OPERATIONS[name](a, b)
        registers[target] = value & 0xFFFFFFFF
    return registers


def words(codes: torch.Tensor) -> torch.Tensor:
    """Four bytes each, the first lowest."""
    return codes.view(torch.int32).long() & 0xFFFFFFFF


def numbers(value: torch.Tensor) -> torch.Tensor:
    e4m3 = value.to(torch.uint32).view(torch.uint8).view(torch.float8_e4m3fn)
    return e4m3.float() * 2**9


def test_codes() -> None:
    codes = torch.cartesian_prod(*[torch.arange(-8, 8, dtype=torch.int8)] * 4)
    found = executed(triton_kernel.E4M3_CODES.value, **{"$1": words(codes.flatten())})
    assert torch.equal(numbers(found["$0"]), codes.flatten().float())


def test_planes() -> None:
    pairs = torch.randint(-128, 128, (1 << 14,), dtype=torch.int8)
    pairs[:256] = torch.arange(-128, 128)
    low, high = pairs << 4 >> 4, pairs >> 4
    found = executed(triton_kernel.E4M3_PLANES.value, **{"$2": words(pairs)})
    assert torch.equal(numbers(found["$0"]), low.float())
    assert torch.equal(numbers(found["$1"]), high.float())
    found = executed(triton_kernel.SIXTEENFOLD_PLANES.value, **{"$2": words(pairs)})
    for name, plane in (("$0", low), ("$1", high)):
        bytes_ = found[name].to(torch.uint32).view(torch.int8)
        assert torch.equal(bytes_, plane << 4)


def cut(value: torch.Tensor, exponent: torch.Tensor, bits: int) -> torch.Tensor:
    """Without what is more than so many bits below 2^exponent."""
    step = 2.0 ** (exponent - bits)
    return torch.trunc(value / step) * step


def added(products: torch.Tensor, widths: tuple[int, int]) -> torch.Tensor:
    """Sums over the last dimension as of a tensor core, 32 products at a time.

    All products of the codes have the exponent 6, in units of the least one.
    """
    total = torch.zeros_like(products[..., 0])
    for some in products.split(32, -1):
        _, exponent = torch.frexp(total)
        largest = (exponent - 1).clamp(min=6).double()
        terms = torch.cat((some, total.unsqueeze(-1)), -1)
        total = cut(terms, largest.unsqueeze(-1), widths[0]).sum(-1)
        total = cut(total, torch.frexp(total)[1].double() - 1, widths[1])
    return total


def extreme(k: int) -> torch.Tensor:
    """Products of 4-bit codes whose sums are large, and odd, or anything."""
    products = torch.full((5, k), 64.0, dtype=torch.float64)
    products[0, 0] = products[1, -1] = 1
    products[2, 1::2] = -56
    products[3] = torch.randint(0, 8, (k,)) * torch.randint(0, 9, (k,))
    products[4] = -49
    return products


def test_sums_between_promotions_are_exact_on_hopper() -> None:
    most = E4M3_SUMS["sm_90"]
    assert most is not None
    products = extreme(most)
    assert torch.equal(added(products, HOPPER), products.sum(-1))
    # Four times as many are not: promotion is needed.
    products = extreme(4 * most)
    assert not torch.equal(added(products, HOPPER), products.sum(-1))


def test_sums_of_any_k_are_exact_on_blackwell() -> None:
    assert E4M3_SUMS["sm_103"] is None
    products = extreme(MAX_K - 1)
    assert torch.equal(added(products, BLACKWELL), products.sum(-1))


def test_tables_ask_for_e4m3_where_it_is() -> None:
    taken = {
        (arch, name)
        for arch in (*configs.architectures(), configs.FALLBACK)
        for name, schemes in configs.table(arch).items()
        for rows in schemes.values()
        if any(row.config.e4m3 for row in rows)
    }
    assert ("sm_103", "linear_w4a4") in taken
    assert {arch for arch, _ in taken} <= set(E4M3_SUMS)
    assert all(name.endswith("w4a4") for _, name in taken)
