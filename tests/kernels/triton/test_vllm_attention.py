# SPDX-License-Identifier: Apache-2.0
"""vLLM's attention layer of a GPU: its builder, its workspace and the kernels."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("vllm")

from vllm_lowbit.attention_cuda import KV4CudaAttentionImpl
from vllm_lowbit.kernels.kv4_attention import reference, triton
from vllm_lowbit.kernels.kv4_store import generic

BLOCK_SIZE, MAX_LEN, NAME = 64, 320, "layers.0.attn"
PAGES = MAX_LEN // BLOCK_SIZE


@pytest.fixture(params=[1, 100], ids=["small chip", "large chip"])
def config(
    request: Any,
    engine_config: Callable[..., Any],
    gpu_ops: None,
    monkeypatch: pytest.MonkeyPatch,
) -> Any:
    """On a chip that a few sequences fill, and where their contexts are cut."""
    monkeypatch.setattr(triton, "processors", lambda device: request.param)
    monkeypatch.setattr(triton, "MERGE_AHEAD", 2)
    return engine_config(max_model_len=MAX_LEN, block_size=BLOCK_SIZE)


@pytest.fixture
def layer(config: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """4 heads of 64 over 2 KV heads, as the platform CUDA gets it."""
    from vllm.config import set_current_vllm_config
    from vllm.model_executor.layers.attention import Attention

    with set_current_vllm_config(config):
        layer = Attention(*(4, 64, 0.125, 2), prefix=NAME, quant_config=None)
        layer.quant_method = config.quant_config.get_quant_method(layer, NAME)
    platform = SimpleNamespace(device_type="cuda")
    with monkeypatch.context() as patch:
        patch.setattr("vllm.platforms.current_platform", platform)
        layer.quant_method.create_weights(layer)
    assert type(layer.impl) is KV4CudaAttentionImpl
    return layer


@pytest.fixture
def builder(config: Any, layer: Any) -> Any:
    from vllm.v1.kv_cache_interface import FullAttentionSpec

    backend = layer.get_attn_backend()
    sizes = {"block_size": BLOCK_SIZE, "num_kv_heads": 2, "head_size": 64}
    spec = backend.customize_spec(FullAttentionSpec(**sizes, dtype=torch.bfloat16))
    return backend.get_builder_cls()(spec, [NAME], config, torch.device("cpu"))


def step(query_lens: list[int], seq_lens: list[int], padded: int) -> Any:
    """vLLM's metadata of a batch of so many tokens, the last of them padding."""
    from vllm.v1.attention.backend import CommonAttentionMetadata

    starts = torch.tensor([0, *query_lens]).cumsum(0).int()
    table = torch.arange(len(query_lens) * PAGES).view(-1, PAGES)
    return CommonAttentionMetadata(
        query_start_loc=starts,
        query_start_loc_cpu=starts.clone(),
        seq_lens=torch.tensor(seq_lens, dtype=torch.int32),
        num_reqs=len(query_lens),
        num_actual_tokens=padded,
        max_query_len=max(query_lens),
        max_seq_len=max(seq_lens),
        block_table_tensor=table.flip(0).contiguous().int(),
        slot_mapping=torch.full((padded,), -1),
    )


