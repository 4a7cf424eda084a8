# SPDX-License-Identifier: Apache-2.0
"""The ledger PRIVATE_SYMBOLS.md names all of vLLM that our code touches."""

import ast
import importlib
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import vllm_lowbit

pytest.importorskip("vllm")

PACKAGE = Path(str(vllm_lowbit.__file__)).parent

# Documented by vLLM for plugins and models outside of its tree, or only used as the
# class of an isinstance, a base or an annotation.
PUBLIC = {
    "vllm.config.VllmConfig",
    "vllm.config.get_current_vllm_config",
    "vllm.model_executor.layers.attention.Attention",
    "vllm.model_executor.layers.attention_layer_base.AttentionLayerBase",
    "vllm.model_executor.layers.linear.LinearBase",
    "vllm.model_executor.layers.linear.LinearMethodBase",
    "vllm.model_executor.layers.quantization.register_quantization_config",
    "vllm.model_executor.layers.quantization.base_config.QuantizationConfig",
    "vllm.model_executor.layers.quantization.base_config.QuantizeMethodBase",
    "vllm.model_executor.layers.vocab_parallel_embedding.ParallelLMHead",
    "vllm.model_executor.layers.vocab_parallel_embedding.VocabParallelEmbedding",
    "vllm.model_executor.utils.set_weight_attrs",
    "vllm.v1.attention.backend.AttentionBackend",
    "vllm.v1.attention.backend.AttentionImpl",
    "vllm.v1.attention.backend.AttentionLayer",
    "vllm.v1.attention.backend.AttentionMetadata",
    "vllm.v1.attention.backend.AttentionMetadataBuilder",
    "vllm.v1.attention.backend.AttentionType",
}

# Which variables of our modules hold an object of which symbol.
VARIABLES = {
    "attention.py": {
        "layer": "Attention",
        "stock": "CPUAttentionBackendImpl",
        "common": "CommonAttentionMetadata",
        "kv_cache_spec": "AttentionSpec",
        "spec": "AttentionSpec",
        "AttentionBackendEnum": "AttentionBackendEnum",
        "KVCacheLayout": "KVCacheLayout",
        "current_platform": "current_platform",
    },
    "attention_cuda.py": {
        "AttentionCGSupport": "AttentionCGSupport",
        "common": "CommonAttentionMetadata",
        "kv_cache_spec": "AttentionSpec",
        "vllm_config": "VllmConfig",
        "model": "ModelConfig",
        "scheduler": "SchedulerConfig",
        "compilation": "CompilationConfig",
    },
    "config.py": {
        "vllm_config": "VllmConfig",
        "vllm_config.load_config": "LoadConfig",
        "parallel": "ParallelConfig",
        "layer": "RoutedExperts",
    },
    "experts.py": {
        "layer": "RoutedExperts",
        "moe": "FusedMoEConfig",
        "parallel": "FusedMoEParallelConfig",
        "MoEActivation": "MoEActivation",
    },
    "experts_checkpoint.py": {
        "self.moe": "FusedMoEConfig",
        "parallel": "FusedMoEParallelConfig",
    },
    "experts_load_time.py": {"layer": "RoutedExperts"},
    "linear.py": {"layer": "LinearBase"},
    "linear_checkpoint.py": {"layer": "LinearBase"},
    "linear_load_time.py": {"layer": "LinearBase"},
    "linear_takeover.py": {"layer": "LinearBase"},
    "metrics.py": {
        "vllm_config": "VllmConfig",
        "vllm_config.device_config": "DeviceConfig",
        "model": "ModelConfig",
    },
    "parameters.py": {"info": "LayerReloadingInfo", "linear": "LinearBase"},
    "refusals.py": {
        "vllm_config": "VllmConfig",
        "model": "ModelConfig",
        "cache": "CacheConfig",
        "parallel": "ParallelConfig",
        "speculative": "SpeculativeConfig",
        "load": "LoadConfig",
        "layer": "Attention",
        "layer.impl": "CPUAttentionBackendImpl",
    },
    "truth.py": {"layer": "Attention"},
    "vocabulary.py": {
        "layer": "VocabParallelEmbedding",
        "layer.shard_indices": "VocabParallelEmbeddingShardIndices",
    },
}
# Our own attributes of layers, and torch's.
OURS = {
    "weight",
    "weight_scale",
    "input_scale",
    "w13_input_scale",
    "w2_input_scale",
    "signs",
    "get_parameter",
    "register_parameter",
    "register_buffer",
}

Ledger = dict[str, set[str]]


