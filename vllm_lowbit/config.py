# SPDX-License-Identifier: Apache-2.0
"""The quantization config vLLM builds for ``--quantization lowbit``."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch
from huggingface_hub import snapshot_download
from vllm.config import get_current_vllm_config
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts
from vllm.model_executor.layers.fused_moe.router.gate_linear import GateLinear
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization.base_config import (
    QuantizationConfig,
    QuantizeMethodBase,
)
from vllm.model_executor.layers.vocab_parallel_embedding import (
    ParallelLMHead,
    VocabParallelEmbedding,
)
from vllm.platforms import current_platform

from .architecture import ModelShape
from .checkpoint import INDEX, check_plain_checkpoint
from .errors import ConfigError, UnsupportedError
from .lowbit_checkpoint import MANIFEST
from .manifest import require_headers
from .module_names import ModuleNames
from .placement import check_scheme, flag_only_rotations
from .refusals import refuse_attention, refuse_engine_options
from .rotations import check_rotations
from .schema import LoadTimeOptions, LowbitConfig, Scheme, scheme_from_name
from .takeover.checkpoint import check_foreign_checkpoint, parse, read_quantization
from .takeover.foreign import ForeignFormat
from .threads import let_idle_threads_sleep
from .verification import Verification
from .worker_metrics import identify, make_directory

if TYPE_CHECKING:
    from transformers import PreTrainedConfig
    from vllm.model_executor.models.utils import WeightsMapper


class LowbitQuantizationConfig(QuantizationConfig):
    """What every layer of the model runs, decided before any of them exists.

    Built from the flag (a plain checkpoint, quantized while loading), from the
    scheme in ``--hf-overrides``, or from a checkpoint's own quantization_config, which
    may be another tool's.
    """

    def __init__(
        self,
        options: LoadTimeOptions | None = None,
        stored: LowbitConfig | ForeignFormat | None = None,
    ) -> None:
        """From a user's options for a plain checkpoint, or a quantized one's config.

        Args:
            options: None for the defaults.
            stored: quantization_config of the checkpoint, None for a plain one.
        """
        super().__init__()
        self.stored = stored
        if stored is not None:
            self.scheme = stored.scheme
        else:
            options = options or LoadTimeOptions()
            self.scheme = scheme_from_name(
                options.scheme, options.activations_symmetric, options.vocab_bits
            )
        self._resolved: LowbitConfig | None = None
        self._names = ModuleNames()
        self._checked_engine = False
        self._verification: Verification | None = None

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

    @property
    def checkpoint_format(self) -> str:
        """``plain``, ``lowbit``, or the other tool's format that is taken over."""
        if isinstance(self.stored, ForeignFormat):
            return self.stored.name
        return "plain" if self.stored is None else "lowbit"

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
        """From a checkpoint's quantization_config, ours or another tool's."""
        source = "config.json: quantization_config"
        if config.get("quant_method") == "lowbit":
            return cls(stored=LowbitConfig.parse(config, source))
        return cls(stored=parse(config, source))

    @classmethod
    def override_quantization_method(
        cls,
        hf_quant_cfg: dict[str, Any],
        user_quant: str | None,
        hf_config: Any = None,
    ) -> str | None:
        """Take a quantized checkpoint over, if and only if the user asked for it."""
        return "lowbit" if user_quant == "lowbit" else None

    @staticmethod
    def get_checkpoint_weight_mapper() -> "WeightsMapper":
        """Leave out tensors whose values are checked beforehand and not needed."""
        from vllm.model_executor.models.utils import WeightsMapper

        return WeightsMapper(orig_to_new_suffix={".g_idx": None, ".weight_shape": None})

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
        """Read the model's sizes, place or check the rotations, check the headers.

        The first process comes here before it starts any other.
        """
        if hf_config is None:
            raise UnsupportedError(f"{model_name}: vLLM passed no model config")
        make_directory()
        if current_platform.device_type == "cpu":
            let_idle_threads_sleep()
        source = f"{model_name}/config.json"
        data = hf_config.to_dict()
        shape = ModelShape.from_config(data, source)
        check_scheme(shape, self.scheme, source)
        self._names = shape.names
        if self.stored is None:
            rotations = flag_only_rotations(shape, self.scheme, source)
            self._resolved = LowbitConfig(scheme=self.scheme, rotations=rotations)
        else:
            _refuse_options(data, self.scheme, model_name)
            self._resolved = _resolve(self.stored, shape, source)
        # A model of a hub is checked in the worker, once it is on disk.
        if Path(model_name).is_dir():
            self._check_files(model_name, shape)

    def _check_files(self, directory: str, shape: ModelShape) -> None:
        if self.stored is None:
            check_plain_checkpoint(directory, shape)
            return
        if read_quantization(directory)[1] != self.stored:
            raise ConfigError(
                f"{directory}/config.json: quantization_config is not the one vLLM was "
                "given; leave it out of --hf-overrides"
            )
        if isinstance(self.stored, ForeignFormat):
            check_foreign_checkpoint(directory, shape, self.stored)
        else:
            require_headers(Path(directory), shape, self.stored)

    def get_quant_method(
        self, layer: torch.nn.Module, prefix: str
    ) -> QuantizeMethodBase | None:
        """The method of one layer; refuses layers it does not know by name."""
        from .attention import KV4CacheMethod
        from .linear_checkpoint import CheckpointLinearMethod
        from .linear_load_time import LoadTimeLinearMethod
        from .linear_takeover import TakeoverLinearMethod
        from .vocabulary import vocabulary_method

        self._check_engine()
        plain = self.stored is None
        if isinstance(layer, ParallelLMHead | VocabParallelEmbedding):
            return vocabulary_method(self.resolved, plain, prefix)
        if isinstance(layer, RoutedExperts):
            return self._experts_method(layer, prefix)
        if isinstance(layer, GateLinear):
            return UnquantizedLinearMethod()
        if isinstance(layer, LinearBase):
            if isinstance(self.stored, ForeignFormat):
                return TakeoverLinearMethod(self.resolved, prefix, self.stored)
            if self._verification is None:
                return LoadTimeLinearMethod(self.resolved, prefix, self._names)
            return CheckpointLinearMethod(
                self.resolved, prefix, self._verification, self._names
            )
        if isinstance(layer, AttentionLayerBase):
            if self.scheme.kv_cache.bits == 16:
                return None
            refuse_attention(layer, prefix)
            return KV4CacheMethod(self, self.resolved)
        raise UnsupportedError(
            f"layer {prefix} of type {type(layer).__name__} has no lowbit method; "
            "supported: linears, experts, attention and the vocabulary embedding"
        )

    def _experts_method(self, layer: Any, prefix: str) -> QuantizeMethodBase:
        from .experts_checkpoint import CheckpointExpertsMethod
        from .experts_load_time import LoadTimeExpertsMethod

        if self._verification is not None:
            return CheckpointExpertsMethod(
                self.resolved, layer.moe_config, prefix, self._verification
            )
        return LoadTimeExpertsMethod(self.resolved, layer.moe_config, prefix)

    def _check_engine(self) -> None:
        if self._checked_engine:
            return
        vllm_config = get_current_vllm_config()
        refuse_engine_options(vllm_config, self.resolved)
        model, load = vllm_config.model_config, vllm_config.load_config
        directory = model.model
        if not Path(directory).is_dir():
            directory = snapshot_download(
                model.model,
                revision=model.revision,
                cache_dir=load.download_dir,
                allow_patterns=["*.safetensors", INDEX, MANIFEST, "config.json"],
            )
            shape = ModelShape.from_config(model.hf_config.to_dict(), model.model)
            self._check_files(directory, shape)
        parallel = vllm_config.parallel_config
        identify(parallel.data_parallel_index, parallel.rank)
        if isinstance(self.stored, LowbitConfig):
            self._verification = Verification(
                Path(directory), parallel.rank, parallel.world_size
            )
        if vllm_config.load_config.load_format == "auto":
            # "auto" falls back to pickled *.bin files, and prefers
            # consolidated*.safetensors to the files that were checked.
            vllm_config.load_config.load_format = "safetensors"
        self._checked_engine = True


def _resolve(
    stored: LowbitConfig | ForeignFormat, shape: ModelShape, source: str
) -> LowbitConfig:
    """What a quantized checkpoint runs; refused where it does not fit the model."""
    if isinstance(stored, ForeignFormat):
        return stored.resolve(shape, source)
    check_rotations(shape, stored, source)
    return stored


def _refuse_options(hf_config: Mapping[str, Any], scheme: Scheme, model: str) -> None:
    """vLLM would ignore these: a checkpoint's own config comes first."""
    for key in ("quantization_config_dict_json", "quantization_config_file"):
        if hf_config.get(key) is not None:
            raise ConfigError(
                f"--hf-overrides: {key} chooses a scheme for a plain checkpoint; "
                f"{model} is quantized already, by scheme {scheme.name}"
            )
