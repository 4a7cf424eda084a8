# SPDX-License-Identifier: Apache-2.0
"""vLLM's attention backend for GPUs, as far as it goes without one."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("vllm")
pytest.importorskip("triton")

from vllm_lowbit import attention
from vllm_lowbit.attention_cuda import (
    KV4CudaAttentionBackend,
    KV4CudaAttentionImpl,
    KV4CudaMetadata,
    KV4CudaMetadataBuilder,
)
from vllm_lowbit.errors import UnsupportedError
from vllm_lowbit.kernels.kv4_attention import triton as kernels
from vllm_lowbit.kernels.kv4_attention.splits import split_count

BLOCK_SIZE, MAX_LEN = 64, 256


@pytest.fixture
def on_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A platform that says it is CUDA, with 10 processors."""
    platform = SimpleNamespace(device_type="cuda")
    monkeypatch.setattr("vllm.platforms.current_platform", platform)
    monkeypatch.setattr(kernels, "processors", lambda device: 10)


@pytest.fixture
def config(engine_config: Callable[..., Any]) -> Any:
    return engine_config(max_model_len=MAX_LEN, block_size=BLOCK_SIZE)


def layer_of(config: Any) -> Any:
    """An attention layer as vLLM builds it, 4 heads of 64 over 2 KV heads."""
    from vllm.config import set_current_vllm_config
    from vllm.model_executor.layers.attention import Attention

    with set_current_vllm_config(config):
        return Attention(
            *(4, 64, 0.125, 2), prefix="layers.0.attn", quant_config=config.quant_config
        )


@pytest.fixture
def builder(config: Any, on_gpu: None, monkeypatch: pytest.MonkeyPatch) -> Any:
    return builder_of(config)


def builder_of(config: Any) -> Any:
    backend = attention.backend_class()
    spec = backend.customize_spec(attention_spec())
    return backend.get_builder_cls()(
        spec, ["layers.0.attn"], config, torch.device("cpu")
    )


def attention_spec() -> Any:
    from vllm.v1.kv_cache_interface import FullAttentionSpec

    return FullAttentionSpec(
        block_size=BLOCK_SIZE, num_kv_heads=2, head_size=64, dtype=torch.bfloat16
    )


def common_metadata(
    query_lens: list[int], seq_lens: list[int], width: int = MAX_LEN // BLOCK_SIZE
) -> Any:
    from vllm.v1.attention.backend import CommonAttentionMetadata

    starts = torch.tensor([0, *query_lens]).cumsum(0).int()
    return CommonAttentionMetadata(
        query_start_loc=starts,
        query_start_loc_cpu=starts.clone(),
        seq_lens=torch.tensor(seq_lens, dtype=torch.int32),
        num_reqs=len(query_lens),
        num_actual_tokens=int(starts[-1]),
        max_query_len=max(query_lens),
        max_seq_len=max(seq_lens),
        block_table_tensor=torch.arange(len(query_lens) * width).view(-1, width).int(),
        slot_mapping=torch.arange(int(starts[-1])),
    )


