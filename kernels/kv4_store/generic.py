# SPDX-License-Identifier: Apache-2.0
"""KV4 store in plain torch: all tokens at once."""

import torch

from .layout import planes
from .reference import encode_heads


def kv4_store(
    key: torch.Tensor,
    value: torch.Tensor,
    kv_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    rotate_key: bool,
) -> None:
    """As the reference, byte for byte."""
    cache = planes(kv_cache)
    slots = slot_mapping[: key.shape[0]].long()
    live = slots >= 0
    if not bool(live.all()):
        key, value, slots = key[live], value[live], slots[live]
    block = slots // kv_cache.shape[2]
    offset = slots % kv_cache.shape[2]
    k = encode_heads(key, rotate_key)
    v = encode_heads(value, rotate=False)
    # Advanced indices around a slice put the token dimension first.
    cache.k_codes[block, :, offset], cache.v_codes[block, :, offset] = k[0], v[0]
    cache.k_scale[block, :, offset], cache.k_zero[block, :, offset] = k[1], k[2]
    cache.v_scale[block, :, offset], cache.v_zero[block, :, offset] = v[1], v[2]
