# SPDX-License-Identifier: Apache-2.0
"""What we need of vLLM's private symbols, against the ledger PRIVATE_SYMBOLS.md."""

import copy
import inspect
import logging
import tempfile
import typing
from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from vllm_lowbit import truth
from vllm_lowbit.errors import CheckpointError
from vllm_lowbit.kernels.kv4_store.layout import bytes_per_token
from vllm_lowbit.schema import scheme_from_name

pytest.importorskip("vllm")
from vllm_lowbit.attention import KV4AttentionBackend, KV4AttentionImpl
from vllm_lowbit.parameters import ExpertShard
from vllm_lowbit.vocabulary import EmbeddingMethod

LOADER = "vllm.model_executor.model_loader.default_loader.DefaultModelLoader"
CONTRACT: dict[str, Callable[[Any, Any], None]] = {}


def holds(symbol: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Registers the assertion of a row, named by the last part of its symbol."""

    def register(assertion: Callable[..., None]) -> Callable[..., None]:
        CONTRACT[symbol] = assertion
        return assertion

    return register


@pytest.fixture(scope="module")
def real(
    engine_config: Callable[..., Any], ledger: dict[str, set[str]], resolve: Any
) -> Iterator[SimpleNamespace]:
    """Real vLLM objects for ref-7m: config, a stock and a 4-bit attention layer."""
    from vllm.config import set_current_vllm_config
    from vllm.model_executor.layers.attention import Attention

    config = engine_config()
    full = {symbol.rpartition(".")[2]: symbol for symbol in ledger}
    with set_current_vllm_config(config):
        sizes = (4, 64, 0.125, 2)
        yield SimpleNamespace(
            rows={name: ledger[symbol] for name, symbol in full.items()},
            named=lambda name: resolve(full[name]),
            resolve=resolve,
            config=config,
            quant=config.quant_config,
            stock=Attention(*sizes, prefix="layers.0.attn"),
            kv4=Attention(
                *sizes, prefix="layers.1.attn", quant_config=config.quant_config
            ),
        )


def members(value: Any, names: set[str]) -> None:
    for name in names:
        assert hasattr(value, name), f"{type(value).__name__} has no {name}"


def parameters(function: Any) -> list[str]:
    return [name for name in inspect.signature(function).parameters if name != "self"]


@holds("_CUSTOMIZED_METHOD_TO_QUANT_CONFIG")
def _(symbol: Any, real: Any) -> None:
    assert symbol["lowbit"] is type(real.quant)


@holds("get_quant_config")
def _(symbol: Any, real: Any) -> None:
    model = copy.copy(real.config.model_config)
    for overrides, name in (
        ({}, "w4a4kv4"),
        ({"quantization_config_dict_json": '{"scheme": "w4a16"}'}, "w4a16"),
    ):
        model.hf_overrides = overrides
        assert symbol(model, real.config.load_config).scheme.name == name
    # A checkpoint's own config wins, silently: we refuse the option ourselves.
    model.hf_config = copy.copy(model.hf_config)
    model.hf_config.quantization_config = {
        "quant_method": "lowbit",
        "scheme": scheme_from_name("w3a16").model_dump(),
        "rotations": {},
    }
    quant = symbol(model, real.config.load_config)
    assert quant.scheme.name == "w3a16" and quant.stored is not None


@holds("_get_quantization_config")
def _(symbol: Any, real: Any) -> None:
    quant = symbol(real.config.model_config, real.config.load_config)
    assert quant.resolved.rotations.max_tensor_parallel_size == 2  # of ref-7m


@holds("VllmConfig")
def _(symbol: Any, real: Any) -> None:
    members(real.config, real.rows["VllmConfig"])
    assert real.config.lora_config is real.config.speculative_config is None
    assert real.config.kv_transfer_config is None


@holds("ModelConfig")
def _(symbol: Any, real: Any) -> None:
    model = real.config.model_config
    members(model, real.rows["ModelConfig"])
    assert model.runner_type == "generate" and not model.is_multimodal_model
    assert not model.enable_prompt_embeds and model.quantization_config is None
    assert model.head_dtype == model.dtype == torch.bfloat16


@holds("CacheConfig")
def _(symbol: Any, real: Any) -> None:
    assert real.config.cache_config.cache_dtype == "auto"
    assert not real.config.cache_config.kv_cache_dtype_skip_layers


@holds("ParallelConfig")
def _(symbol: Any, real: Any) -> None:
    assert real.config.parallel_config.tensor_parallel_size == 1
    assert real.config.parallel_config.decode_context_parallel_size == 1
    assert real.config.parallel_config.prefill_context_parallel_size == 1
    assert real.config.parallel_config.data_parallel_index == 0
    assert real.config.parallel_config.rank == 0
    assert real.config.parallel_config.world_size == 1


@holds("SpeculativeConfig")
def _(symbol: Any, real: Any) -> None:
    assert "method" in {field.name for field in fields(symbol)}
    methods = real.resolve("vllm.config.speculative.SpeculativeMethod")
    assert {"ngram", "suffix"} <= set(typing.get_args(methods))


@holds("LoadConfig")
def _(symbol: Any, real: Any) -> None:
    assert symbol().load_format == "auto"
    assert real.config.load_config.load_format == "safetensors"  # narrowed by us


@holds("DeviceConfig")
def _(symbol: Any, real: Any) -> None:
    assert real.config.device_config.device_type in ("cpu", "cuda")


@holds("_prepare_weights")
def _(symbol: Any, real: Any) -> None:
    config = real.resolve("vllm.config.load.LoadConfig")()
    loader = real.resolve(LOADER)(config)
    config.load_format = "safetensors"  # as we do it, after the loader is built
    with tempfile.TemporaryDirectory() as directory:
        for name in ("model.safetensors", "pytorch_model.bin", "model.pt"):
            (Path(directory) / name).touch()
        files = symbol(loader, directory, None, None, True, None)[1]
        assert files == [f"{directory}/model.safetensors"]
        Path(files[0]).unlink()
        with pytest.raises(RuntimeError, match="Cannot find any model weights"):
            symbol(loader, directory, None, None, True, None)


def gate_up(real: Any, parts: int, last: float = 1.0, bias: bool = False) -> Any:
    """A fused linear with its first parts loaded through vLLM's loader.

    Each part's bias comes before its weight, as names are ordered in files.
    """
    from vllm.model_executor.layers.linear import MergedColumnParallelLinear

    layer = MergedColumnParallelLinear(
        256,
        [32, 32],
        bias=bias,
        quant_config=real.quant,
        prefix="layers.0.mlp.gate_up_proj",
        disable_tp=True,
        params_dtype=torch.bfloat16,
    )
    for part in range(parts):
        if bias:
            part_bias = torch.full((32,), 1.0 + part, dtype=torch.bfloat16)
            layer.bias.weight_loader(layer.bias, part_bias, part)
        rows = torch.ones(32, 256, dtype=torch.bfloat16)
        rows[-1, -1] = last if part == 1 else 1.0
        layer.weight.weight_loader(layer.weight, rows, part)
    return layer


@holds("initialize_online_processing")
def _(symbol: Any, real: Any) -> None:
    assert gate_up(real, 0).weight.is_meta
    assert gate_up(real, 1).weight.is_meta
    assert gate_up(real, 2).weight.dtype in (torch.int8, torch.uint8)


@holds("get_layerwise_info")
def _(symbol: Any, real: Any) -> None:
    assert type(symbol(gate_up(real, 0))) is real.named("LayerReloadingInfo")


@holds("LayerReloadingInfo")
def _(symbol: Any, real: Any) -> None:
    info = real.named("get_layerwise_info")(gate_up(real, 1))
    assert (info.load_numel, info.load_numel_total) == (32 * 256, 2 * 32 * 256)


@holds("finalize_layerwise_processing")
def _(symbol: Any, real: Any) -> None:
    message = "linear layers.0.mlp.gate_up_proj: only 8192 of 16384 elements"
    with pytest.raises(CheckpointError, match=message):
        symbol(gate_up(real, 1), real.config.model_config)


@holds("LinearBase")
def _(symbol: Any, real: Any) -> None:
    layer = gate_up(real, 2)
    assert isinstance(layer, symbol) and layer.bias is None
    codes = layer.weight
    layer.quant_method.process_weights_after_loading(layer)  # as the loader does
    assert layer.weight is codes
    assert gate_up(real, 1, bias=True).weight.is_meta
    biased = gate_up(real, 2, bias=True)
    assert not biased.weight.is_meta
    assert biased.bias.tolist() == [1.0] * 32 + [2.0] * 32


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


@holds("current_platform")
def _(symbol: Any, real: Any) -> None:
    assert symbol.device_type in ("cpu", "cuda")


@holds("SchedulerConfig")
def _(symbol: Any, real: Any) -> None:
    assert real.config.scheduler_config.max_num_batched_tokens >= 256


@holds("CompilationConfig")
def _(symbol: Any, real: Any) -> None:
    # None or 0 where nothing is captured.
    size = real.config.compilation_config.max_cudagraph_capture_size
    assert size is None or size >= 0


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


@holds("StatLoggerBase")
def _(symbol: Any, real: Any) -> None:
    assert symbol.__abstractmethods__ == {
        "__init__",
        "record",
        "log_engine_initialized",
    }
    assert parameters(symbol.__init__) == ["vllm_config", "engine_index"]
    found = real.resolve("vllm.v1.metrics.loggers.load_stat_logger_plugin_factories")()
    assert [f.__name__ for f in found if issubclass(f, symbol)] == ["LowbitStatLogger"]


@holds("UnquantizedEmbeddingMethod")
def _(symbol: Any, real: Any) -> None:
    members(symbol, {"create_weights", "embedding", "tie_weights"})
    asked = "vllm.model_executor.layers.quantization.base_config"
    assert real.resolve(f"{asked}.method_has_implemented_embedding")(EmbeddingMethod)


def vocabulary(real: Any) -> Any:
    """A head of 100 tokens, quantized to 8 bits while loading."""
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

    quant, model = type(real.quant), real.config.model_config
    config = quant.from_config_dict_json('{"vocab_bits": 8}')
    config.maybe_update_config(model.model, model.hf_config)
    return ParallelLMHead(100, 256, None, quant_config=config, disable_tp=True)


@holds("VocabParallelEmbedding")
def _(symbol: Any, real: Any) -> None:
    layer = vocabulary(real)
    assert isinstance(layer, symbol)
    assert layer.params_dtype == torch.get_default_dtype()
    # Without a name in Llama: our errors give it one.
    llama = real.resolve("vllm.model_executor.models.llama.LlamaModel")
    built = inspect.getsource(llama).partition("= VocabParallelEmbedding(")[2]
    assert "prefix" not in built.partition(")")[0]


@holds("VocabParallelEmbeddingShardIndices")
def _(symbol: Any, real: Any) -> None:
    assert vocabulary(real).shard_indices.num_org_elements == 100


@holds("weight_loader")
def _(symbol: Any, real: Any) -> None:
    parameter: Any = torch.nn.Parameter(torch.full((128, 2), torch.nan), False)
    parameter.output_dim = 0
    symbol(vocabulary(real), parameter, torch.ones(100, 2))
    assert (parameter[:100] == 1).all() and (parameter[100:] == 0).all()


@holds("_apply_head")
def _(symbol: Any, real: Any) -> None:
    x, layer = torch.ones(1, 2), SimpleNamespace(weight=torch.ones(3, 2))
    layer.quant_method = SimpleNamespace(apply=lambda layer, x, bias: "asked")
    same, other = (
        SimpleNamespace(head_dtype=t) for t in (torch.float32, torch.float64)
    )
    assert symbol(same, layer, x, None) == "asked"
    with pytest.raises(ValueError, match="only supported for an unquantized lm_head"):
        symbol(other, layer, x, None)
    layer.quant_method = object.__new__(EmbeddingMethod)
    assert symbol(other, layer, x, None).dtype == torch.float64  # not asked


@holds("_verify_quantization")
def _(symbol: Any, real: Any) -> None:
    for flag, method in (("lowbit", "lowbit"), (None, "compressed-tensors")):
        stored = {"quant_method": "compressed-tensors"}
        model = SimpleNamespace(
            quantization=flag,
            hf_config=None,
            model_arch_config=SimpleNamespace(quantization_config=stored),
        )
        symbol(model)
        assert model.quantization == method


@holds("AutoWeightsLoader")
def _(symbol: Any, real: Any) -> None:
    model = torch.nn.Module()
    model.quant_config, model.linear = real.quant, torch.nn.Linear(2, 2, bias=False)
    names = ("g_idx", "weight_shape", "bias", "weight")
    loaded = symbol(model).load_weights(
        (f"linear.{name}", torch.ones(2, 2)) for name in names
    )
    assert loaded == {"linear.weight"}


@holds("WeightsMapper")
def _(symbol: Any, real: Any) -> None:
    assert isinstance(real.quant.get_checkpoint_weight_mapper(), symbol)


@holds("QKVParallelLinear")
def _(symbol: Any, real: Any) -> None:
    """How it cuts is tested with the layers, tests/takeover/test_layers.py."""
    newer = real.resolve("vllm.model_executor.layers.linear.WEIGHT_LOADER_V2_SUPPORTED")
    assert "TakeoverLinearMethod" not in newer
    for name in ("input_dim", "output_dim", "packed_dim", "packed_factor"):
        loaders = [symbol.weight_loader]
        if name == "input_dim":
            row = "vllm.model_executor.layers.linear.RowParallelLinear.weight_loader"
            loaders = [real.resolve(row)]
        assert name in inspect.getsource(loaders[0])


@holds("checkpoint_has_lm_head")
def _(symbol: Any, real: Any) -> None:
    for name, own in (("lm_head.input_scale", False), ("lm_head.weight", True)):
        with tempfile.TemporaryDirectory() as directory:
            save_file({name: torch.ones(2)}, Path(directory) / "model.safetensors")
            assert bool(symbol(directory)) is own


@holds("DEFAULT_LOGGING_CONFIG")
def _(symbol: Any, real: Any) -> None:
    assert symbol["loggers"]["vllm"]["handlers"]
    assert truth.logger.parent is logging.getLogger("vllm")


def test_non_finite_part_of_a_fused_linear_is_named(real: Any) -> None:
    message = "^tensor layers.0.mlp.up_proj.weight holds a non-finite value"
    with pytest.raises(CheckpointError, match=message):
        gate_up(real, 2, last=float("nan"))


@holds("shutdown")
def _(symbol: Any, real: Any) -> None:
    inspect.signature(symbol).bind(None)
    assert not hasattr(real.resolve("vllm.LLM"), "shutdown"), "use it instead"


@holds("cleanup_dist_env_and_memory")
def _(symbol: Any, real: Any) -> None:
    assert real.resolve("vllm.distributed.cleanup_dist_env_and_memory") is symbol
    inspect.signature(symbol).bind()


@holds("UnquantizedLinearMethod")
def _(symbol: Any, real: Any) -> None:
    kind = real.named("GateLinear")
    router = object.__new__(kind)
    assert type(real.quant.get_quant_method(router, "mlp.gate")) is symbol
    asked = f"isinstance(self.quant_method, {symbol.__name__})"
    assert asked in inspect.getsource(kind.__init__)


@holds("GateLinear")
def _(symbol: Any, real: Any) -> None:
    assert issubclass(
        symbol, real.resolve("vllm.model_executor.layers.linear.LinearBase")
    )


@holds("RoutedExperts")
def _(symbol: Any, real: Any) -> None:
    """That it calls our methods as we need is tested with engines, tests/live."""
    assert "is_monolithic" in inspect.getsource(symbol.forward_modular)
    load = parameters(ExpertShard.load)
    source = inspect.getsource(symbol.load_weights)
    assert all(f"{name}=" in source for name in load)


@holds("FusedMoEMethodBase")
def _(symbol: Any, real: Any) -> None:
    assert symbol.__abstractmethods__ == {
        "create_weights",
        "get_fused_moe_quant_config",
    }
    asserted = inspect.getsource(real.named("RoutedExperts")._get_quant_method)
    assert f"isinstance(quant_method, {symbol.__name__})" in asserted


@holds("FusedMoEConfig")
def _(symbol: Any, real: Any) -> None:
    names = {field.name for field in fields(symbol)}
    assert real.rows["FusedMoEConfig"] <= names


@holds("FusedMoEParallelConfig")
def _(symbol: Any, real: Any) -> None:
    names = {field.name for field in fields(symbol)} | set(vars(symbol))
    assert real.rows["FusedMoEParallelConfig"] <= names


@holds("FusedMoEQuantConfig")
def _(symbol: Any, real: Any) -> None:
    base = real.named("FusedMoEMethodBase").get_fused_moe_quant_config
    assert typing.get_type_hints(
        base, {**vars(inspect.getmodule(base)), "RoutedExperts": Any}
    )["return"] == (symbol | None)


@holds("MoEActivation")
def _(symbol: Any, real: Any) -> None:
    assert symbol.from_str("silu") is symbol.SILU


def test_every_row_has_an_assertion(ledger: dict[str, set[str]]) -> None:
    names = [symbol.rpartition(".")[2] for symbol in ledger]
    assert sorted(names) == sorted(CONTRACT)


@pytest.mark.parametrize("symbol", sorted(CONTRACT))
def test_symbol(symbol: str, real: SimpleNamespace) -> None:
    CONTRACT[symbol](real.named(symbol), real)