def used(file: str) -> dict[str, set[str]]:
    """Variable to the attributes a module reads or writes on it."""
    found: dict[str, set[str]] = {}
    for node in ast.walk(ast.parse((PACKAGE / file).read_text())):
        value, names = None, set()
        if isinstance(node, ast.Attribute):
            value, names = node.value, {node.attr}
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            # A name that is put together is one of our own attributes.
            if node.func.id == "getattr" and isinstance(node.args[1], ast.Constant):
                value, names = node.args[0], {node.args[1].value}
            if node.func.id == "replace":
                value = node.args[0]
                names = {keyword.arg for keyword in node.keywords}
        if value is not None:
            found.setdefault(ast.unparse(value), set()).update(names)
    return found


def test_every_import_is_listed(ledger: Ledger, resolve: Callable[[str], Any]) -> None:
    """An import of vLLM is public, a row of the ledger, or missing there."""
    found = set()
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                assert not any(name.name[:4] == "vllm" for name in node.names), path
            elif isinstance(node, ast.ImportFrom) and not node.level:
                names = {f"{node.module}.{name.name}" for name in node.names}
                found |= {name for name in names if name.startswith("vllm.")}
    rows = {id(resolve(symbol)) for symbol in ledger}
    unlisted = {s for s in found - PUBLIC if id(resolve(s)) not in rows}
    assert not unlisted, f"not in PRIVATE_SYMBOLS.md: {sorted(unlisted)}"
    assert not PUBLIC - found, "no longer imported"


@pytest.mark.parametrize("file", VARIABLES)
def test_every_variable_is_there(file: str) -> None:
    assert set(VARIABLES[file]) <= set(used(file)), "renamed: adapt VARIABLES"


def test_members_are_those_in_use(ledger: Ledger) -> None:
    found: Ledger = {}
    for file, variables in VARIABLES.items():
        for variable, symbol in variables.items():
            found.setdefault(symbol, set()).update(used(file)[variable] - OURS)
    assert set(found) <= {symbol.rpartition(".")[2] for symbol in ledger}
    for symbol, members in ledger.items():
        assert members == found.get(symbol.rpartition(".")[2], set()), symbol


MODULES = (
    "attention",
    "attention_cuda",
    "config",
    "experts",
    "experts_checkpoint",
    "experts_load_time",
    "linear",
    "linear_checkpoint",
    "linear_load_time",
    "linear_takeover",
    "metrics",
    "vocabulary",
)


def overrides() -> list[tuple[type, str, Any]]:
    """Public methods of our subclasses of vLLM's, with the one they replace."""
    found = []
    for module in MODULES:
        code = importlib.import_module(f"vllm_lowbit.{module}")
        for cls in vars(code).values():
            if not inspect.isclass(cls) or cls.__module__ != code.__name__:
                continue
            bases = [b for b in cls.__mro__[1:] if b.__module__.startswith("vllm.")]
            for name in vars(cls) if bases else ():
                if name[0] != "_" and callable(getattr(cls, name)):
                    base = next(
                        (getattr(b, name) for b in bases if hasattr(b, name)), None
                    )
                    found.append((cls, name, base))
    return found


# Without a base method: vLLM looks these names up, or we do.
LOOKED_UP = {"from_config_dict_json", "do_kv_cache_update"}
OUR_OWN = {"look_up", "logits", "prepare"}


def test_overrides_fit_their_base() -> None:
    """What vLLM passes, by position or name, each method of ours accepts."""
    checked = set()
    for cls, name, base in overrides():
        if base is None or name in LOOKED_UP:
            assert name in LOOKED_UP | OUR_OWN, f"vLLM calls no {cls.__name__}.{name}"
            continue
        checked.add(f"{cls.__name__}.{name}")
        mine, theirs = (
            [p for p in inspect.signature(f).parameters.values() if p.name != "self"]
            for f in (getattr(cls, name), base)
        )
        if any(p.kind is p.VAR_POSITIONAL for p in mine):
            continue
        fixed = [p.name for p in theirs if p.kind is p.POSITIONAL_OR_KEYWORD]
        assert [p.name for p in mine][: len(fixed)] == fixed, f"{cls.__name__}.{name}"
        if any(p.kind is p.VAR_POSITIONAL for p in theirs):
            continue
        rest = [p for p in mine[len(fixed) :] if p.kind is p.POSITIONAL_OR_KEYWORD]
        assert all(p.default is not p.empty for p in rest), f"{cls.__name__}.{name}"
    assert {"KV4AttentionImpl.forward", "LowbitLinearMethod.apply"} <= checked
    assert len(checked) > 25