def test_selected_on_a_gpu_alone(config: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The layer of a GPU gets its classes, that of a CPU keeps its own."""
    layer = layer_of(config)
    assert type(layer.impl) is attention.KV4AttentionImpl
    assert layer.get_attn_backend() is attention.KV4AttentionBackend
    layer.impl.logits_soft_cap = 20.0
    platform = SimpleNamespace(device_type="cuda")
    monkeypatch.setattr("vllm.platforms.current_platform", platform)
    layer.quant_method.create_weights(layer)
    assert type(layer.impl) is KV4CudaAttentionImpl
    assert layer.get_attn_backend() is KV4CudaAttentionBackend
    impl = layer.impl
    assert (impl.num_heads, impl.head_size, impl.num_kv_heads) == (4, 64, 2)
    assert (impl.scale, impl.logits_soft_cap, impl.rotate) == (0.125, 20.0, True)


def test_pages_are_those_of_the_cpu() -> None:
    """One layout serves both; GPUs prefer a page that is one tile of the kernel."""
    spec = attention_spec()
    packed = KV4CudaAttentionBackend.customize_spec(spec)
    assert packed == attention.KV4AttentionBackend.customize_spec(spec)
    assert packed.page_size_bytes == BLOCK_SIZE * 2 * 72
    assert KV4CudaAttentionBackend.get_preferred_block_size(16) == 64
    assert 64 in KV4CudaAttentionBackend.get_supported_kernel_block_sizes()
    assert [
        layout.name for layout in KV4CudaAttentionBackend.supported_kv_cache_layouts()
    ] == ["LBHNC"]


def test_graphs_hold_decodes(config: Any) -> None:
    support = KV4CudaMetadataBuilder.get_cudagraph_support(config, attention_spec())
    assert support.name == "UNIFORM_BATCH"
    assert attention.KV4MetadataBuilder._cudagraph_support.name == "NEVER"


def test_decodes_come_apart_from_prefills(builder: Any) -> None:
    common = common_metadata([1, 1, 5, 60], [40, 200, 30, 60])
    metadata = builder.build(0, common)
    assert type(metadata) is KV4CudaMetadata
    assert (metadata.num_decodes, metadata.num_decode_tokens) == (2, 2)
    assert metadata.num_actual_tokens == 67
    assert metadata.prefill_start_loc.tolist() == [0, 5, 65]
    assert metadata.seq_lens.data_ptr() == common.seq_lens.data_ptr()
    decodes = builder.build(0, common_metadata([1, 1, 1], [3, 4, 5]))
    assert decodes.num_decodes == 3 and decodes.prefill_start_loc is None
    prefills = builder.build(0, common_metadata([7, 9], [7, 90]))
    assert prefills.num_decodes == prefills.num_decode_tokens == 0
    assert prefills.prefill_start_loc.tolist() == [0, 7, 16]


def test_padding_of_a_graph_is_taken_for_decodes(builder: Any) -> None:
    """Requests without tokens at the end; nothing of theirs is read."""
    common = common_metadata([1, 1, 0, 0], [9, 8, 0, 0])
    common.num_actual_tokens = 4
    metadata = builder.build(0, common)
    assert (metadata.num_decodes, metadata.num_decode_tokens) == (4, 4)
    assert metadata.prefill_start_loc is None


def test_capture_runs_short_contexts_in_vllms_tensors(builder: Any) -> None:
    """Of at least the query's length; a replay finds what vLLM writes there later."""
    common = common_metadata([1, 1], [MAX_LEN, MAX_LEN])
    metadata = builder.build_for_cudagraph_capture(common)
    assert common.seq_lens.tolist() == [1, 1]
    for name, tensor in (
        ("seq_lens", common.seq_lens),
        ("query_start_loc", common.query_start_loc),
        ("block_table", common.block_table_tensor),
    ):
        assert getattr(metadata, name).data_ptr() == tensor.data_ptr()
    assert builder.build(0, common).workspace is metadata.workspace


def test_speculation_counts_as_decoding(config: Any, on_gpu: None) -> None:
    config.speculative_config = SimpleNamespace(
        num_speculative_tokens=3, parallel_drafting=False
    )
    builder = builder_of(config)
    assert builder.reorder_batch_threshold == 4
    metadata = builder.build(0, common_metadata([4, 4, 2, 9], [40, 50, 60, 70]))
    assert (metadata.num_decodes, metadata.num_decode_tokens) == (3, 10)
    capture = builder.build_for_cudagraph_capture(
        common_metadata([4, 4], [MAX_LEN, MAX_LEN])
    )
    assert capture.seq_lens.tolist() == [4, 4]


def test_workspace_is_sized_at_start_up(builder: Any, config: Any) -> None:
    """For the largest batch and the longest context; it does not grow later."""
    tokens = config.scheduler_config.max_num_batched_tokens
    cut = kernels.split_rows(2, torch.device("cpu"))
    splits = split_count(MAX_LEN)
    assert splits == 1 or cut < tokens
    expected = 4 * 2 * tokens + (4 * cut * splits * 66 if splits > 1 else 0)
    assert builder.workspace.numel() == expected
    # vLLM's table may be wider than the longest context: those columns are not used.
    wide = builder.build(0, common_metadata([1], [5], width=50))
    assert wide.block_table.shape == (1, MAX_LEN // BLOCK_SIZE)


def test_causal_attention_alone(builder: Any) -> None:
    common = common_metadata([1], [5])
    common.causal = False
    with pytest.raises(UnsupportedError, match="causal attention only"):
        builder.build(0, common)


def test_forward_calls_both_parts(
    builder: Any, config: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Decodes and the rest, each with its own rows, into the output itself.

    The op of a CPU ignores the workspace and computes the same attention.
    """
    layer = layer_of(config)
    layer.quant_method.create_weights(layer)
    generator = torch.Generator().manual_seed(0)
    common = common_metadata([1, 1, 5, 60], [40, 200, 30, 60])
    metadata = builder.build(0, common)
    cache = torch.zeros(16, 2, BLOCK_SIZE, 72, dtype=torch.uint8)
    key, value = torch.randn(2, 16 * BLOCK_SIZE, 2, 64, generator=generator)
    slots = torch.arange(16 * BLOCK_SIZE)
    layer.impl.do_kv_cache_update(layer, key, value, cache, slots)
    query = torch.randn(70, 4, 64, generator=generator)
    output = torch.full((70, 4, 64), torch.nan)
    result = layer.impl.forward(layer, query, key, value, cache, metadata, output)
    assert result is output
    expected = torch.ops.lowbit.kv4_attention(
        query[:67],
        cache,
        common.block_table_tensor,
        common.query_start_loc,
        common.seq_lens,
        0.125,
        None,
        None,
        None,
        True,
    )
    assert torch.equal(output[:67], expected)
    assert output[67:].isnan().all()


def test_profiling_and_what_is_refused(config: Any, on_gpu: None) -> None:
    layer = layer_of(config)
    rows = torch.randn(3, 4, 64)
    out = layer.impl.forward(layer, rows, rows, rows, rows, None, rows.clone())
    assert not out.any()
    with pytest.raises(UnsupportedError, match="fused output quantization"):
        layer.impl.forward(
            layer, rows, rows, rows, rows, None, rows, torch.ones(1), None
        )
    other = attention.KV4Metadata(3, rows, rows, rows)
    with pytest.raises(UnsupportedError, match="type KV4Metadata on a GPU"):
        layer.impl.forward(layer, rows, rows, rows, rows, other, rows)
