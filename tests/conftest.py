# SPDX-License-Identifier: Apache-2.0
"""Tiny checkpoints and real vLLM configs; heavy imports happen when first used."""

import functools
import hashlib
import importlib
import json
import os
import re
import runpy
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

REF_7M = Path(__file__).parents[1] / "models" / "ref-7m"
LEDGER = Path(__file__).parents[1] / "vllm_lowbit" / "PRIVATE_SYMBOLS.md"
INDEX = "model.safetensors.index.json"
PLAIN = "model.safetensors"
OF_HEADS = ("num_attention_heads", "num_key_value_heads", "head_dim")


def _share_cores() -> None:
    """Each of the processes of pytest-xdist has its own for OpenMP, which waits busily.

    Set before torch is imported, which reads it once.
    """
    cores = sorted(os.sched_getaffinity(0))
    if worker := os.environ.get("PYTEST_XDIST_WORKER"):
        count = int(os.environ["PYTEST_XDIST_WORKER_COUNT"])
        cores = cores[int(worker.removeprefix("gw")) :: count] or cores[:1]
        os.environ.setdefault("OMP_NUM_THREADS", str(len(cores)))
    bound = ",".join(map(str, cores))
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", bound)


_share_cores()
# Same examples on every run; machines here are shared, so no deadline.
settings.register_profile(
    "lowbit",
    derandomize=True,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("lowbit")
os.environ.setdefault("HF_HUB_OFFLINE", "1")


def _tiny_model(
    directory: Path,
    shards: int = 1,
    dtype: str = "bfloat16",
    tokenizer: bool = False,
    architecture: str = "LlamaForCausalLM",
    **config: Any,
) -> Path:
    import torch
    import transformers
    from safetensors.torch import load_file

    model_class = getattr(transformers, architecture)

    sizes = {
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "vocab_size": 4096 if tokenizer else 256,
        "max_position_embeddings": 256,
        "pad_token_id": None,
        "tie_word_embeddings": False,
        "initializer_range": 0.02,
    }
    hf_config = model_class.config_class(
        architectures=[architecture],
        dtype=dtype,
        **_named(architecture, {**sizes, **config}),
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = model_class(hf_config).to(getattr(torch, dtype))
    directory.mkdir(parents=True, exist_ok=True)
    state = {name: t.contiguous() for name, t in model.state_dict().items()}
    if any(".experts." in name for name in state):
        # In files each expert has tensors of its own.
        model.save_pretrained(directory)
        state = load_file(directory / PLAIN)
    elif hf_config.tie_word_embeddings:
        del state["lm_head.weight"]

    hf_config.save_pretrained(directory)
    if tokenizer:
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(REF_7M / name, directory)
    _save(directory, state, shards)
    return directory


def _named(architecture: str, config: dict[str, Any]) -> dict[str, Any]:
    """Keys of a config as an architecture calls them."""
    from vllm_lowbit.supported_models import ARCHITECTURES

    keys = dict(ARCHITECTURES[architecture].keys)
    if architecture == "OPTForCausalLM":
        keys["initializer_range"] = "init_std"
    if ARCHITECTURES[architecture].layer_norm:
        # Heads of 64 share hidden_size, each with its own keys and values.
        config = {k: config[k] for k in config if k not in OF_HEADS}
        config["num_attention_heads"] = config["hidden_size"] // 64
    return {keys.get(key, key): value for key, value in config.items()}


def _save(directory: Path, tensors: dict[str, Any], shards: int) -> None:
    """Safetensors files, and their index where there are several."""
    from safetensors.torch import save_file

    if shards == 1:
        save_file(tensors, directory / PLAIN)
        return
    names, weight_map = list(tensors), {}
    for number in range(shards):
        file = f"model-{number + 1:05}-of-{shards:05}.safetensors"
        start, end = (n * len(names) // shards for n in (number, number + 1))
        part = names[start:end]
        save_file({name: tensors[name] for name in part}, directory / file)
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (directory / INDEX).write_text(json.dumps(index))


@pytest.fixture(scope="session")
def tiny_model() -> Callable[..., Path]:
    """Writes a random checkpoint: ``tiny_model(directory, shards=2, **config)``.

    Of a Llama, or of ``architecture="Qwen2ForCausalLM"``. Other arguments: ``dtype``,
    and ``tokenizer=True`` to make it servable. Returns the directory. Weights are the
    same in every call with the same sizes.
    """
    return _tiny_model


def _rewrite(directory: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    from safetensors.torch import load_file, save_file

    path = sorted(directory.glob("*.safetensors"))[0]
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)
    return path


@pytest.fixture(scope="session")
def _short_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from vllm_lowbit.calibrate.text import default_text

    directory = tmp_path_factory.mktemp("data")
    with default_text().open(encoding="utf-8") as whole:
        (directory / default_text().name).write_text(whole.read(80_000))
    return directory


@pytest.fixture(scope="module")
def short_default_text(_short_data: Path) -> Iterator[None]:
    """The start of the text that calibration uses when none is given is all of it.

    To tokenize the whole takes longer than to calibrate a tiny model.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("vllm_lowbit.calibrate.text._DATA", _short_data)
        yield


@pytest.fixture(scope="session")
def rewrite() -> Callable[..., Path]:
    """Edits the first shard: ``rewrite(directory, lambda tensors: ...)``, its path."""
    return _rewrite


def _fold_residual(tensors: dict[str, Any], layers: int, residual: Any) -> None:
    """Rotate the residual stream: norms become 1, their weights go into what follows.

    ``tensors`` are float32, of a plain Llama without biases.
    """
    import torch

    from vllm_lowbit.kernels.hadamard.generic import hadamard
    from vllm_lowbit.kernels.hadamard.signs import random_signs

    def rotate(rows: Any) -> Any:
        if residual.sign_seed is not None:
            rows = rows * random_signs(residual.sign_seed, rows.shape[-1])
        return hadamard(rows, residual.order, residual.stride)

    def take(norm: str) -> Any:
        weight = tensors[norm]
        tensors[norm] = torch.ones_like(weight)
        return weight

    for layer in range(layers):
        prefix = f"model.layers.{layer}."
        for norm, block, parts in (
            ("input_layernorm", "self_attn", ("q_proj", "k_proj", "v_proj")),
            ("post_attention_layernorm", "mlp", ("gate_proj", "up_proj")),
        ):
            weight = take(f"{prefix}{norm}.weight")
            for part in parts:
                name = f"{prefix}{block}.{part}.weight"
                tensors[name] = rotate(tensors[name] * weight)
        for part in ("self_attn.o_proj", "mlp.down_proj"):
            name = f"{prefix}{part}.weight"
            tensors[name] = rotate(tensors[name].t()).t()
    last = take("model.norm.weight")
    if residual.apply == "online":
        tensors["lm_head.input_scale"] = last
    else:
        tensors["lm_head.weight"] = rotate(tensors["lm_head.weight"] * last)
        embedding = "model.embed_tokens.weight"
        tensors[embedding] = rotate(tensors[embedding])


def _round_to_nearest(tensors: dict[str, Any], shape: Any, config: Any) -> Any:
    """Name and tensor of a lowbit checkpoint, from float32 plain tensors."""
    from vllm_lowbit.architecture import POSITIONS
    from vllm_lowbit.kernels.grid import IntGrid
    from vllm_lowbit.kernels.packing import pack
    from vllm_lowbit.kernels.quantize_weight.reference import quantize_weight
    from vllm_lowbit.load_time import fold, fold_bias, rotations_of
    from vllm_lowbit.lowbit_checkpoint import VOCABULARY

    if config.rotations.residual is not None:
        _fold_residual(tensors, shape.num_layers, config.rotations.residual)
    for name, tensor in tensors.items():
        module, _, kind = name.rpartition(".")
        weights, role = config.scheme.weights, module.rpartition(".")[2]
        if name == POSITIONS:
            yield name, tensor
            continue
        if role.endswith("_proj"):
            around = rotations_of(config.rotations, role)
            if kind == "bias":
                yield name, fold_bias(tensor, [len(tensor)], [around])
                continue
            tensor = fold(tensor, around, None)
        else:
            weights = VOCABULARY
            if tensor.dim() == 1 or config.scheme.vocab_bits == 16:
                yield name, tensor
                continue
        grid = IntGrid(weights.bits, weights.symmetric)
        codes, scale, zero_point = quantize_weight(tensor, grid, weights.group_size)
        yield f"{module}.weight_packed", pack(codes, weights.bits)
        yield f"{module}.weight_scale", scale
        if not weights.symmetric:
            yield f"{module}.weight_zero_point", zero_point.char()


def _write_manifest(directory: Path) -> None:
    """Of whatever the files and config.json hold, without the code under test."""
    tensors = {}
    for path in directory.glob("*.safetensors"):
        content = path.read_bytes()
        start = 8 + int.from_bytes(content[:8], "little")
        header = json.loads(content[8:start])
        header.pop("__metadata__", None)
        for name, entry in header.items():
            first, end = entry.pop("data_offsets")
            digest = hashlib.sha256(content[start + first : start + end]).hexdigest()
            tensors[name] = {"file": path.name, "sha256": digest, **entry}
    config = json.loads((directory / "config.json").read_text())
    manifest = {"format_version": 1, "tensors": tensors, "config": config}
    (directory / "lowbit_manifest.json").write_text(json.dumps(manifest))


def _lowbit_checkpoint(
    directory: Path,
    source: Path | str,
    scheme: Any = "w4a4kv4",
    vocab_bits: int = 16,
    **rotations: Any,
) -> Path:
    import torch
    from safetensors.torch import load_file, save_file

    from vllm_lowbit.architecture import ModelShape
    from vllm_lowbit.schema import LowbitConfig, scheme_from_name

    if isinstance(scheme, str):
        scheme = scheme_from_name(scheme, vocab_bits=vocab_bits).model_dump()
    quantization = {"scheme": scheme, "rotations": rotations}
    config = LowbitConfig.parse(quantization, "lowbit_checkpoint")
    hf_config = json.loads((Path(source) / "config.json").read_text())
    shape = ModelShape.from_config(hf_config, "config.json")
    plain = load_file(Path(source) / "model.safetensors")
    of = {name: shape.in_plain(name) for name in shape.tensors()}
    dtypes = {name: plain[file_name].dtype for name, (file_name, _) in of.items()}
    plain = {
        name: (plain[f].t() if shape.is_transposed(name) else plain[f])[rows]
        for name, (f, rows) in of.items()
    }
    floats = {name: tensor.float() for name, tensor in plain.items()}
    tensors = {
        name: tensor.to(dtypes.get(name, tensor.dtype))
        for name, tensor in _round_to_nearest(floats, shape, config)
    }
    parts: dict[str, list[Any]] = {}
    for name, tensor in tensors.items():
        parts.setdefault(shape.in_lowbit(name)[0], []).append(tensor)
    tensors = {name: torch.cat(of_name) for name, of_name in parts.items()}
    directory.mkdir(parents=True, exist_ok=True)
    save_file({n: t.contiguous() for n, t in tensors.items()}, directory / PLAIN)
    hf_config["quantization_config"] = config.model_dump(mode="json")
    (directory / "config.json").write_text(json.dumps(hf_config))
    for path in Path(source).glob("tokenizer*"):
        shutil.copy(path, directory)
    _write_manifest(directory)
    return directory


@pytest.fixture(scope="session")
def lowbit_checkpoint() -> Callable[..., Path]:
    """Writes a lowbit checkpoint of a plain one, rounded to nearest.

    ``lowbit_checkpoint(directory, source, scheme="w4a4kv4", vocab_bits=16,
    **rotations)``: the scheme by name or as a mapping, rotations as in the schema;
    they are folded so that the function stays that of the source. Returns the
    directory.
    """
    return _lowbit_checkpoint


@pytest.fixture(scope="session")
def write_manifest() -> Callable[[Path], None]:
    """Writes the manifest anew, from whatever the files of a checkpoint hold."""
    return _write_manifest


def _published_checkpoint(
    directory: Path, source: Path | str, shards: int = 1, **arguments: Any
) -> Path:
    from safetensors.torch import load_file

    _lowbit_checkpoint(directory, source, **arguments)
    if shards > 1:
        tensors = load_file(directory / PLAIN)
        (directory / PLAIN).unlink()
        _save(directory, tensors, shards)
    recipe = b"name: rtn\n"
    (directory / "recipe.yaml").write_bytes(recipe)
    config = json.loads((directory / "config.json").read_text())
    config["quantization_config"]["provenance"] = {
        "base_model": "some/model",
        "base_revision": "abc123",
        "recipe": "rtn",
        "recipe_sha256": hashlib.sha256(recipe).hexdigest(),
    }
    (directory / "config.json").write_text(json.dumps(config))
    _write_manifest(directory)
    return directory


@pytest.fixture(scope="session")
def published_checkpoint() -> Callable[..., Path]:
    """``lowbit_checkpoint`` with all that calibration adds: recipe, provenance and,
    with ``shards=2`` or more, an index."""
    return _published_checkpoint


@pytest.fixture(scope="session")
def foreign_checkpoint() -> Callable[..., Path]:
    """``foreign_checkpoint(directory, source, kind, ...)``: see its own file."""
    file = Path(__file__).parent / "foreign_checkpoint.py"
    return runpy.run_path(str(file))["foreign_checkpoint"]


def _assert_kept(layer: Any, codes: Any, scale: Any, zero_point: Any) -> None:
    import torch

    expected = torch.nn.Module()
    layer.quant_method.kernel.keep(expected, codes, scale, zero_point)
    wanted = dict(expected.named_parameters())
    found = {n: p for n, p in layer.named_parameters() if n.startswith("weight")}
    assert found.keys() == wanted.keys()
    for name, parameter in found.items():
        assert torch.equal(parameter, wanted[name]), name


@pytest.fixture(scope="session")
def assert_kept() -> Callable[..., None]:
    """``assert_kept(layer, codes, scale, zero_point)``: its weight is this one.

    In the form of the layer's backend, and it holds nothing else of a weight.
    """
    return _assert_kept


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
