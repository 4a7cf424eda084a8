# SPDX-License-Identifier: Apache-2.0
"""Sinks that a model gives to vLLM's attention layer reach the 4-bit kernels.

No supported architecture has any yet: the layers are built as gpt-oss builds them, with
a parameter that is loaded later.
"""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("vllm")

from vllm_lowbit import attention

BLOCK_SIZE = 32
SINKS = (1.5, -2.0, 0.25, 3.0)


@pytest.fixture
def config(engine_config: Callable[..., Any]) -> Any:
    return engine_config(max_model_len=256, block_size=BLOCK_SIZE)


def layer_of(config: Any, name: str, sinks: torch.Tensor, quantized: bool) -> Any:
    """4 heads of 64 over 2 KV heads."""
    from vllm.config import set_current_vllm_config
    from vllm.model_executor.layers.attention import Attention

    quant = config.quant_config if quantized else None
    with set_current_vllm_config(config):
        return Attention(
            *(4, 64, 0.125, 2), prefix=name, quant_config=quant, sinks=sinks
        )


def parameter() -> torch.nn.Parameter:
    """Before loading: what a model allocates in its own dtype."""
    empty = torch.full((4,), torch.nan, dtype=torch.bfloat16)
    return torch.nn.Parameter(empty, requires_grad=False)


def load(layer: Any, sinks: torch.nn.Parameter, values: tuple[float, ...]) -> None:
    """As a model's loader does it, and what vLLM calls after it."""
    sinks.data.copy_(torch.tensor(values))
    layer.process_weights_after_loading(torch.bfloat16)


def test_loaded_in_float32(config: Any) -> None:
    """Into memory that stays where it is when weights are loaded anew."""
    sinks = parameter()
    layer = layer_of(config, "layers.0.attn", sinks, True)
    assert type(layer.impl) is attention.KV4AttentionImpl
    assert layer.get_attn_backend().supports_sink()
    load(layer, sinks, SINKS)
    taken = layer.impl.sinks
    assert taken.dtype == torch.float32 and tuple(taken.tolist()) == SINKS
    load(layer, sinks, SINKS[::-1])
    assert layer.impl.sinks is taken and tuple(taken.tolist()) == SINKS[::-1]


def test_not_loaded(config: Any) -> None:
    """A loader that forgets the hook gets an error and not attention without sinks."""
    layer = layer_of(config, "layers.0.attn", parameter(), True)
    with pytest.raises(ValueError, match="sinks must be torch.float32"):
        run(layer, config)
    assert layer_of(config, "layers.1.attn", None, True).impl.sinks is None


def exact_rows(generator: torch.Generator) -> torch.Tensor:
    """Keys or values that 4 bits hold: multiples of 1/4 over the whole grid."""
    codes = torch.randint(0, 16, (90, 2, 64), generator=generator)
    codes[..., 0], codes[..., 1] = 0, 15
    return ((codes - 8) / 4).bfloat16()


def run(layer: Any, config: Any) -> torch.Tensor:
    """A prompt of 70 tokens and one token more of another sequence."""
    from vllm.v1.attention.backend import CommonAttentionMetadata
    from vllm.v1.worker.utils import customize_attention_spec

    generator = torch.Generator().manual_seed(0)
    key, value = exact_rows(generator), exact_rows(generator)
    query = torch.randn(71, 4, 64, generator=generator).bfloat16()
    backend = layer.get_attn_backend()
    spec = customize_attention_spec(backend, layer.get_kv_cache_spec(config))
    assert spec.block_size == BLOCK_SIZE
    width = spec.page_size_bytes // (2 * BLOCK_SIZE * spec.dtype.itemsize)
    cache = torch.zeros(4, 2, BLOCK_SIZE, width, dtype=spec.dtype)
    starts = torch.tensor([0, 70, 71], dtype=torch.int32)
    common = CommonAttentionMetadata(
        query_start_loc=starts,
        query_start_loc_cpu=starts,
        seq_lens=torch.tensor([70, 20], dtype=torch.int32),
        num_reqs=2,
        num_actual_tokens=71,
        max_query_len=70,
        max_seq_len=70,
        block_table_tensor=torch.tensor([[0, 1, 2], [3, 0, 0]], dtype=torch.int32),
        slot_mapping=torch.arange(71),
    )
    builder = backend.get_builder_cls()(
        spec, [layer.layer_name], config, torch.device("cpu")
    )
    metadata = builder.build(0, common)
    slots = torch.cat((torch.arange(70), torch.arange(96, 116)))
    layer.impl.do_kv_cache_update(layer, key, value, cache, slots)
    output = torch.full_like(query, torch.nan)
    layer.impl.forward(layer, query, key, value, cache, metadata, output)
    return output


def test_against_the_stock_layer(config: Any) -> None:
    """vLLM's own layer of a CPU, over a cache in which nothing is lost."""
    sinks = [parameter() for _ in range(2)]
    ours = layer_of(config, "layers.0.attn", sinks[0], True)
    ours.impl.rotate = False  # rotated keys would not be exact
    stock = layer_of(config, "layers.1.attn", sinks[1], False)
    outputs = []
    for layer, tensor in zip((ours, stock), sinks, strict=True):
        load(layer, tensor, SINKS)
        outputs.append(run(layer, config))
    torch.testing.assert_close(*outputs, rtol=2**-7, atol=2**-7)
    load(ours, sinks[0], (-torch.inf,) * 4)
    assert (run(ours, config) - outputs[1]).abs().max() > 0.1


def test_layer_of_a_gpu(config: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its implementation gets the model's parameter too, and passes it on."""
    pytest.importorskip("triton")
    from vllm_lowbit.attention_cuda import KV4CudaAttentionImpl
    from vllm_lowbit.kernels.kv4_attention import triton as kernels

    sinks = parameter()
    layer = layer_of(config, "layers.0.attn", sinks, True)
    load(layer, sinks, SINKS)
    layer.impl.rotate = False
    expected = run(layer, config)
    platform = SimpleNamespace(device_type="cuda")
    monkeypatch.setattr("vllm.platforms.current_platform", platform)
    monkeypatch.setattr(kernels, "processors", lambda device: 10)
    layer.impl.sinks = sinks
    layer.quant_method.create_weights(layer)
    assert type(layer.impl) is KV4CudaAttentionImpl and layer.impl.sinks is sinks
    load(layer, sinks, SINKS)
    layer.impl.rotate = False
    assert torch.equal(run(layer, config), expected)
