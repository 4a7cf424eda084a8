# SPDX-License-Identifier: Apache-2.0
"""Packing of weight codes into int32 words, as the checkpoint stores them.

Fields are unsigned: ``code + 2^(bits-1)``. Words run along the last (input)
dimension, which is padded to whole words with the field of code 0.

* 2, 4 and 8 bits: ``32 / bits`` fields a word, the first in the lowest bits: the
  order of compressed-tensors' ``pack-quantized`` format.
* 3 and 6 bits: bit planes. 32 codes take ``bits`` words; word ``p`` holds bit
  ``p`` of all 32, code ``i`` at bit ``i``. No bit is lost to padding.
"""

import torch

PACKABLE_BITS = (2, 3, 4, 6, 8)


def codes_per_block(bits: int) -> int:
    """Codes that share a block of words: the unit the input is padded to.

    Raises:
        ValueError: for a width that has no packing.
    """
    if bits not in PACKABLE_BITS:
        raise ValueError(f"bits must be one of {PACKABLE_BITS}, got {bits}")
    return 32 // bits if 32 % bits == 0 else 32


def packed_columns(columns: int, bits: int) -> int:
    """Number of int32 words that hold a row of ``columns`` codes."""
    block = codes_per_block(bits)
    blocks = -(-columns // block)
    return blocks if block != 32 else blocks * bits


def pack(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Pack int8 codes ``[..., n]`` to int32 ``[..., packed_columns(n, bits)]``.

    Raises:
        ValueError: for an unknown width or a code outside of it.
    """
    block = codes_per_block(bits)
    offset = 1 << (bits - 1)
    fields = codes.to(torch.int64) + offset
    if fields.numel() and not 0 <= int(fields.min()) <= int(fields.max()) < 1 << bits:
        raise ValueError(
            f"codes must lie in [{-offset}, {offset - 1}] for {bits} bits, got "
            f"[{int(codes.min())}, {int(codes.max())}]"
        )
    short = -codes.shape[-1] % block
    fields = torch.nn.functional.pad(fields, (0, short), value=offset)
    fields = fields.unflatten(-1, (-1, block))
    place = torch.arange(block, device=codes.device)
    if block == 32:
        planes = torch.arange(bits, device=codes.device).unsqueeze(-1)
        words = ((fields.unsqueeze(-2) >> planes & 1) << place).sum(-1).flatten(-2)
    else:
        words = (fields << place * bits).sum(-1)
    return _as_int32(words)


def unpack(words: torch.Tensor, bits: int, columns: int) -> torch.Tensor:
    """Inverse of :func:`pack`: int8 codes ``[..., columns]``.

    Raises:
        ValueError: for an unknown width, or when the words cannot hold ``columns``.
    """
    block = codes_per_block(bits)
    if words.shape[-1] != packed_columns(columns, bits):
        raise ValueError(
            f"{columns} codes of {bits} bits take {packed_columns(columns, bits)} "
            f"words, got {words.shape[-1]}"
        )
    place = torch.arange(block, device=words.device, dtype=torch.int32)
    if block == 32:
        bit = words.unflatten(-1, (-1, bits)).unsqueeze(-1) >> place & 1
        planes = torch.arange(bits, device=words.device, dtype=torch.int32)
        fields = (bit << planes.unsqueeze(-1)).sum(-2, dtype=torch.int32)
    else:
        fields = words.unsqueeze(-1) >> place * bits & ((1 << bits) - 1)
    codes = fields.flatten(-2)[..., :columns] - (1 << (bits - 1))
    return codes.to(torch.int8)


def _as_int32(words: torch.Tensor) -> torch.Tensor:
    """Reinterpret the low 32 bits of non-negative int64 words as int32."""
    return torch.where(words >= 1 << 31, words - (1 << 32), words).to(torch.int32)
