# SPDX-License-Identifier: Apache-2.0
"""Definition of rotary position embedding in front of the KV4 store."""

import torch

from ..kv4_store.generic import kv4_store


def check_rope(
    query: torch.Tensor,
    key: torch.Tensor,
    positions: torch.Tensor,
    cos_sin_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
) -> None:
    """Raise ValueError unless the shapes belong together.

    Only whole heads are rotated: a row of the cache has head_dim elements.
    """
    tokens, head_dim = query.shape[0], query.shape[-1]
    for name, x in (("query", query), ("key", key)):
        if x.dim() != 3 or x.shape[::2] != (tokens, head_dim) or x.dtype != query.dtype:
            raise ValueError(
                f"{name} must be {query.dtype} [{tokens}, heads, {head_dim}] as query, "
                f"got {x.dtype} {list(x.shape)}"
            )
    if positions.shape != (tokens,):
        raise ValueError(f"positions must be [{tokens}], got {list(positions.shape)}")
    if cos_sin_cache.dim() != 2 or cos_sin_cache.shape[1] != head_dim:
        raise ValueError(
            f"cos_sin_cache must be [max_position, {head_dim}], got "
            f"{list(cos_sin_cache.shape)}"
        )
    if slot_mapping.dim() != 1 or slot_mapping.shape[0] > tokens:
        raise ValueError(
            f"slot_mapping must have at most {tokens} slots, got "
            f"{list(slot_mapping.shape)}"
        )


def rope(
    x: torch.Tensor, positions: torch.Tensor, cos_sin_cache: torch.Tensor
) -> torch.Tensor:
    """Rotary position embedding with halves as pairs (Su et al., RoFormer, 2021).

    Products and their sums in float32, each rounded by itself, and the result once to
    the dtype of x. Products of 16-bit floats are exact there, so these are the bits of
    vLLM's own kernel, which may fuse a product with a sum.

    Args:
        x: ``[tokens, heads, head_dim]``; elements j and j + head_dim / 2 are a pair.
        positions: integer ``[tokens]``.
        cos_sin_cache: ``[max_position, head_dim]``, cosines of a position, then sines.

    Raises:
        ValueError: for a position that the cache does not have.
    """
    rows = cos_sin_cache.shape[0]
    outside = positions[(positions < 0) | (positions >= rows)]
    if len(outside):
        raise ValueError(f"positions must be in [0, {rows}), got {int(outside[0])}")
    cos, sin = cos_sin_cache[positions.long()].float().unsqueeze(1).chunk(2, dim=-1)
    low, high = x.float().chunk(2, dim=-1)
    rotated = torch.cat((low * cos - high * sin, high * cos + low * sin), dim=-1)
    return rotated.to(x.dtype)


def rope_kv4_store(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    positions: torch.Tensor,
    cos_sin_cache: torch.Tensor,
    kv_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    rotate_key: bool,
) -> None:
    """Rotate queries and keys by their positions in place, then store K and V.

    Args:
        query: ``[tokens, num_heads, head_dim]``.
        key: ``[tokens, num_kv_heads, head_dim]``.
        value: as key.
        positions, cos_sin_cache: as :func:`rope` takes them.
        kv_cache, rotate_key: as ``kv4_store`` takes them.
        slot_mapping: as there, of the first tokens; those after them are padding.

    Raises:
        ValueError: for shapes that do not belong together, a position without a row
            in cos_sin_cache, and as ``kv4_store``.
    """
    check_rope(query, key, positions, cos_sin_cache, slot_mapping)
    for x in (query, key):
        x.copy_(rope(x, positions, cos_sin_cache))
    stored = slot_mapping.shape[0]
    kv4_store(key[:stored], value[:stored], kv_cache, slot_mapping, rotate_key)
