# SPDX-License-Identifier: Apache-2.0
"""Byte layout of a packed 4-bit KV page.

A page is the ``[block_size, head_dim + 8]`` bytes of one block and one KV head,
contiguous and planar:

====================  ===========================
``block_size * D/2``  K codes, byte j of a token holds element j (low nibble)
                      and element j + D/2 (high nibble)
``block_size * D/2``  V codes, likewise
``block_size * 2``    K scale, fp16
``block_size * 2``    K zero, fp16
``block_size * 2``    V scale, fp16
``block_size * 2``    V zero, fp16
====================  ===========================
"""

from typing import NamedTuple

import torch

PARAMETER_BYTES = 8
HEAD_DIMS = (64, 80, 96, 128, 256)


class Planes(NamedTuple):
    """Views into the pages of a cache; writing to them writes the cache."""

    k_codes: torch.Tensor  # uint8 [blocks, num_kv_heads, block_size, head_dim / 2]
    v_codes: torch.Tensor
    k_scale: torch.Tensor  # float16 [blocks, num_kv_heads, block_size]
    k_zero: torch.Tensor
    v_scale: torch.Tensor
    v_zero: torch.Tensor


def bytes_per_token(head_dim: int) -> int:
    """Bytes of K and V of one token in one KV head."""
    return head_dim + PARAMETER_BYTES


def check_head_dim(head_dim: int) -> None:
    """Raise ValueError for a head size without a 4-bit page layout."""
    if head_dim not in HEAD_DIMS:
        raise ValueError(f"head_dim must be one of {HEAD_DIMS}, got {head_dim}")


def check_cache(kv_cache: torch.Tensor) -> int:
    """The head_dim of a cache.

    Args:
        kv_cache: uint8 ``[blocks, num_kv_heads, block_size, head_dim + 8]``; the
            last two dimensions contiguous, the others of any stride.

    Raises:
        ValueError: for another dtype, rank, stride or head_dim.
    """
    if kv_cache.dtype != torch.uint8 or kv_cache.dim() != 4:
        raise ValueError(
            "kv_cache must be uint8 [blocks, num_kv_heads, block_size, head_dim + 8],"
            f" got {kv_cache.dtype} {list(kv_cache.shape)}"
        )
    width = kv_cache.shape[3]
    if kv_cache.stride()[2:] != (width, 1):
        raise ValueError(
            f"kv_cache pages must be contiguous, got strides {kv_cache.stride()}"
        )
    head_dim = width - PARAMETER_BYTES
    check_head_dim(head_dim)
    return head_dim


def planes(kv_cache: torch.Tensor) -> Planes:
    """Split a cache into its planes.

    Raises:
        ValueError: as :func:`check_cache`.
    """
    head_dim = check_cache(kv_cache)
    block_size, width = kv_cache.shape[2:]
    codes = block_size * head_dim // 2
    pages = kv_cache.as_strided(
        (*kv_cache.shape[:2], block_size * width), (*kv_cache.stride()[:2], 1)
    )
    k, v, parameters = pages.split([codes, codes, block_size * PARAMETER_BYTES], -1)
    halves = parameters.view(torch.float16).unflatten(-1, (4, block_size))
    return Planes(
        k.unflatten(-1, (block_size, head_dim // 2)),
        v.unflatten(-1, (block_size, head_dim // 2)),
        *halves.unbind(-2),
    )


def pack_nibbles(codes: torch.Tensor) -> torch.Tensor:
    """uint8 codes ``[..., head_dim]`` to bytes ``[..., head_dim / 2]``."""
    low, high = codes.chunk(2, dim=-1)
    return low | high << 4


def unpack_nibbles(packed: torch.Tensor) -> torch.Tensor:
    """Inverse of :func:`pack_nibbles`."""
    return torch.cat((packed & 15, packed >> 4), dim=-1)
