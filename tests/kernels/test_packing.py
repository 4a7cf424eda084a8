# SPDX-License-Identifier: Apache-2.0
"""Packing of codes into int32 words, exhaustively for every width."""

import itertools
from collections.abc import Callable

import pytest
import torch

from vllm_lowbit.kernels.packing import (
    PACKABLE_BITS,
    codes_per_block,
    pack,
    packed_columns,
    unpack,
)

every_width = pytest.mark.parametrize("bits", PACKABLE_BITS)
field_widths = pytest.mark.parametrize("bits", [2, 4, 8])


def random_codes(bits: int, *shape: int) -> torch.Tensor:
    half = 1 << (bits - 1)
    return torch.randint(-half, half, shape, dtype=torch.int8)


def words_by_definition(row: list[int], bits: int) -> list[int]:
    """The documented layout in Python integers, as signed words."""
    fields = [code + (1 << (bits - 1)) for code in row]
    block = 32 // bits if bits in (2, 4, 8) else 32
    fields += [1 << (bits - 1)] * (-len(fields) % block)
    words = []
    for start in range(0, len(fields), block):
        part = fields[start : start + block]
        if block == 32:
            for plane in range(bits):
                words.append(sum((f >> plane & 1) << i for i, f in enumerate(part)))
        else:
            words.append(sum(f << bits * i for i, f in enumerate(part)))
    return [w - (1 << 32) if w >> 31 else w for w in words]


@every_width
@pytest.mark.parametrize("background", [-1, 0], ids=["ones", "zeros"])
def test_every_code_at_every_position(bits: int, background: int) -> None:
    """Each code at each place of two blocks, the rest all ones or all zeros."""
    half, columns = 1 << (bits - 1), 2 * codes_per_block(bits)
    rest = half - 1 if background else -half
    codes = torch.full((columns, 1 << bits, columns), rest, dtype=torch.int8)
    values = torch.arange(-half, half, dtype=torch.int8)
    for position in range(columns):
        codes[position, :, position] = values
    words = pack(codes, bits)
    assert words.dtype == torch.int32
    assert words.shape == (columns, 1 << bits, packed_columns(columns, bits))
    back = unpack(words, bits, columns)
    assert back.dtype == torch.int8
    assert torch.equal(back, codes)


def test_all_nibble_pairs() -> None:
    pairs = list(itertools.product(range(-8, 8), repeat=2))
    words = pack(torch.tensor(pairs, dtype=torch.int8), 4)
    assert len(set(words.flatten().tolist())) == 256
    for (low, high), word in zip(pairs, words.flatten().tolist(), strict=True):
        assert word & 0xFF == (low + 8) | (high + 8) << 4
    assert torch.equal(unpack(words, 4, 2), torch.tensor(pairs, dtype=torch.int8))


@every_width
def test_ragged_columns(bits: int) -> None:
    block = codes_per_block(bits)
    for columns in (*range(1, 2 * block + 2), 63, 1000):
        codes = random_codes(bits, 3, columns)
        words = pack(codes, bits)
        assert torch.equal(unpack(words, bits, columns), codes)
        for row, packed in zip(codes.tolist(), words.tolist(), strict=True):
            assert packed == words_by_definition(row, bits)


@every_width
def test_padding_is_code_zero(bits: int) -> None:
    block = codes_per_block(bits)
    words = pack(random_codes(bits, 4, block + 1), bits)
    padded = unpack(words, bits, 2 * block)
    assert (padded[:, block + 1 :] == 0).all()


@every_width
def test_words_are_dense(bits: int) -> None:
    """Whole blocks waste no bit: the size is exactly bits per code."""
    block = codes_per_block(bits)
    for blocks in (1, 2, 5):
        assert packed_columns(blocks * block, bits) * 32 == blocks * block * bits
    assert packed_columns(1, bits) == packed_columns(block, bits)
    assert packed_columns(block + 1, bits) == packed_columns(2 * block, bits)


@every_width
def test_shapes_and_strides(bits: int) -> None:
    codes = random_codes(bits, 2, 3, 5, 40)
    assert torch.equal(unpack(pack(codes, bits), bits, 40), codes)
    row = random_codes(bits, 40)
    assert torch.equal(unpack(pack(row, bits), bits, 40), row)
    turned = random_codes(bits, 40, 6).t()
    assert torch.equal(pack(turned, bits), pack(turned.contiguous(), bits))
    words = pack(turned, bits).t().contiguous().t()
    assert torch.equal(unpack(words, bits, 40), turned)
    assert pack(random_codes(bits, 0, 40), bits).shape[0] == 0


@field_widths
def test_whole_words_are_those_of_compressed_tensors(bits: int) -> None:
    helpers = pytest.importorskip(
        "compressed_tensors.compressors.pack_quantized.helpers"
    )
    codes = random_codes(bits, 7, 96)
    theirs = helpers.pack_to_int32(codes, bits)
    assert torch.equal(pack(codes, bits), theirs)


@field_widths
@pytest.mark.parametrize("columns", [1, 13, 63, 1000])
def test_each_side_reads_the_other(bits: int, columns: int) -> None:
    """Padding may differ; the codes do not."""
    helpers = pytest.importorskip(
        "compressed_tensors.compressors.pack_quantized.helpers"
    )
    codes = random_codes(bits, 3, columns)
    assert torch.equal(unpack(helpers.pack_to_int32(codes, bits), bits, columns), codes)
    theirs = helpers.unpack_from_int32(pack(codes, bits), bits, codes.shape)
    assert torch.equal(theirs, codes)


@pytest.mark.parametrize("bits", [0, 1, 5, 7, 9])
@pytest.mark.parametrize(
    "call",
    [
        codes_per_block,
        lambda bits: packed_columns(8, bits),
        lambda bits: pack(torch.zeros(1, 8, dtype=torch.int8), bits),
        lambda bits: unpack(torch.zeros(1, 1, dtype=torch.int32), bits, 8),
    ],
    ids=["codes_per_block", "packed_columns", "pack", "unpack"],
)
def test_width_without_a_packing(call: Callable[[int], object], bits: int) -> None:
    with pytest.raises(ValueError, match=r"one of \(2, 3, 4, 6, 8\), got " + str(bits)):
        call(bits)


@pytest.mark.parametrize("bits", [2, 3, 4, 6])
def test_code_out_of_range(bits: int) -> None:
    half = 1 << (bits - 1)
    for bad in (half, -half - 1):
        codes = torch.zeros(2, 9, dtype=torch.int8)
        codes[1, 4] = bad
        low, high = min(0, bad), max(0, bad)
        with pytest.raises(ValueError) as error:
            pack(codes, bits)
        assert str(error.value) == (
            f"codes must lie in [{-half}, {half - 1}] for {bits} bits, got "
            f"[{low}, {high}]"
        )


@every_width
def test_wrong_number_of_words(bits: int) -> None:
    words = pack(random_codes(bits, 2, 64), bits)
    count = words.shape[1]
    for columns in (64 - codes_per_block(bits), 64 + 1):
        need = packed_columns(columns, bits)
        message = f"{columns} codes of {bits} bits take {need} words, got {count}"
        with pytest.raises(ValueError, match=message):
            unpack(words, bits, columns)
