# SPDX-License-Identifier: Apache-2.0
"""KV4 store by the compiled kernels."""

from ctypes import byref

import torch

from ..cpu import library
from ..cpu.library import StoreArguments, type_code
from ..hadamard.cpu import arguments as transform_arguments
from .layout import check_cache


def head_strides(x: torch.Tensor, name: str) -> tuple[int, int]:
    """Strides of the tokens and heads of ``[tokens, heads, head_dim]``.

    Raises:
        ValueError: when the elements of a head are not side by side on the CPU.
    """
    if x.stride(2) != 1 or x.device.type != "cpu":
        raise ValueError(
            f"heads of {name} must be contiguous on the CPU, got strides {x.stride()} "
            f"on {x.device}"
        )
    return x.stride(0), x.stride(1)


def kv4_store(
    key: torch.Tensor,
    value: torch.Tensor,
    kv_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    rotate_key: bool,
) -> None:
    """As the reference, byte for byte.

    Raises:
        ValueError: for arguments of another form, or a slot that the cache lacks; the
            other slots are written then.
    """
    head_dim = check_cache(kv_cache)
    blocks, heads, block_size, _ = kv_cache.shape
    shape = (slot_mapping.shape[0], heads, head_dim)
    for name, x in (("key", key), ("value", value)):
        if x.shape != shape or x.dtype != key.dtype:
            raise ValueError(
                f"{name} must be {key.dtype} {list(shape)}, got {x.dtype} "
                f"{list(x.shape)}"
            )
    slots = slot_mapping.to(torch.int64).contiguous()
    arguments = StoreArguments(
        key=key.data_ptr(),
        value=value.data_ptr(),
        key_strides=head_strides(key, "key"),
        value_strides=head_strides(value, "value"),
        type=type_code(key.dtype, "key"),
        tokens=shape[0],
        cache=kv_cache.data_ptr(),
        num_blocks=blocks,
        num_kv_heads=heads,
        block_size=block_size,
        head_dim=shape[2],
        block_stride=kv_cache.stride(0),
        head_stride=kv_cache.stride(1),
        slot_mapping=slots.data_ptr(),
    )
    transform = byref(transform_arguments(shape[2], 1, False)) if rotate_key else None
    if not library.functions().kv4_store(byref(arguments), transform):
        raise ValueError(
            f"slot_mapping has slot {int(slots.max())}, kv_cache {blocks} blocks of "
            f"{block_size}"
        )
