# SPDX-License-Identifier: Apache-2.0
"""Weights as the Triton kernels read them.

A row is an output channel. Along the input its codes come in blocks, the last filled
up with zero codes; K padded is a multiple of 128 (256 for 3 bits).

* 4 bits: signed nibbles, a byte for two codes half a block apart: in a block of ``2 h``
  byte j holds code j (low) and code ``j + h`` (high). h is 64, or the size of groups
  that are smaller, so that a nibble plane never mixes groups.
* 8 and 6 bits: one code a byte.
* 2 bits: blocks of 128, byte j of 32 holds ``code + 2`` of columns j, j + 32, j + 64
  and j + 96, the first in the lowest bits.
* 3 bits: blocks of 256 in 96 bytes. 64 bytes hold the low two bits of ``code + 4`` as
  two blocks of 2 bits; bit p of byte j of the other 32 is the high bit of column
  ``j + 32 p``.

Integer products read 2 and 3 bits from nibbles (``widen``).
"""

from typing import NamedTuple

import torch

GROUP_SIZES = "32, 64 or a multiple of 128"
BLOCK = 128
WEIGHT_BITS = (2, 3, 4, 6, 8)


class GpuWeight(NamedTuple):
    """A weight in the form above.

    Attributes:
        weight: ``[n, bytes]``, int8 for a code a byte, else uint8.
        scale: float32 ``[groups, n]``.
        zero: int32 ``[groups, n]``, the code that means zero; None when symmetric.
        sum: int32 ``[groups, n]``, of ``code - zero`` over the columns of a group.
    """

    weight: torch.Tensor
    scale: torch.Tensor
    zero: torch.Tensor | None
    sum: torch.Tensor


def stored_bits(bits: int, widen: bool) -> int:
    """Width that codes of ``bits`` are stored in: 2, 3, 4 or 8.

    Args:
        bits: of the weight.
        widen: for integer products, which read 4 or 8.

    Raises:
        ValueError: for a width without a form.
    """
    if bits not in WEIGHT_BITS:
        raise ValueError(f"weight_bits must be one of {WEIGHT_BITS}, got {bits}")
    if bits > 4:
        return 8
    return 4 if widen else bits


def half_block(group_size: int, bits: int = 4) -> int:
    """Columns of a plane: codes at one place of neighbouring bytes.

    Args:
        group_size: of the weight, any multiple of 128 for one scale a channel.
        bits: stored width.

    Raises:
        ValueError: for groups that the kernels do not multiply.
    """
    if bits == 3 and group_size > 128 and group_size % 256:
        raise ValueError(
            f"group_size must be 32, 64, 128 or a multiple of 256 for 3 bits, got "
            f"{group_size}"
        )
    if group_size in (32, 64) or (group_size > 0 and group_size % BLOCK == 0):
        return 32 if bits in (2, 3) else min(64, group_size)
    raise ValueError(f"group_size must be {GROUP_SIZES}, got {group_size}")


