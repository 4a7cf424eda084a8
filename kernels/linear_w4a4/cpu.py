# SPDX-License-Identifier: Apache-2.0
"""Integer linear by the compiled kernels: weights stay packed in memory.

Layout of a packed weight: blocks of 16 output channels, in each its groups of the
input, in each group chunks of 4, 8 or 16 columns in 64 bytes (8, 4, 2 bits), 16 in 192
(6 bits, a plane of nibbles and one of pairs) or 32 in 192 (3 bits, pairs and bits).
``cpu/tile.h`` has the order inside a chunk; columns beyond a group are padded.
"""

from ctypes import byref
from typing import NamedTuple

import torch

from ..cpu import library
from ..cpu.library import WeightArguments, optional_pointer, pointer, type_code
from ..packing import PACKABLE_BITS

# Columns and bytes (over 16 channels) of a chunk.
_CHUNKS = {2: (16, 64), 3: (32, 192), 4: (8, 64), 6: (16, 192), 8: (4, 64)}


class PackedWeight(NamedTuple):
    """A weight as the kernels read it; n is padded to multiples of 16.

    Attributes:
        weight: uint8, flat: the packed fields ``code + 2^(bits-1)``.
        scale: float32 ``[groups, n]``.
        zero: int32 ``[groups, n]``, the field that means zero; None when it is
            ``2^(bits-1)`` everywhere.
        sum: int32 ``[groups, n]``, of ``field - zero`` over the columns of a group.
    """

    weight: torch.Tensor
    scale: torch.Tensor
    zero: torch.Tensor | None
    sum: torch.Tensor


def packed_bytes(n: int, k: int, groups: int, bits: int) -> int:
    """Size of a packed weight.

    Raises:
        ValueError: for a width without packing, or groups that do not divide k.
    """
    if bits not in PACKABLE_BITS:
        raise ValueError(f"bits must be one of {PACKABLE_BITS}, got {bits}")
    if groups < 1 or k % groups:
        raise ValueError(f"{groups} groups do not divide {k} columns")
    columns, size = _CHUNKS[bits]
    return -(-n // 16) * groups * -(-(k // groups) // columns) * size


def pack(
    codes: torch.Tensor,
    scale: torch.Tensor,
    zero_point: torch.Tensor | None,
    bits: int,
) -> PackedWeight:
    """Pack a quantized weight.

    Args:
        codes: int8 ``[n, k]``.
        scale: float32 ``[n, groups]``.
        zero_point: integer ``[n, groups]`` or None.
        bits: width of the codes.

    Raises:
        ValueError: for arguments of another form, or codes outside of their width.
    """
    (n, k), groups = codes.shape, scale.shape[1]
    half = 1 << (bits - 1)
    out = torch.empty(packed_bytes(n, k, groups, bits), dtype=torch.uint8)
    low, high = (int(v) for v in torch.aminmax(codes)) if codes.numel() else (0, 0)
    if low < -half or high >= half:
        raise ValueError(f"codes of {bits} bits must lie in [{-half}, {half - 1}]")
    codes = codes.contiguous()
    arguments = WeightArguments(n=n, k=k, groups=groups, bits=bits)
    library.functions().pack_weight(
        byref(arguments), pointer(codes, "codes", torch.int8, (n, k)), out.data_ptr()
    )
    sums = codes.view(n, groups, -1).sum(-1, dtype=torch.int32)
    zero = None
    if zero_point is not None:
        sums -= zero_point.to(torch.int32) * (k // groups)
        zero = _by_channel(zero_point.to(torch.int32) + half)
    return PackedWeight(out, _by_channel(scale), zero, _by_channel(sums))


def unpack_rows(
    fields: torch.Tensor, index: torch.Tensor, n: int, k: int, bits: int
) -> torch.Tensor:
    """Rows of an 8-bit weight without groups: int8 codes ``[indices, k]``.

    Args:
        fields: uint8, of a PackedWeight.
        index: integer ``[indices]``.
        n: output channels.
        k: input columns.
        bits: of the weight.

    Raises:
        ValueError: for another width.
    """
    if bits != 8:
        raise ValueError(f"rows can be read from weights of 8 bits, not {bits}")
    blocks = fields.view(-(-n // 16), -1, 16, 4)
    rows = blocks[index // 16, :, index % 16].flatten(1)[:, :k]
    return (rows ^ 128).view(torch.int8)


def _by_channel(x: torch.Tensor) -> torch.Tensor:
    """``[n, groups]`` to ``[groups, n]``, zeros up to a multiple of 16."""
    return torch.nn.functional.pad(x, (0, 0, 0, -len(x) % 16)).t().contiguous()


def arguments_of(weight: PackedWeight, n: int, k: int, bits: int) -> WeightArguments:
    """The kernels' description of a packed weight, checked.

    Raises:
        ValueError: for tensors of another form.
    """
    groups = weight.scale.shape[0]
    shape = (groups, n + -n % 16)
    fields = (packed_bytes(n, k, groups, bits),)
    return WeightArguments(
        n,
        k,
        groups,
        bits,
        pointer(weight.weight, "weight", torch.uint8, fields),
        pointer(weight.scale, "weight_scale", torch.float32, shape),
        optional_pointer(weight.zero, "weight_zero", torch.int32, shape),
        pointer(weight.sum, "weight_sum", torch.int32, shape),
    )


def linear_w4a4(
    codes: torch.Tensor,
    scale: torch.Tensor,
    zero_point: torch.Tensor,
    weight: PackedWeight,
    n: int,
    bits: int,
    bias: torch.Tensor | None,
    out_dtype: torch.dtype,
) -> torch.Tensor:
    """As the reference, bit for bit.

    Args:
        codes: int8 ``[tokens, k]``.
        scale: float32 ``[tokens, 1]``.
        zero_point: int32 ``[tokens, 1]``.
        weight: from :func:`pack`.
        n: output channels.
        bits: of the weight.
        bias: float ``[n]`` or None.
        out_dtype: of the result ``[tokens, n]``.

    Raises:
        ValueError: for arguments of another form.
    """
    m, k = codes.shape
    out = torch.empty((m, n), dtype=out_dtype)
    bias = None if bias is None else bias.float()
    library.functions().linear_w4a4(
        byref(arguments_of(weight, n, k, bits)),
        optional_pointer(bias, "bias", torch.float32, (n,)),
        pointer(codes, "codes", torch.int8, (m, k)),
        pointer(scale, "scale", torch.float32, (m, 1)),
        pointer(zero_point, "zero_point", torch.int32, (m, 1)),
        m,
        type_code(out_dtype, "out_dtype"),
        out.data_ptr(),
    )
    return out
