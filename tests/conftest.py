# SPDX-License-Identifier: Apache-2.0
"""Tiny checkpoints and real vLLM configs; heavy imports happen when first used."""

import functools
import importlib
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

REF_7M = Path(__file__).parents[1] / "models" / "ref-7m"
LEDGER = Path(__file__).parents[1] / "vllm_lowbit" / "PRIVATE_SYMBOLS.md"
INDEX = "model.safetensors.index.json"

# Same examples on every run; machines here are shared, so no deadline.
settings.register_profile(
    "lowbit",
    derandomize=True,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("lowbit")
os.environ.setdefault("HF_HUB_OFFLINE", "1")


def _tiny_llama(
    directory: Path,
    shards: int = 1,
    dtype: str = "bfloat16",
    tokenizer: bool = False,
    **config: Any,
) -> Path:
    import torch
    from safetensors.torch import save_file
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "vocab_size": 4096 if tokenizer else 256,
        "max_position_embeddings": 256,
        "tie_word_embeddings": False,
    }
    hf_config = LlamaConfig(
        architectures=["LlamaForCausalLM"], dtype=dtype, **{**sizes, **config}
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LlamaForCausalLM(hf_config).to(getattr(torch, dtype))
    state = {name: t.contiguous() for name, t in model.state_dict().items()}
    if hf_config.tie_word_embeddings:
        del state["lm_head.weight"]

    directory.mkdir(parents=True, exist_ok=True)
    hf_config.save_pretrained(directory)
    if tokenizer:
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(REF_7M / name, directory)
    if shards == 1:
        save_file(state, directory / "model.safetensors")
        return directory
    names, weight_map = list(state), {}
    for number in range(shards):
        file = f"model-{number + 1:05}-of-{shards:05}.safetensors"
        start, end = (n * len(names) // shards for n in (number, number + 1))
        part = names[start:end]
        save_file({name: state[name] for name in part}, directory / file)
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (directory / INDEX).write_text(json.dumps(index))
    return directory


@pytest.fixture(scope="session")
def tiny_llama() -> Callable[..., Path]:
    """Writes a random Llama checkpoint: ``tiny_llama(directory, shards=2, **config)``.

    Other arguments: ``dtype``, and ``tokenizer=True`` to make it servable. Returns
    the directory. Weights are the same in every call with the same sizes.
    """
    return _tiny_llama


def _rewrite(directory: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    from safetensors.torch import load_file, save_file

    path = sorted(directory.glob("*.safetensors"))[0]
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)
    return path


@pytest.fixture(scope="session")
def rewrite() -> Callable[..., Path]:
    """Edits the first shard: ``rewrite(directory, lambda tensors: ...)``, its path."""
    return _rewrite


def _engine_config(model: Path | str = REF_7M, **arguments: Any) -> Any:
    from vllm.engine.arg_utils import EngineArgs

    settings = {
        "quantization": "lowbit",
        "max_model_len": 256,
        "kv_cache_memory_bytes": 64 << 20,
        "enforce_eager": True,
    }
    return EngineArgs(
        model=str(model), **{**settings, **arguments}
    ).create_engine_config()


@pytest.fixture(scope="session")
def engine_config() -> Callable[..., Any]:
    """vLLM's own VllmConfig for a model and engine arguments; starts nothing."""
    pytest.importorskip("vllm")
    return _engine_config


def _resolve(symbol: str) -> Any:
    parts = symbol.split(".")
    for end in range(len(parts) - 1, 0, -1):
        try:
            module = importlib.import_module(".".join(parts[:end]))
        except ModuleNotFoundError:
            continue
        return functools.reduce(getattr, parts[end:], module)
    raise AssertionError(f"{symbol} does not exist")


@pytest.fixture(scope="session")
def resolve() -> Callable[[str], Any]:
    """Imports a dotted name: a module's attribute, or an attribute of that."""
    return _resolve


@pytest.fixture(scope="session")
def ledger() -> dict[str, set[str]]:
    """Private vLLM symbols and the members in use, from PRIVATE_SYMBOLS.md."""
    rows: dict[str, set[str]] = {}
    lines = LEDGER.read_text().splitlines()
    for line in lines:
        if match := re.match(r"\| `([\w.]+)` \|([^|]*)\| \S.* \|[^|]*\|$", line):
            assert match[1] not in rows, f"{match[1]} is listed twice"
            rows[match[1]] = set(re.findall(r"`(\w+)`", match[2]))
    table = [line for line in lines if line.startswith("| ")]
    assert len(rows) == len(table) - 1, "a row of the ledger has another form"
    return rows
