# SPDX-License-Identifier: Apache-2.0
"""The quantization config vLLM builds for ``--quantization lowbit``."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch
from huggingface_hub import snapshot_download
from vllm.config import get_current_vllm_config
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.model_executor.layers.linear import LinearBase
from vllm.model_executor.layers.quantization.base_config import (
    QuantizationConfig,
    QuantizeMethodBase,
)
from vllm.model_executor.layers.vocab_parallel_embedding import (
    ParallelLMHead,
    VocabParallelEmbedding,
)

from .architecture import LlamaShape, check_scheme, flag_only_rotations
from .checkpoint import INDEX, check_plain_checkpoint
from .errors import ConfigError, UnsupportedError
from .refusals import refuse_attention, refuse_engine_options
from .schema import LoadTimeOptions, LowbitConfig, scheme_from_name

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


class LowbitQuantizationConfig(QuantizationConfig):
    """What every layer of the model runs, decided before any of them exists.

    Built from the flag (a plain checkpoint, quantized while loading), from the
    scheme in ``--hf-overrides``, or from a checkpoint's own quantization_config.
    """

    def __init__(self, options: LoadTimeOptions | None = None) -> None:
        super().__init__()
        options = options or LoadTimeOptions()
        self.scheme = scheme_from_name(options.scheme, options.activations_symmetric)
        self._resolved: LowbitConfig | None = None
        self._checked_engine = False

    @property
    def resolved(self) -> LowbitConfig:
        """Scheme and rotations of the model at hand.

        Raises:
            UnsupportedError: before vLLM has shown the model's config.
        """
        if self._resolved is None:
            raise UnsupportedError(
                "the lowbit method has not been given a model; start it through "
                "`vllm serve MODEL --quantization lowbit` or vllm.LLM"
            )
        return self._resolved

    @classmethod
    def get_name(cls) -> str:
        return "lowbit"

    @classmethod
    def get_supported_act_dtypes(cls) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        return 80

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Self:
        """From a checkpoint's quantization_config."""
        method = config.get("quant_method")
        if method != "lowbit":
            raise UnsupportedError(
                f"the checkpoint is already quantized by {method!r}; lowbit quantizes "
                "plain bf16/fp16 checkpoints"
            )
        LowbitConfig.parse(config, "config.json: quantization_config")
        raise UnsupportedError(
            "config.json: quantization_config: serving a lowbit checkpoint is not "
            "supported by this version; serve the plain base model"
        )

    @classmethod
    def from_config_dict_json(cls, text: str) -> Self:
        """From ``--hf-overrides '{"quantization_config_dict_json": "..."}'``."""
        source = "--hf-overrides: quantization_config_dict_json"
        try:
            data = json.loads(text)
        except (TypeError, ValueError, RecursionError) as error:
            raise ConfigError(f"{source}: not JSON: {error}") from None
        return cls(LoadTimeOptions.parse(data, source))

    def maybe_update_config(
        self,
        model_name: str,
        hf_config: "PreTrainedConfig | None" = None,
        revision: str | None = None,
    ) -> None:
        """Read the model's sizes, place the rotations, check the files' headers."""
        if hf_config is None:
            raise UnsupportedError(f"{model_name}: vLLM passed no model config")
        source = f"{model_name}/config.json"
        shape = LlamaShape.from_config(hf_config.to_dict(), source)
        check_scheme(shape, self.scheme, source)
        rotations = flag_only_rotations(shape, self.scheme, source)
        self._resolved = LowbitConfig(scheme=self.scheme, rotations=rotations)
        # A model of a hub is checked in the worker, once it is on disk.
        if Path(model_name).is_dir():
            check_plain_checkpoint(model_name, shape)

    def get_quant_method(
        self, layer: torch.nn.Module, prefix: str
    ) -> QuantizeMethodBase | None:
        """The method of one layer; refuses layers it does not know by name."""
        from .attention import KV4CacheMethod
        from .linear import LowbitLinearMethod
        from .vocabulary import EmbeddingMethod

        self._check_engine()
        if isinstance(layer, ParallelLMHead | VocabParallelEmbedding):
            return EmbeddingMethod(prefix)
        if isinstance(layer, LinearBase):
            return LowbitLinearMethod(self.resolved, prefix)
        if isinstance(layer, AttentionLayerBase):
            if self.scheme.kv_cache.bits == 16:
                return None
            refuse_attention(layer, prefix)
            return KV4CacheMethod(self, self.resolved)
        raise UnsupportedError(
            f"layer {prefix} of type {type(layer).__name__} has no lowbit method; "
            "supported: linears, attention and the vocabulary embedding"
        )

    def _check_engine(self) -> None:
        if self._checked_engine:
            return
        vllm_config = get_current_vllm_config()
        refuse_engine_options(vllm_config, self.resolved)
        model, load = vllm_config.model_config, vllm_config.load_config
        if not Path(model.model).is_dir():
            directory = snapshot_download(
                model.model,
                revision=model.revision,
                cache_dir=load.download_dir,
                allow_patterns=["*.safetensors", INDEX],
            )
            shape = LlamaShape.from_config(model.hf_config.to_dict(), model.model)
            check_plain_checkpoint(directory, shape)
        if vllm_config.load_config.load_format == "auto":
            # "auto" falls back to pickled *.bin files, and prefers
            # consolidated*.safetensors to the files that were checked.
            vllm_config.load_config.load_format = "safetensors"
        self._checked_engine = True
