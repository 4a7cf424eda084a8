# SPDX-License-Identifier: Apache-2.0
"""Options and layers that would not run what was asked for are refused by name.

The configs are vLLM's own, from engine arguments; attention layers are its own too.
"""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from vllm_lowbit.errors import UnsupportedError
from vllm_lowbit.kernels.kv4_store.layout import HEAD_DIMS

pytest.importorskip("vllm")
from vllm_lowbit.refusals import refuse_attention, refuse_engine_options

Config = Callable[..., Any]
REF_7M = Path(__file__).parents[1] / "models" / "ref-7m"


def refuse(config: Any) -> None:
    refuse_engine_options(config, config.quant_config.resolved)


def by_scheme(name: str) -> dict[str, Any]:
    text = json.dumps({"scheme": name})
    return {"hf_overrides": {"quantization_config_dict_json": text}}


# Engine arguments, and how the message begins; "{}" is " is not supported by lowbit".
REFUSED = [
    ({"enable_lora": True}, "LoRA (--enable-lora){}: value heads are rotated inside "),
    (
        {"speculative_config": {"method": "medusa", "num_speculative_tokens": 2}},
        "speculative method 'medusa'{}: only ngram and suffix",
    ),
    (
        {"speculative_config": {"method": "draft_model", "num_speculative_tokens": 2}},
        "speculative method 'draft_model'{}: only ngram and suffix",
    ),
    ({"runner": "pooling"}, "runner 'pooling'{}: only text generation"),
    ({"convert": "embed"}, "runner 'pooling'{}: only text generation"),
    ({"enable_prompt_embeds": True}, "--enable-prompt-embeds{}"),
    ({"load_format": "pt"}, "--load-format pt{}: only safetensors files are read"),
    ({"load_format": "npcache"}, "--load-format npcache{}: only safetensors"),
    ({"load_format": "dummy"}, "--load-format dummy{}: only safetensors"),
    ({"load_format": "sharded_state"}, "--load-format sharded_state{}"),
    (
        {"tensor_parallel_size": 4},
        "--tensor-parallel-size 4: the rotations of this model stay inside 2 blocks",
    ),
]
# These are about the 4-bit cache, and fine where the scheme leaves the cache alone.
CONNECTOR = {"kv_connector": "ExampleConnector", "kv_role": "kv_both"}
REFUSED_WITH_KV4 = [
    (
        {"kv_cache_dtype": "fp8"},
        "--kv-cache-dtype fp8{}: scheme w4a4kv4 has its own cache; leave it at auto",
    ),
    ({"kv_cache_dtype": "bfloat16"}, "--kv-cache-dtype bfloat16{}"),
    ({"kv_cache_dtype_skip_layers": ["0"]}, "--kv-cache-dtype-skip-layers{}"),
    (
        {"kv_transfer_config": CONNECTOR},
        "a KV connector (--kv-transfer-config){}: it does not know the packed page",
    ),
    ({"kv_offloading_size": 1.0}, "a KV connector (--kv-transfer-config){}"),
]
ACCEPTED = [
    {},
    {"tensor_parallel_size": 2},
    {"load_format": "safetensors"},
    {"enable_prefix_caching": False},
    {"dtype": "float32"},
    {
        "speculative_config": {
            "method": "ngram",
            "num_speculative_tokens": 2,
            "prompt_lookup_max": 3,
        }
    },
]


@pytest.mark.parametrize(("arguments", "message"), REFUSED + REFUSED_WITH_KV4)
def test_engine_arguments_refused(
    arguments: dict[str, Any], message: str, engine_config: Config
) -> None:
    if "speculative_config" in arguments:
        draft = {"model": str(REF_7M), **arguments["speculative_config"]}
        arguments = {"speculative_config": draft}
    with pytest.raises(UnsupportedError) as error:
        refuse(engine_config(**arguments))
    expected = message.format(" is not supported by lowbit")
    assert str(error.value).startswith(expected)


def test_float32_on_a_gpu(engine_config: Config, monkeypatch: Any) -> None:
    for dtype in ("float32", "bfloat16"):
        config = engine_config(dtype=dtype)
        monkeypatch.setattr(config.device_config, "device_type", "cuda")
        if dtype == "bfloat16":
            refuse(config)
            continue
        with pytest.raises(UnsupportedError, match="--dtype float32 is not supported"):
            refuse(config)


