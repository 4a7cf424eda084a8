# SPDX-License-Identifier: Apache-2.0
"""Engine options and attention layers that would not run what was asked for.

Each is refused by name before weights are read. The rotated value heads and the
4-bit cache are visible to these features; none of them is silently ignored.
"""

from typing import Any

import torch
from vllm.config import VllmConfig
from vllm.model_executor.layers.attention import Attention
from vllm.v1.attention.backend import AttentionType

from .errors import UnsupportedError
from .kernels import dispatch
from .lowbit_checkpoint import residual_is_online
from .schema import LowbitConfig

LOAD_FORMATS = ("auto", "safetensors")


def refuse_engine_options(vllm_config: VllmConfig, config: LowbitConfig) -> None:
    """Raise UnsupportedError naming the first option that cannot be honoured."""
    parallel = vllm_config.parallel_config
    largest = config.rotations.max_tensor_parallel_size
    if largest % parallel.tensor_parallel_size:
        raise UnsupportedError(
            f"--tensor-parallel-size {parallel.tensor_parallel_size}: the rotations of "
            f"this model stay inside {largest} blocks, so it must divide {largest}"
        )
    for option, reason in _unsupported_options(vllm_config, config):
        raise UnsupportedError(f"{option} is not supported by lowbit: {reason}")


def _unsupported_options(
    vllm_config: VllmConfig, config: LowbitConfig
) -> list[tuple[str, str]]:
    model, cache = vllm_config.model_config, vllm_config.cache_config
    load = vllm_config.load_config
    parallel, speculative = vllm_config.parallel_config, vllm_config.speculative_config
    rotated = "value heads are rotated inside the model"
    found: list[tuple[bool, str, str]] = [
        (
            model.quantization_config is not None,
            "--quantization-config",
            "the scheme is chosen through --hf-overrides",
        ),
        (
            load.load_format not in LOAD_FORMATS,
            f"--load-format {load.load_format}",
            "only safetensors files are read",
        ),
        (vllm_config.lora_config is not None, "LoRA (--enable-lora)", rotated),
        (
            speculative is not None and speculative.method not in ("ngram", "suffix"),
            f"speculative method {getattr(speculative, 'method', None)!r}",
            "only ngram and suffix, which need no draft model",
        ),
        (
            model.runner_type != "generate",
            f"runner {model.runner_type!r}",
            "only text generation",
        ),
        (
            bool(model.enable_prompt_embeds),
            "--enable-prompt-embeds",
            "not tested",
        ),
        (
            model.head_dtype != model.dtype
            and (config.scheme.vocab_bits != 16 or residual_is_online(config)),
            f"--hf-overrides head_dtype {model.head_dtype}",
            "the head is quantized or rotated",
        ),
        (
            vllm_config.device_config.device_type != "cpu"
            and model.dtype == torch.float32,
            "--dtype float32",
            "the matrix units of a GPU take 16 bits; use bfloat16 or float16",
        ),
        (
            model.is_multimodal_model,
            "a multimodal model",
            "only text models",
        ),
    ]
    if config.scheme.kv_cache.bits != 16:
        found += [
            (
                cache.cache_dtype != "auto",
                f"--kv-cache-dtype {cache.cache_dtype}",
                f"scheme {config.scheme.name} has its own cache; leave it at auto",
            ),
            (
                bool(cache.kv_cache_dtype_skip_layers),
                "--kv-cache-dtype-skip-layers",
                "every layer's cache is quantized",
            ),
            (
                vllm_config.kv_transfer_config is not None,
                "a KV connector (--kv-transfer-config)",
                "it does not know the packed page format",
            ),
            (
                parallel.decode_context_parallel_size > 1,
                "--decode-context-parallel-size",
                "the packed cache is not sharded over tokens",
            ),
            (
                parallel.prefill_context_parallel_size > 1,
                "--prefill-context-parallel-size",
                "the packed cache is not sharded over tokens",
            ),
        ]
    return [(option, reason) for hit, option, reason in found if hit]


def refuse_attention(layer: torch.nn.Module, prefix: str) -> None:
    """Raise UnsupportedError unless the layer's cache can be the packed one."""
    if type(layer) is not Attention:
        raise UnsupportedError(
            f"layer {prefix}: attention of type {type(layer).__name__} has no 4-bit "
            "cache; supported: plain decoder self-attention (choose a scheme without "
            "kv, such as w4a4)"
        )
    problems: dict[str, Any] = {
        f"attention type {layer.attn_type}": layer.attn_type != AttentionType.DECODER,
        f"head_size_v {layer.head_size_v} other than head_size {layer.head_size}": (
            layer.head_size_v != layer.head_size
        ),
        f"attention sinks that {type(layer.impl).__name__} does not keep": (
            layer.has_sink and getattr(layer.impl, "sinks", None) is None
        ),
        "a prefix-LM mask": layer.use_mm_prefix,
        "alibi": getattr(layer.impl, "alibi_slopes", None) is not None,
        "a KV cache shared between layers": (
            layer.kv_sharing_target_layer_name is not None
        ),
    }
    for problem, present in problems.items():
        if present:
            raise UnsupportedError(f"layer {prefix}: {problem} has no 4-bit cache")
    device = torch.get_default_device().type
    for operator in ("kv4_store", "kv4_attention"):
        try:
            dispatch.select(operator, device, head_dim=layer.head_size)
        except ValueError as error:
            raise UnsupportedError(f"layer {prefix}: {error}") from None
