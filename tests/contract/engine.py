# SPDX-License-Identifier: Apache-2.0
"""Rows of the engine: its configs, the quantization config, logs, shutdown."""

import copy
import inspect
import logging
import typing
from dataclasses import fields
from types import SimpleNamespace
from typing import Any

import torch

from vllm_lowbit import truth
from vllm_lowbit.schema import scheme_from_name

from .rows import holds, members, parameters


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


@holds("SchedulerConfig")
def _(symbol: Any, real: Any) -> None:
    assert real.config.scheduler_config.max_num_batched_tokens >= 256


@holds("CompilationConfig")
def _(symbol: Any, real: Any) -> None:
    # None or 0 where nothing is captured.
    size = real.config.compilation_config.max_cudagraph_capture_size
    assert size is None or size >= 0


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


@holds("current_platform")
def _(symbol: Any, real: Any) -> None:
    assert symbol.device_type in ("cpu", "cuda")


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


@holds("DEFAULT_LOGGING_CONFIG")
def _(symbol: Any, real: Any) -> None:
    assert symbol["loggers"]["vllm"]["handlers"]
    assert truth.logger.parent is logging.getLogger("vllm")


@holds("shutdown")
def _(symbol: Any, real: Any) -> None:
    inspect.signature(symbol).bind(None)
    assert not hasattr(real.resolve("vllm.LLM"), "shutdown"), "use it instead"


@holds("cleanup_dist_env_and_memory")
def _(symbol: Any, real: Any) -> None:
    assert real.resolve("vllm.distributed.cleanup_dist_env_and_memory") is symbol
    inspect.signature(symbol).bind()
