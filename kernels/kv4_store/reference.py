# SPDX-License-Identifier: Apache-2.0
"""Definition of writing K and V into the packed cache, one token at a time."""

import torch

from ..grid import kv_encode, kv_parameters
from ..hadamard.generic import hadamard
from .layout import pack_nibbles, planes


def encode_heads(
    x: torch.Tensor, rotate: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rotate (optionally) and quantize the heads of K or V.

    Args:
        x: ``[tokens, num_kv_heads, head_dim]``.
        rotate: apply the orthonormal Hadamard of order head_dim first.

    Returns:
        packed bytes ``[tokens, num_kv_heads, head_dim / 2]``, scale and zero fp16
        ``[tokens, num_kv_heads]``.
    """
    x = hadamard(x, x.shape[-1]) if rotate else x.float()
    scale, zero = kv_parameters(x)
    packed = pack_nibbles(kv_encode(x, scale, zero))
    return packed, scale.squeeze(-1), zero.squeeze(-1)


def kv4_store(
    key: torch.Tensor,
    value: torch.Tensor,
    kv_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    rotate_key: bool,
) -> None:
    """Quantize K and V into their slots of the paged cache, in place.

    A rotation of V is folded into the layers around it and not done here.

    Args:
        key: ``[tokens, num_kv_heads, head_dim]``, after RoPE.
        value: same shape.
        kv_cache: uint8 ``[blocks, num_kv_heads, block_size, head_dim + 8]``.
        slot_mapping: integer ``[tokens]``, ``block * block_size + offset``; a
            negative slot is padding and is skipped.
        rotate_key: store ``H k``; attention then rotates the query alike.

    Raises:
        ValueError: when the cache is not of that form.
    """
    cache = planes(kv_cache)
    block_size = kv_cache.shape[2]
    k_codes, k_scale, k_zero = encode_heads(key, rotate_key)
    v_codes, v_scale, v_zero = encode_heads(value, rotate=False)
    for token, slot in enumerate(slot_mapping.tolist()):
        if slot < 0:
            continue
        block, offset = divmod(slot, block_size)
        cache.k_codes[block, :, offset] = k_codes[token]
        cache.v_codes[block, :, offset] = v_codes[token]
        cache.k_scale[block, :, offset] = k_scale[token]
        cache.k_zero[block, :, offset] = k_zero[token]
        cache.v_scale[block, :, offset] = v_scale[token]
        cache.v_zero[block, :, offset] = v_zero[token]
