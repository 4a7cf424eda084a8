# SPDX-License-Identifier: Apache-2.0
"""vLLM's pass that fuses RoPE with the cache update takes our layers of a GPU.

It runs on ROCm alone. Here it gets the graph of a layer on a CPU, where the operators
compute the same.
"""

from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("vllm")
pytest.importorskip("triton")

from vllm_lowbit import attention
from vllm_lowbit.attention_cuda import KV4CudaAttentionImpl
from vllm_lowbit.errors import UnsupportedError

BLOCK_SIZE, TOKENS = 64, 7
NAME = "layers.0.attn"
# Kernels of a GPU that vLLM's modules of passes name when they are imported.
OF_A_GPU = (
    "rms_norm_static_fp8_quant",
    "fused_add_rms_norm_static_fp8_quant",
    "rms_norm_dynamic_per_token_quant",
)


@pytest.fixture
def fusion(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The module of the pass."""
    from vllm.platforms import current_platform

    current_platform.import_kernels()
    for name in OF_A_GPU:
        stub = SimpleNamespace(default=object())
        monkeypatch.setattr(torch.ops._C, name, stub, raising=False)
    from vllm.compilation.passes.fusion import rope_kvcache_fusion

    # A pattern with quantized queries, which a CPU cannot trace.
    monkeypatch.setattr(rope_kvcache_fusion, "STATIC_FP8_QUANT_OP", None)
    return rope_kvcache_fusion


@pytest.fixture
def config(engine_config: Callable[..., Any]) -> Any:
    return engine_config(max_model_len=256, block_size=BLOCK_SIZE)


@pytest.fixture
def layer(config: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The layer of a GPU, 4 heads of 64 over 2 KV heads, with a cache of 2 pages."""
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
    layer.kv_cache = torch.full((2, 2, BLOCK_SIZE, 72), 255, dtype=torch.uint8)
    return layer


def step_of(layer: Any) -> Callable[..., torch.Tensor]:
    """What a decoder layer does between its projections."""
    from vllm.model_executor.layers.rotary_embedding import get_rope

    parameters = {"rope_type": "default", "rope_theta": 10000.0}
    rope = get_rope(64, 256, rope_parameters=parameters, dtype=torch.bfloat16)

    def step(x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        query, key, value = (x * 2).split([256, 128, 128], dim=-1)
        query, key = rope(positions, query, key)
        return layer(query, key, value)

    return step


def run(step: Callable[..., torch.Tensor], config: Any) -> torch.Tensor:
    """A prompt of all tokens but one, which is padding."""
    from vllm.forward_context import set_forward_context

    from vllm_lowbit.attention_cuda import KV4CudaMetadata

    starts = torch.tensor([0, TOKENS - 1], dtype=torch.int32)
    table = torch.tensor([[1, 0]], dtype=torch.int32)
    metadata = KV4CudaMetadata(
        TOKENS - 1, starts, starts[1:], table, 0, 0, starts, torch.empty(0)
    )
    slots = torch.cat((torch.arange(64, 64 + TOKENS - 1), torch.tensor([-1])))
    x = torch.randn(TOKENS, 512, generator=torch.Generator().manual_seed(0))
    context = set_forward_context({NAME: metadata}, config, slot_mapping={NAME: slots})
    with torch.no_grad(), context:
        return step(x.bfloat16(), torch.arange(TOKENS))


def test_fused_in_the_graph(fusion: ModuleType, config: Any, layer: Any) -> None:
    """One replacement, and the bytes and bits of the graph without it."""
    from torch._dynamo.backends.common import aot_autograd
    from torch._inductor import config as inductor
    from torch._inductor.fx_passes.post_grad import view_to_reshape
    from vllm.compilation.passes.utility.scatter_split_replace import (
        ScatterSplitReplacementPass,
    )
    from vllm.compilation.passes.utility.split_coalescing import SplitCoalescingPass
    from vllm.config import set_current_vllm_config

    found = []

    def fuse(gm: torch.fx.GraphModule, inputs: Any) -> torch.fx.GraphModule:
        """As vLLM's pass manager does after inductor's own passes."""
        view_to_reshape(gm)
        with set_current_vllm_config(config):
            pass_ = fusion.RopeKVCacheFusionPass(config)
            for one in (
                SplitCoalescingPass(config),
                ScatterSplitReplacementPass(config),
                pass_,
            ):
                one(gm.graph)
        gm.recompile()
        found.append((pass_.matched_count, str(gm.graph)))
        return gm

    with set_current_vllm_config(config):
        step = step_of(layer)
    expected, stored = run(step, config), layer.kv_cache.clone()
    layer.kv_cache.fill_(255)
    torch._dynamo.reset()
    with inductor.patch(enable_auto_functionalized_v2=False):
        compiled = torch.compile(step, backend=aot_autograd(fw_compiler=fuse))
        actual = run(compiled, config)
    ((count, graph),) = found
    assert count == 1 and "rotary_embedding.default" not in graph
    assert "vllm.unified_kv_cache_update" not in graph
    assert torch.equal(actual[:-1], expected[:-1])
    assert torch.equal(layer.kv_cache, stored) and not bool((stored == 255).all())


def test_on_rocm_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM itself turns the option off elsewhere."""
    from vllm.config import compilation

    assert not compilation.PassConfig(fuse_rope_kvcache=True).fuse_rope_kvcache
    platform = SimpleNamespace(is_rocm=lambda: True, is_cuda_alike=lambda: True)
    monkeypatch.setattr(compilation, "current_platform", platform)
    assert compilation.PassConfig(fuse_rope_kvcache=True).fuse_rope_kvcache


def test_offered_where_there_is_a_kernel(config: Any, layer: Any) -> None:
    from vllm.config import set_current_vllm_config
    from vllm.model_executor.layers.attention import Attention

    assert layer.impl.fused_rope_kvcache_supported()
    with set_current_vllm_config(config):
        cpu = Attention(
            *(4, 64, 0.125, 2), prefix="a", quant_config=config.quant_config
        )
    assert type(cpu.impl) is attention.KV4AttentionImpl
    assert not cpu.impl.fused_rope_kvcache_supported()


@pytest.mark.parametrize(
    ("width", "is_neox", "message"),
    [
        (64, False, "rope_kvcache: RoPE over 64 of 64 elements .* as neighbours"),
        (32, True, "rope_kvcache: RoPE over 32 of 64 elements .* as halves"),
    ],
)
def test_other_kinds_of_rope(
    width: int, is_neox: bool, message: str, layer: Any
) -> None:
    query, key = torch.zeros(1, 4, 64), torch.zeros(1, 2, 64)
    one = torch.zeros(1, dtype=torch.int64)
    with pytest.raises(UnsupportedError, match=message):
        layer.impl.do_rope_and_kv_cache_update(
            *(layer, query, key, key, one, torch.ones(4, width), is_neox),
            *(layer.kv_cache, one),
        )
    assert bool((layer.kv_cache == 255).all())
