# SPDX-License-Identifier: Apache-2.0
"""RoPE and the KV4 store by one Triton kernel: the bytes of the reference.

vLLM 0.32 calls it from a pass over compiled graphs, on ROCm alone: its ``PassConfig``
turns ``fuse_rope_kvcache`` off elsewhere, so on CUDA the two stay apart. The pass is on
by default with AITER and else by ``--compilation-config`` with ``pass_config:
{fuse_rope_kvcache: true}``; both need ``use_inductor_graph_partition: true`` or
``splitting_ops: []``, or vLLM turns it off again. It takes batches of up to
``rope_kvcache_fusion_max_token_num`` tokens (256), and layers whose queries and keys go
from the fused projection into RoPE directly: norms between them do not match.
"""

import torch

from ..gpu.target import architecture
from ..kv4_store.triton import (
    ROWS,
    TYPES,
    check_devices,
    check_integers,
    check_pages,
    check_rows,
    next_power_of_two,
    rotation_table,
    row_warps,
)
from .reference import check_rope


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
    """As the reference, byte for byte; nothing waits for the device.

    Only the device knows positions and slots: a token whose position cos_sin_cache
    does not have becomes NaN, and a slot that the cache does not have is skipped.

    Raises:
        ValueError: for a dtype, shape, stride or device that the kernel cannot take.
    """
    architecture(query.device)  # refuses other devices
    head_dim = check_pages(kv_cache)
    blocks, kv_heads, block_size, _ = kv_cache.shape
    tokens, heads = query.shape[:2]
    check_integers(slot_mapping, "slot_mapping", (-1,))
    check_integers(positions, "positions", (tokens,))
    check_rows(query, "query", (tokens, heads, head_dim))
    check_rows(key, "key", (tokens, kv_heads, head_dim))
    check_rows(value, "value", (tokens, kv_heads, head_dim))
    check_rope(query, key, positions, cos_sin_cache, slot_mapping)
    if cos_sin_cache.dtype not in TYPES or cos_sin_cache.stride(1) != 1:
        raise ValueError(
            f"cos_sin_cache must have contiguous rows of {', '.join(map(str, TYPES))},"
            f" got {cos_sin_cache.dtype} with strides {cos_sin_cache.stride()}"
        )
    check_devices(
        query.device,
        key=key,
        value=value,
        positions=positions,
        cos_sin_cache=cos_sin_cache,
        kv_cache=kv_cache,
        slot_mapping=slot_mapping,
    )
    if tokens == 0:
        return
    from .triton_kernel import rope_store

    half = head_dim // 2
    rope_store[(-(-tokens // ROWS), kv_heads + heads)](
        query,
        key,
        value,
        positions,
        cos_sin_cache,
        kv_cache,
        slot_mapping,
        rotation_table(head_dim, query.device),
        tokens,
        slot_mapping.shape[0],
        cos_sin_cache.shape[0],
        blocks * block_size,
        kv_heads,
        *query.stride()[:2],
        *key.stride()[:2],
        *value.stride()[:2],
        cos_sin_cache.stride(0),
        *kv_cache.stride()[:2],
        BLOCK_SIZE=block_size,
        HALF=half,
        PADDED=next_power_of_two(head_dim),
        PADDED_HALF=next_power_of_two(half),
        ROWS=ROWS,
        ROTATE=rotate_key,
        num_warps=row_warps(head_dim),
        enable_fp_fusion=False,
    )