@pytest.mark.parametrize(
    ("query_lens", "seq_lens", "padded", "options"),
    [
        ([1, 1, 5, 20], [40, 300, 30, 280], 27, {}),
        ([1, 1, 1], [3, 270, 64], 3, {"sliding_window": 50}),
        ([4, 4, 2, 9], [40, 270, 60, 9], 19, {"drafts": 3}),
        ([20, 2], [20, 280], 22, {"logits_soft_cap": 5.0, "rotate": False}),
        ([1, 1, 0, 0], [300, 9, 0, 0], 4, {"sinks": torch.tensor([1.0, -2, 0, 3])}),
    ],
    ids=["both", "decodes", "drafts", "prefills", "padding"],
)
def test_a_step(
    query_lens: list[int],
    seq_lens: list[int],
    padded: int,
    options: dict[str, Any],
    config: Any,
    layer: Any,
    request: pytest.FixtureRequest,
) -> None:
    """Earlier tokens, this step's, and attention over both, against the reference.

    Nothing beside the rows of the step's tokens is written, and of the workspace, which
    holds NaN, no number is read that was not written.
    """
    impl, tokens = layer.impl, sum(query_lens)
    for name, option in options.items():
        if name == "drafts":
            config.speculative_config = SimpleNamespace(
                num_speculative_tokens=option, parallel_drafting=False
            )
        else:
            setattr(impl, name, option)
    builder = request.getfixturevalue("builder")
    metadata = builder.build(0, step(query_lens, seq_lens, padded))
    most = 1 + options.get("drafts", 0)
    assert metadata.num_decodes == sum(count <= most for count in query_lens)
    assert builder.workspace.isnan().all()
    cache = torch.full((4 * PAGES, 2, BLOCK_SIZE, 72), 255, dtype=torch.uint8)
    new: list[torch.Tensor] = []
    for row, count, length in zip(
        metadata.block_table, query_lens, seq_lens, strict=True
    ):
        slots = row[torch.arange(length) // BLOCK_SIZE].long() * BLOCK_SIZE
        slots += torch.arange(length) % BLOCK_SIZE
        key, value = torch.randn(2, length, 2, 64)
        generic.kv4_store(key, value, cache, slots, impl.rotate)
        new.append(slots[length - count :])
    key, value = torch.randn(2, padded, 2, 64)
    mapping = torch.full((padded,), -1)
    mapping[:tokens] = torch.cat(new)
    impl.do_kv_cache_update(layer, key, value, cache, mapping)
    query = torch.randn(padded + 3, 4, 64)
    output = torch.full_like(query, 7.0)
    result = impl.forward(layer, query, key, value, cache, metadata, output)
    assert result is output and bool((output[padded:] == 7).all())
    live = [i for i, count in enumerate(query_lens) if count]
    expected = reference.kv4_attention(
        query[:tokens],
        cache,
        metadata.block_table[live],
        metadata.query_start_loc[[*live, len(live)]],
        metadata.seq_lens[live],
        impl.scale,
        impl.sliding_window,
        impl.logits_soft_cap,
        impl.sinks,
        impl.rotate,
    )
    # The error of fp16 operands, derived in test_kv4_attention.py.
    assert (output[:tokens] - expected).abs().max() < 4e-3


def test_a_replayed_graph_sees_new_lengths(layer: Any, builder: Any) -> None:
    """What is captured with short contexts runs in the same tensors with long ones."""
    common = step([1, 1], [300, 70], 2)
    lengths = common.seq_lens.clone()
    metadata = builder.build_for_cudagraph_capture(common)
    cache = torch.zeros(2 * PAGES, 2, BLOCK_SIZE, 72, dtype=torch.uint8)
    rows = torch.randn(2, len(cache) * BLOCK_SIZE, 2, 64)
    generic.kv4_store(*rows, cache, torch.arange(rows.shape[1]), True)
    query, output = torch.randn(2, 4, 64), torch.empty(2, 4, 64)
    arguments = layer, query, query, query, cache, metadata, output
    short = layer.impl.forward(*arguments).clone()
    common.seq_lens.copy_(lengths)
    replayed = layer.impl.forward(*arguments).clone()
    again = builder.build(0, step([1, 1], [300, 70], 2))
    arguments = layer, query, query, query, cache, again, torch.empty(2, 4, 64)
    assert torch.equal(layer.impl.forward(*arguments), replayed)
    assert not torch.equal(short, replayed)


def test_no_step_waits_for_the_device(
    layer: Any,
    builder: Any,
    on_device: Callable[[torch.Tensor], torch.Tensor],
    launches: list[Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Launches are those of the numbers that the host has: of tokens and sequences."""
    out = triton.kv4_attention_out
    monkeypatch.setattr(torch.ops.lowbit, "kv4_attention_out", out)
    found = []
    for seq_lens in ([300, 300, 280], [1, 20, 30]):
        common = step([1, 1, 20], seq_lens, 22)
        for name in ("query_start_loc", "seq_lens", "block_table_tensor"):
            setattr(common, name, on_device(getattr(common, name)))
        metadata = builder.build(0, common)
        query, cache = torch.randn(22, 4, 64), torch.zeros(4, 2, BLOCK_SIZE, 72).byte()
        given = [on_device(t) for t in (query, query, query, cache)]
        layer.impl.forward(layer, *given, metadata, on_device(torch.empty(22, 4, 64)))
        found.append(list(launches))
        launches.clear()
    assert found[0] == found[1] and len(found[0]) >= 4