@pytest.mark.parametrize("vocab_bits", [8, 16])
def test_head_in_another_dtype(vocab_bits: int, engine_config: Config) -> None:
    """vLLM would multiply by the head's weight itself."""
    choice = json.dumps({"vocab_bits": vocab_bits})
    overrides = {"quantization_config_dict_json": choice, "head_dtype": "float32"}
    config = engine_config(hf_overrides=overrides)
    if vocab_bits == 16:
        refuse(config)
        return
    with pytest.raises(UnsupportedError, match="^--hf-overrides head_dtype torch.fl"):
        refuse(config)


@pytest.mark.parametrize("arguments", ACCEPTED)
@pytest.mark.parametrize("scheme", ["w4a4kv4", "w4a16"])
def test_engine_arguments_accepted(
    arguments: dict[str, Any], scheme: str, engine_config: Config
) -> None:
    config = engine_config(**arguments, **by_scheme(scheme))
    assert config.quant_config.scheme.name == scheme
    refuse(config)


@pytest.mark.parametrize("arguments", [row[0] for row in REFUSED_WITH_KV4])
def test_engine_arguments_of_the_cache_without_kv4(
    arguments: dict[str, Any], engine_config: Config
) -> None:
    refuse(engine_config(**arguments, **by_scheme("w4a4")))


@pytest.fixture
def config(engine_config: Config) -> Any:
    """A config whose attributes a test may set."""
    return engine_config()


@pytest.mark.parametrize(
    ("part", "name", "value", "message"),
    [
        ("model_config", "quantization_config", {}, "--quantization-config is not"),
        ("model_config", "runner_type", "draft", "runner 'draft' is not supported"),
        ("parallel_config", "decode_context_parallel_size", 2, "--decode-context-para"),
        ("parallel_config", "prefill_context_parallel_size", 2, "--prefill-context-pa"),
        ("parallel_config", "tensor_parallel_size", 3, "--tensor-parallel-size 3: the"),
        ("parallel_config", "tensor_parallel_size", 8, "--tensor-parallel-size 8: the"),
    ],
)
def test_option_that_this_machine_cannot_ask_for(
    part: str, name: str, value: object, message: str, config: Any
) -> None:
    section = getattr(config, part)
    good = getattr(section, name)
    setattr(section, name, value)
    with pytest.raises(UnsupportedError) as error:
        refuse(config)
    assert str(error.value).startswith(message)
    setattr(section, name, good)
    refuse(config)


