# SPDX-License-Identifier: Apache-2.0
"""Integer linear by the compiled kernels: weights stay packed in memory.

Layout of a packed weight: blocks of 16 output channels, in each its groups of the
input, in each group chunks of 4, 8 or 16 columns in 64 bytes (8, 4, 2 bits), 16 in 192
(6 bits, a plane of nibbles and one of pairs) or 32 in 192 (3 bits, pairs and bits).
``cpu/tile.h`` has the order inside a chunk; columns beyond a group are padded. A byte
for each such column of one group is the end: the size tells the columns.
"""

from ctypes import byref
from typing import NamedTuple

import torch

from ..cpu import library
from ..cpu.library import (
    WeightArguments,
    matrix_shape,
    optional_pointer,
    pointer,
    type_code,
)
from ..packing import PACKABLE_BITS
from .reference import check_int32, check_scales

# Columns and bytes (over 16 channels) of a chunk.
_CHUNKS = {2: (16, 64), 3: (32, 192), 4: (8, 64), 6: (16, 192), 8: (4, 64)}
_INTEGERS = (torch.int8, torch.int16, torch.int32, torch.int64)


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
        ValueError: for a width without packing, a negative n, or groups that do not
            divide k.
    """
    if n < 0:
        raise ValueError(f"n must not be negative, got {n}")
    if bits not in PACKABLE_BITS:
        raise ValueError(f"bits must be one of {PACKABLE_BITS}, got {bits}")
    if k < 1 or groups < 1 or k % groups:
        raise ValueError(f"{groups} groups do not divide {k} columns")
    columns, size = _CHUNKS[bits]
    of_group = k // groups
    chunks = -(-n // 16) * groups * -(-of_group // columns)
    return chunks * size + -of_group % columns


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
        ValueError: for arguments of another form, or codes or zero points outside of
            their width.
    """
    n, k = matrix_shape(codes, "codes")
    _, groups = matrix_shape(scale, "scale")
    size = packed_bytes(n, k, groups, bits)
    codes, scale = codes.contiguous(), scale.contiguous()
    fields = pointer(codes, "codes", torch.int8, (n, k))
    pointer(scale, "scale", torch.float32, (n, groups))
    _check_width(codes, "codes", bits)
    out = torch.zeros(size, dtype=torch.uint8, device="cpu")
    arguments = WeightArguments(n=n, k=k, groups=groups, bits=bits)
    library.functions().pack_weight(byref(arguments), fields, out.data_ptr())
    sums = codes.view(n, groups, k // groups).sum(-1, dtype=torch.int32)
    zero = None
    if zero_point is not None:
        if zero_point.dtype not in _INTEGERS:
            raise ValueError(f"zero_point must be integer, got {zero_point.dtype}")
        zero_point = zero_point.contiguous()
        pointer(zero_point, "zero_point", zero_point.dtype, (n, groups))
        _check_width(zero_point, "zero_point", bits)
        zero_point = zero_point.to(torch.int32)
        sums -= zero_point * (k // groups)
        zero = _by_channel(zero_point + (1 << (bits - 1)))
    return PackedWeight(out, _by_channel(scale), zero, _by_channel(sums))


def _check_width(values: torch.Tensor, name: str, bits: int) -> None:
    """Raise ValueError naming the values that are not of so many bits."""
    half = 1 << (bits - 1)
    low, high = (int(v) for v in torch.aminmax(values)) if values.numel() else (0, 0)
    if low < -half or high >= half:
        raise ValueError(
            f"{name} of {bits} bits must lie in [{-half}, {half - 1}], got "
            f"[{low}, {high}]"
        )


def unpack_rows(
    fields: torch.Tensor, index: torch.Tensor, n: int, k: int, bits: int
) -> torch.Tensor:
    """Rows of an 8-bit weight without groups: int8 codes ``[indices, k]``.

    Args:
        fields: uint8, of a PackedWeight.
        index: int32 or int64 ``[indices]``, in ``[0, n)``; the values are not checked.
        n: output channels.
        k: input columns.
        bits: of the weight.

    Raises:
        ValueError: for another width, or arguments of another form.
    """
    # Traced by torch.compile: no check may look at the data.
    if bits != 8:
        raise ValueError(f"rows can be read from weights of 8 bits, not {bits}")
    size = packed_bytes(n, k, 1, bits)
    if fields.dtype != torch.uint8 or fields.shape != (size,):
        raise ValueError(
            f"fields must be torch.uint8 [{size}], got {fields.dtype} "
            f"{list(fields.shape)}"
        )
    if (
        index.dtype not in (torch.int32, torch.int64)
        or index.dim() != 1
        or index.device != fields.device
    ):
        raise ValueError(
            "index must be int32 or int64 with 1 dimension, on the device of fields "
            f"({fields.device}), got {index.dtype} {list(index.shape)} on "
            f"{index.device}"
        )
    blocks = fields[: size - -k % 4].view(-(-n // 16), -(-k // 4), 16, 4)
    rows = blocks[index // 16, :, index % 16].flatten(1)[:, :k]
    return (rows ^ 128).view(torch.int8)


def _by_channel(x: torch.Tensor) -> torch.Tensor:
    """``[n, groups]`` to ``[groups, n]``, zeros up to a multiple of 16."""
    return torch.nn.functional.pad(x, (0, 0, 0, -len(x) % 16)).t().contiguous()


def arguments_of(
    weight: PackedWeight, n: int, k: int, bits: int, code_max: int
) -> WeightArguments:
    """The kernels' description of a packed weight, checked.

    Args:
        weight: from :func:`pack`.
        n: output channels.
        k: input columns.
        bits: of the weight.
        code_max: bound on the magnitude of the integers it is multiplied with.

    Raises:
        ValueError: for tensors of another form, or sums that might not fit int32.
    """
    kept = getattr(weight.weight, _KEPT, None)
    if kept is not None and kept.is_for(weight, (n, k, bits, code_max)):
        return kept.arguments
    arguments = _checked(weight, n, k, bits, code_max)
    others = weight[1:]
    setattr(weight.weight, _KEPT, _Kept(others, (n, k, bits, code_max), arguments))
    return arguments


# Attribute of the fields of a weight.
_KEPT = "_lowbit_arguments"


class _Kept(NamedTuple):
    """What was checked of a weight: at one token that costs as much as a small layer.

    The other tensors are held, so none can be freed and its address taken by another.
    """

    others: tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]
    numbers: tuple[int, int, int, int]
    arguments: WeightArguments

    def is_for(self, weight: PackedWeight, numbers: tuple[int, int, int, int]) -> bool:
        """Whether these are the same tensors, where they were, and numbers."""
        (scale, zero, total), arguments = self.others, self.arguments
        return (
            weight.scale is scale
            and weight.zero is zero
            and weight.sum is total
            and numbers == self.numbers
            and weight.weight.data_ptr() == arguments.fields
            and scale.data_ptr() == arguments.scale
            and total.data_ptr() == arguments.sum
            and (zero is None or zero.data_ptr() == arguments.zero)
        )


def _checked(
    weight: PackedWeight, n: int, k: int, bits: int, code_max: int
) -> WeightArguments:
    groups, _ = matrix_shape(weight.scale, "weight_scale")
    shape = (groups, n + -n % 16)
    fields = (packed_bytes(n, k, groups, bits),)
    weight_max = 1 << (bits - 1) if weight.zero is None else (1 << bits) - 1
    check_int32(code_max * weight_max * (k // groups))
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
    code_max: int = 255,
) -> torch.Tensor:
    """As the reference, bit for bit.

    Args:
        codes: int8 ``[tokens, k]``.
        scale: float32 ``[tokens, 1]`` or ``[tokens, groups]``.
        zero_point: int32, of that shape.
        weight: from :func:`pack`.
        n: output channels.
        bits: of the weight.
        bias: float ``[n]`` or None.
        out_dtype: of the result ``[tokens, n]``.
        code_max: bound on ``|codes - zero_point|``.

    Raises:
        ValueError: for arguments of another form, or sums that might not fit int32.
    """
    m, k = matrix_shape(codes, "codes")
    arguments = arguments_of(weight, n, k, bits, code_max)
    _, scales = matrix_shape(scale, "scale")
    check_scales(scale, "scale", arguments.groups)
    out = torch.empty((m, n), dtype=out_dtype, device="cpu")
    bias = None if bias is None else bias.float()
    library.functions().linear_w4a4(
        byref(arguments),
        optional_pointer(bias, "bias", torch.float32, (n,)),
        pointer(codes, "codes", torch.int8, (m, k)),
        pointer(scale, "scale", torch.float32, (m, scales)),
        pointer(zero_point, "zero_point", torch.int32, (m, scales)),
        scales,
        m,
        type_code(out_dtype, "out_dtype"),
        out.data_ptr(),
    )
    return out