def padded(k: int, bits: int) -> int:
    """Columns of a stored row, from those of the weight."""
    block = 256 if bits == 3 else BLOCK
    return -(-k // block) * block


def row_bytes(k: int, bits: int) -> int:
    """Bytes of a stored row of k columns, at a stored width."""
    return padded(k, bits) * bits // 8


def group_size_of(k: int, groups: int) -> int:
    """Columns of a group; 0 when there is one group only.

    Raises:
        ValueError: for groups that do not divide k, or of a size that no kernel has.
    """
    if groups < 1 or k % groups:
        raise ValueError(f"weight_scale has {groups} groups, which do not divide K {k}")
    if groups == 1:
        return 0
    half_block(k // groups)
    return k // groups


def pack(
    codes: torch.Tensor,
    scale: torch.Tensor,
    zero_point: torch.Tensor | None,
    bits: int,
    *,
    widen: bool,
) -> GpuWeight:
    """Put a quantized weight in its form; runs on the device of the codes.

    Args:
        codes: int8 ``[n, k]``.
        scale: float32 ``[n, groups]``.
        zero_point: integer ``[n, groups]`` or None.
        bits: width of the codes.
        widen: for ``linear_w4a4``, which reads 2 and 3 bits from nibbles.

    Raises:
        ValueError: for tensors of another form, codes or zero points outside of their
            width, or groups that the kernels do not multiply.
    """
    if codes.dim() != 2 or codes.dtype != torch.int8:
        raise ValueError(
            f"codes must be int8 [n, k], got {codes.dtype} {list(codes.shape)}"
        )
    n, k = codes.shape
    if scale.dtype != torch.float32 or scale.dim() != 2 or len(scale) != n:
        raise ValueError(
            f"scale must be float32 [{n}, groups], got {scale.dtype} "
            f"{list(scale.shape)}"
        )
    _check_width(codes, "codes", bits)
    stored, groups = stored_bits(bits, widen), scale.shape[1]
    size = group_size_of(k, groups)
    half_block(size or BLOCK, stored)
    sums = codes.view(n, groups, k // groups).sum(-1, dtype=torch.int32)
    zero = None
    if zero_point is not None:
        if zero_point.shape != scale.shape or zero_point.is_floating_point():
            raise ValueError(
                f"zero_point must be integer {list(scale.shape)}, got "
                f"{zero_point.dtype} {list(zero_point.shape)}"
            )
        _check_width(zero_point, "zero_point", bits)
        zero = zero_point.to(torch.int32)
        sums -= zero * (k // groups)
        zero = zero.t().contiguous()
    weight = _rows(codes, stored, size)
    return GpuWeight(weight, scale.t().contiguous(), zero, sums.t().contiguous())


def unpack(weight: torch.Tensor, k: int, bits: int, group_size: int) -> torch.Tensor:
    """int8 codes ``[n, k]`` of rows stored in ``bits``: the inverse of :func:`pack`.

    Args:
        weight: ``[n, bytes]``.
        k: columns of the weight.
        bits: stored width.
        group_size: 0 for one group.
    """
    if bits == 8:
        return weight[:, :k]
    if bits == 4:
        half = half_block(group_size or BLOCK)
        pairs = weight.view(torch.int8).unflatten(1, (-1, 1, half))
        return torch.cat((pairs << 4 >> 4, pairs >> 4), 2).flatten(1)[:, :k]
    if bits == 2:
        return (_planes(weight, 4, 2) - 2)[:, :k]
    blocks = weight.unflatten(1, (-1, 96))
    low = _planes(blocks[..., :64].flatten(1), 4, 2)
    high = _planes(blocks[..., 64:].flatten(1), 8, 1)
    return (low + 4 * high - 4)[:, :k]


def _rows(codes: torch.Tensor, bits: int, group_size: int) -> torch.Tensor:
    k = codes.shape[1]
    codes = torch.nn.functional.pad(codes, (0, padded(k, bits) - k))
    if bits == 8:
        return codes.contiguous()
    if bits == 4:
        half = half_block(group_size or BLOCK)
        pairs = codes.unflatten(1, (-1, 2, half))
        return (pairs[:, :, 1] << 4 | pairs[:, :, 0] & 15).flatten(1).view(torch.uint8)
    fields = (codes + (1 << bits - 1)).view(torch.uint8)
    if bits == 2:
        return _bytes(fields, 4, 2)
    low = _bytes(fields & 3, 4, 2).unflatten(1, (-1, 64))
    high = _bytes(fields >> 2, 8, 1).unflatten(1, (-1, 32))
    return torch.cat((low, high), 2).flatten(1)


def _bytes(fields: torch.Tensor, count: int, bits: int) -> torch.Tensor:
    """Fields 32 columns apart into a byte, the first lowest."""
    planes = fields.unflatten(1, (-1, count, 32))
    out = planes[:, :, 0].clone()
    for index in range(1, count):
        out |= planes[:, :, index] << index * bits
    return out.flatten(1)


def _planes(data: torch.Tensor, count: int, bits: int) -> torch.Tensor:
    """Inverse of :func:`_bytes`, int8."""
    blocks = data.unflatten(1, (-1, 1, 32))
    shifts = torch.arange(count, device=data.device, dtype=torch.uint8) * bits
    fields = blocks >> shifts.view(1, 1, -1, 1) & ((1 << bits) - 1)
    return fields.flatten(1).view(torch.int8)


def _check_width(values: torch.Tensor, name: str, bits: int) -> None:
    """Raise ValueError naming the values that are not of so many bits."""
    stored_bits(bits, True)
    half = 1 << (bits - 1)
    low, high = (int(v) for v in torch.aminmax(values)) if values.numel() else (0, 0)
    if low < -half or high >= half:
        raise ValueError(
            f"{name} of {bits} bits must lie in [{-half}, {half - 1}], got "
            f"[{low}, {high}]"
        )
