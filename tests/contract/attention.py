# SPDX-License-Identifier: Apache-2.0
"""Rows of attention, its KV cache and its metadata."""

import inspect
from dataclasses import fields, replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from vllm_lowbit.attention import KV4AttentionBackend, KV4AttentionImpl
from vllm_lowbit.kernels.kv4_store.layout import bytes_per_token

from .rows import holds, members, parameters


@holds("Attention")
def _(symbol: Any, real: Any) -> None:
    members(real.stock, real.rows["Attention"])
    assert (
        type(real.kv4)
        is symbol
        is real.resolve("vllm.model_executor.layers.attention.Attention")
    )
    assert real.kv4.attn_type == "decoder" and real.kv4.head_size_v == 64
    # The trap: an attribute of this name would make the whole cache fp8.
    assert "kv_cache_scheme" in inspect.getsource(symbol.__init__)
    assert not hasattr(real.quant, "kv_cache_scheme")


@holds("_init_kv_cache_quant")
def _(symbol: Any, real: Any) -> None:
    assert type(real.kv4.impl) is KV4AttentionImpl
    assert real.kv4.get_attn_backend() is KV4AttentionBackend
    other = SimpleNamespace(
        get_quant_method=lambda layer, prefix: object(), online_quantization_config=None
    )
    with pytest.raises(AssertionError):
        symbol(torch.nn.Module(), other, "layers.0.attn")


@holds("unified_kv_cache_update")
def _(symbol: Any, real: Any) -> None:
    assert "impl.do_kv_cache_update(" in inspect.getsource(symbol)
    assert not KV4AttentionBackend.forward_includes_kv_cache_update
    assert parameters(KV4AttentionImpl.do_kv_cache_update)[1:] == parameters(symbol)[
        :2
    ] + [
        "kv_cache",
        "slot_mapping",
    ]


@holds("BaseKVCacheMethod")
def _(symbol: Any, real: Any) -> None:
    assert isinstance(real.kv4.quant_method, symbol)
    assert parameters(symbol.__init__) == ["quant_config"]


@holds("CPUAttentionBackendImpl")
def _(symbol: Any, real: Any) -> None:
    members(real.stock.impl, real.rows["CPUAttentionBackendImpl"])
    impl = real.stock.impl
    assert (impl.scale, impl.alibi_slopes, impl.sinks) == (0.125, None, None)
    assert not impl.logits_soft_cap
    every = parameters(real.resolve("vllm.v1.attention.backend.AttentionImpl").__init__)
    assert {"scale", "alibi_slopes", "logits_soft_cap"} <= set(every)


@holds("AttentionBackendEnum")
def _(symbol: Any, real: Any) -> None:
    assert symbol[KV4AttentionBackend.get_name()] is symbol.CUSTOM is real.kv4.backend


@holds("AttentionSpec")
def _(symbol: Any, real: Any) -> None:
    spec = real.kv4.get_kv_cache_spec(real.config)
    assert isinstance(spec, symbol) and spec.state_content_bytes is None
    packed = replace(spec, dtype=torch.uint8, state_content_bytes=5)
    assert packed.state_content_size_bytes == 5 and packed.head_size == 64


@holds("KVCacheLayout")
def _(symbol: Any, real: Any) -> None:
    assert symbol.LBHNC.stride_order == (0, 1, 2, 3, 4)


@holds("customize_spec")
def _(symbol: Any, real: Any) -> None:
    spec = real.kv4.get_kv_cache_spec(real.config)
    called = real.resolve("vllm.v1.worker.utils.customize_attention_spec")
    packed = called(real.kv4.get_attn_backend(), spec)
    assert packed.page_size_bytes == 2 * spec.block_size * bytes_per_token(64)
    assert spec.page_size_bytes == 2 * spec.block_size * 2 * 64 * 2


@holds("supported_kv_cache_layouts")
def _(symbol: Any, real: Any) -> None:
    asked = real.resolve(
        "vllm.v1.attention.backends.utils.get_supported_kv_cache_layouts"
    )
    assert [layout.name for layout in asked([KV4AttentionBackend])] == ["LBHNC"]


@holds("CommonAttentionMetadata")
def _(symbol: Any, real: Any) -> None:
    names = {field.name: field.default for field in fields(symbol)}
    assert real.rows["CommonAttentionMetadata"] <= set(names)
    assert names["causal"] is True


@holds("AttentionCGSupport")
def _(symbol: Any, real: Any) -> None:
    """A uniform batch of decodes, also of speculation, is what graphs may hold."""
    assert symbol.ALWAYS.value > symbol.UNIFORM_BATCH.value
    assert symbol.UNIFORM_BATCH.value > symbol.UNIFORM_SINGLE_TOKEN_DECODE.value


@holds("_init_reorder_batch_threshold")
def _(symbol: Any, real: Any) -> None:
    assert parameters(symbol)[:2] == [
        "reorder_batch_threshold",
        "supports_spec_as_decode",
    ]


@holds("split_decodes_and_prefills")
def _(symbol: Any, real: Any) -> None:
    common = SimpleNamespace(
        max_query_len=4,
        num_reqs=3,
        num_actual_tokens=6,
        query_start_loc_cpu=torch.tensor([0, 1, 2, 6]),
    )
    assert symbol(common, 1) == (2, 1, 2, 4)