def test_multimodal_model(config: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    refuse(config)
    model = type(config.model_config)
    monkeypatch.setattr(model, "is_multimodal_model", property(lambda self: True))
    with pytest.raises(UnsupportedError, match="^a multimodal model is not support"):
        refuse(config)


@pytest.mark.parametrize("method", ["eagle", "eagle3", "mtp", "extract_hidden_states"])
def test_speculation_with_the_models_own_states(method: str, config: Any) -> None:
    config.speculative_config = SimpleNamespace(method=method)
    with pytest.raises(UnsupportedError, match=f"^speculative method '{method}' is"):
        refuse(config)
    config.speculative_config.method = "suffix"
    refuse(config)


def test_first_problem_is_named(engine_config: Config) -> None:
    config = engine_config(enable_lora=True, kv_cache_dtype="fp8")
    with pytest.raises(UnsupportedError, match="LoRA"):
        refuse(config)


def test_layers_ask_for_the_check(engine_config: Config) -> None:
    """Before the first layer exists, and so before any weight is read."""
    from vllm.config import set_current_vllm_config
    from vllm.model_executor.layers.attention import Attention

    config = engine_config(enable_lora=True)
    with set_current_vllm_config(config):
        with pytest.raises(UnsupportedError, match="LoRA"):
            Attention(4, 64, 1.0, 2, prefix="attn", quant_config=config.quant_config)
    assert config.load_config.load_format == "auto"


@pytest.mark.parametrize(
    ("asked", "used"),
    [("auto", "safetensors"), ("safetensors", "safetensors")],
)
def test_load_format_is_narrowed(asked: str, used: str, engine_config: Config) -> None:
    """vLLM's "auto" reads pickled files when there are no others."""
    from vllm.config import set_current_vllm_config
    from vllm.model_executor.layers.attention import Attention

    config = engine_config(load_format=asked)
    with set_current_vllm_config(config):
        Attention(4, 64, 1.0, 2, prefix="attn", quant_config=config.quant_config)
    assert config.load_config.load_format == used


class TestAttention:
    @pytest.fixture
    def layer(self, config: Any) -> Iterator[Any]:
        """A stock decoder layer, as vLLM builds it before it asks for a method."""
        from vllm.config import set_current_vllm_config
        from vllm.model_executor.layers.attention import Attention

        with set_current_vllm_config(config):
            yield Attention(4, 64, 0.125, 2, prefix="layers.0.attn")

    @pytest.mark.parametrize(
        ("name", "value", "message"),
        [
            ("attn_type", "encoder", "attention type encoder has no 4-bit cache"),
            ("attn_type", "encoder_only", "attention type encoder_only has no 4-bit"),
            ("attn_type", "encoder_decoder", "attention type encoder_decoder has no"),
            ("head_size_v", 128, "head_size_v 128 other than head_size 64 has no"),
            ("has_sink", True, "attention sinks that CPUAttentionBackendImpl does not"),
            ("use_mm_prefix", True, "a prefix-LM mask has no 4-bit cache"),
            (
                "kv_sharing_target_layer_name",
                "layers.1.attn",
                "a KV cache shared between layers has no 4-bit cache",
            ),
        ],
    )
    def test_feature(self, name: str, value: object, message: str, layer: Any) -> None:
        good = getattr(layer, name)
        setattr(layer, name, value)
        with pytest.raises(UnsupportedError) as error:
            refuse_attention(layer, "layers.0.attn")
        assert str(error.value).startswith(f"layer layers.0.attn: {message}")
        setattr(layer, name, good)
        refuse_attention(layer, "layers.0.attn")

    def test_alibi(self, layer: Any) -> None:
        layer.impl.alibi_slopes = torch.ones(4)
        with pytest.raises(UnsupportedError, match="layer a: alibi has no 4-bit cache"):
            refuse_attention(layer, "a")
        layer.impl.alibi_slopes = None
        refuse_attention(layer, "a")

    @pytest.mark.parametrize("head_size", [48, 112, 160, 512])
    def test_head_size(self, head_size: int, layer: Any) -> None:
        layer.head_size = layer.head_size_v = head_size
        with pytest.raises(UnsupportedError) as error:
            refuse_attention(layer, "layers.3.attn")
        reason = f"head_dim must be one of {HEAD_DIMS}, got {head_size}"
        assert str(error.value) == (
            "layer layers.3.attn: no backend runs kv4_store on cpu: "
            f"cpu: {reason}; triton: runs on cuda, not on cpu; generic: {reason}"
        )

    @pytest.mark.parametrize("head_size", HEAD_DIMS)
    def test_supported_head_size(self, head_size: int, layer: Any) -> None:
        layer.head_size = layer.head_size_v = head_size
        refuse_attention(layer, "layers.3.attn")

    def test_device(self, layer: Any) -> None:
        with torch.device("meta"):
            with pytest.raises(UnsupportedError, match="runs kv4_store on meta"):
                refuse_attention(layer, "layers.0.attn")

    @pytest.mark.parametrize(
        "name", ["ChunkedLocalAttention", "CrossAttention", "EncoderOnlyAttention"]
    )
    def test_subclass(self, name: str, config: Any) -> None:
        from vllm.config import set_current_vllm_config
        from vllm.model_executor.layers import attention

        layer = object.__new__(getattr(attention, name))
        with set_current_vllm_config(config):
            with pytest.raises(UnsupportedError) as error:
                config.quant_config.get_quant_method(layer, "layers.0.attn")
        assert str(error.value).startswith(
            f"layer layers.0.attn: attention of type {name} has no 4-bit cache; "
            "supported: plain decoder self-attention"
        )

    def test_stock_attention_without_kv4(self, engine_config: Config) -> None:
        from vllm.config import set_current_vllm_config
        from vllm.model_executor.layers.attention import Attention

        config = engine_config(**by_scheme("w4a4"))
        quant = config.quant_config
        with set_current_vllm_config(config):
            layer = Attention(4, 64, 1.0, 2, prefix="attn", quant_config=quant)
        assert type(layer.impl).__module__.startswith("vllm.v1.")
