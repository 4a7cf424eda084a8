# SPDX-License-Identifier: Apache-2.0
"""Other tools' quantization_config: understood, or refused by key and reason."""

import json
from pathlib import Path
from typing import Any

import pytest

from vllm_lowbit.errors import ConfigError
from vllm_lowbit.takeover.checkpoint import parse, read_quantization

WEIGHTS = "config_groups.group_0.weights"
INPUTS = "config_groups.group_0.input_activations"
MISSING = object()


def changed(originals: dict[str, Path], kind: str, path: str, value: Any) -> Any:
    config = json.loads((originals[kind] / "config.json").read_text())
    config = config["quantization_config"]
    *parents, last = path.split(".")
    at = config
    for key in parents:
        at = at[key]
    at.pop(last, None)
    if value is not MISSING:
        at[last] = value
    return config


@pytest.mark.parametrize(
    ("kind", "name", "scheme", "symmetric"),
    [
        ("packed", "compressed-tensors pack-quantized", "w4a16-g32", False),
        ("w4a4", "compressed-tensors pack-quantized", "w4a4", True),
        ("w8a8", "compressed-tensors int-quantized", "w8a8", True),
        ("int4", "compressed-tensors int-quantized", "w4a8", False),
        ("gptq", "gptq", "w4a16-g64", True),
        ("gptq8", "gptq", "w8a16", True),
        ("gptq_v2", "gptq_v2", "w4a16-g128", False),
        ("awq", "awq gemm", "w4a16-g32", False),
        ("awq_symmetric", "awq gemm", "w4a16", True),
    ],
)
def test_scheme(
    originals: dict[str, Path], kind: str, name: str, scheme: str, symmetric: bool
) -> None:
    _, foreign = read_quantization(str(originals[kind]))
    assert foreign is not None and foreign.name == name
    assert foreign.scheme.name == scheme
    assert foreign.scheme.weights.symmetric is symmetric
    assert foreign.scheme.kv_cache.bits == foreign.scheme.vocab_bits == 16
    # Symmetric codes of other tools may use the lowest one.
    levels = 1 << foreign.scheme.weights.bits
    assert foreign.grid.code_max - foreign.grid.code_min == levels - 1


@pytest.mark.parametrize("symmetric", [True, False])
def test_activations(originals: dict[str, Path], symmetric: bool) -> None:
    config = changed(originals, "w4a4", f"{INPUTS}.symmetric", symmetric)
    activations = parse(config, "test").scheme.activations
    assert activations.bits == 4 and activations.symmetric is symmetric


@pytest.mark.parametrize(
    ("kind", "path", "value"),
    [
        ("w4a4", "total_num_kv_heads", 2),
        ("w4a4", "version", MISSING),
        ("w4a4", "ignore", None),
        ("w4a4", "ignore", ["re:.*lm_head", "model.embed_tokens", "LlamaRMSNorm"]),
        ("w4a4", "ignore", ["re:^.*lm_head.*$"]),
        ("w4a4", "sparsity_config", {}),
        (
            "w4a4",
            "sparsity_config",
            {"format": "dense", "global_sparsity": 0.1, "targets": []},
        ),
        ("w4a4", "transform_config", {}),
        ("w4a4", "quant_method", "Compressed_Tensors"),
        ("w4a4", f"{WEIGHTS}.actorder", "static"),
        ("w4a4", f"{WEIGHTS}.actorder", "weight"),
        ("w4a4", f"{WEIGHTS}.observer", "mse"),
        ("w4a4", f"{WEIGHTS}.observer_kwargs", {"maxshrink": 0.2}),
        ("w4a4", f"{WEIGHTS}.group_size", -1),
        ("packed", f"{WEIGHTS}.strategy", None),
        ("w4a4", "config_groups.group_0.format", "pack-quantized"),
        ("gptq", "checkpoint_format", MISSING),
        ("gptq", "format", "gptq"),
        ("gptq", "pack_dtype", "int32"),
        ("gptq", "dynamic", {}),
        ("gptq", "dynamic", None),
        ("gptq", "meta", {"damp": 1}),
        ("awq", "version", "GEMM"),
        ("awq", "format", "gemm"),
        ("awq", "modules_to_not_convert", ["lm_head"]),
        ("awq", "desc_act", False),
        ("awq", "sym", True),
    ],
)
def test_harmless(originals: dict[str, Path], kind: str, path: str, value: Any) -> None:
    plain = read_quantization(str(originals[kind]))[1]
    assert parse(changed(originals, kind, path, value), "test") == plain


def test_old_names_of_awq_keys(originals: dict[str, Path]) -> None:
    config = changed(originals, "awq", "bits", MISSING)
    config |= {"w_bit": 4, "q_group_size": config.pop("group_size")}
    assert parse(config, "test") == read_quantization(str(originals["awq"]))[1]
    with pytest.raises(ConfigError, match="key w_bit: Extra inputs"):
        parse({**config, "bits": 8}, "test")


BLOCKS = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"]
MLP = ["self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]


def test_every_linear_listed(originals: dict[str, Path]) -> None:
    key = "modules_in_block_to_quantize"
    plain = read_quantization(str(originals["gptq"]))[1]
    for value in (BLOCKS + MLP, [BLOCKS, MLP]):
        assert parse(changed(originals, "gptq", key, value), "test") == plain
    with pytest.raises(ConfigError, match=f"{key}: .* not quantized: gate_proj, up"):
        parse(changed(originals, "gptq", key, [BLOCKS]), "test")


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("surprise", 1, "Extra inputs are not permitted, got 1"),
        ("format", "marlin-24", "'pack-quantized' or 'int-quantized', got 'marlin-24'"),
        ("format", "nvfp4-pack-quantized", "got 'nvfp4-pack-quantized'"),
        ("quantization_status", "frozen", "Input should be 'compressed', got 'frozen'"),
        ("transform_config", {"config_groups": {"R1": {}}}, "its transforms of act"),
        ("kv_cache_scheme", {"num_bits": 8}, "the KV cache would be 16 bit"),
        ("sparsity_config", {"format": "sparse-24-bitmask"}, "should be 'dense'"),
        ("ignore", ["lm_head", "model.layers.0.mlp.down_proj"], "only lm_head can be"),
        ("ignore", ["re:.*q_proj"], "only lm_head can be"),
        ("ignore", ["re:.*(a|b)+$"], "only lm_head can be"),
        ("ignore", ["Linear"], "'Linear' may leave linears unquantized"),
        ("config_groups", {}, r"config_groups \[\]: there must be one"),
        ("config_groups.W4A16", ["Linear"], "config_groups.W4A16: Input should be a"),
        ("config_groups.group_0.targets", ["re:.*q_proj"], "should be 'Linear'"),
        ("config_groups.group_0.output_activations", {"num_bits": 8}, "outputs of lin"),
        ("config_groups.group_0.format", "int-quantized", "is not config_groups' 'int"),
        ("config_groups.group_0.weights", None, "should be a valid dictionary"),
        (f"{WEIGHTS}.num_bits", 3, "Input should be 4 or 8, got 3"),
        (f"{WEIGHTS}.type", "float", "Input should be 'int', got 'float'"),
        (f"{WEIGHTS}.strategy", "block", "Input should be 'channel' or 'group'"),
        (f"{WEIGHTS}.strategy", "tensor", "Input should be 'channel' or 'group'"),
        (f"{WEIGHTS}.strategy", None, "a scale per tensor"),
        (f"{WEIGHTS}.strategy", "group", "does not go with group_size None"),
        (f"{WEIGHTS}.group_size", 16, "Input should be -1, 32, 64, 128 or 256, got 16"),
        (f"{WEIGHTS}.group_size", 128, "'channel' does not go with group_size 128"),
        (f"{WEIGHTS}.group_size", -(10**9), "Input should be -1, 32"),
        (f"{WEIGHTS}.block_structure", [128, 128], "per channel or per group"),
        (f"{WEIGHTS}.dynamic", True, "Input should be False, got True"),
        (f"{WEIGHTS}.actorder", "group", "'weight', 'static' or False, got 'group'"),
        (f"{WEIGHTS}.actorder", True, "'weight', 'static' or False, got True"),
        (f"{INPUTS}.num_bits", 6, "Input should be 4 or 8, got 6"),
        (f"{INPUTS}.type", "float", "Input should be 'int'"),
        (f"{INPUTS}.dynamic", False, "Input should be True, got False"),
        (f"{INPUTS}.dynamic", "local", "Input should be True, got 'local'"),
        (f"{INPUTS}.strategy", "tensor", "Input should be 'token', got 'tensor'"),
        (f"{INPUTS}.group_size", 128, "per token, not per group"),
        (f"{INPUTS}.scale_dtype", "torch.float16", "not rounded to another type"),
    ],
)
def test_compressed_tensors_refused(
    originals: dict[str, Path], path: str, value: Any, message: str
) -> None:
    refused(changed(originals, "w4a4", path, value), path, message)


def test_groups_that_differ(originals: dict[str, Path]) -> None:
    config = changed(originals, "w4a4", "version", MISSING)
    first = config["config_groups"]["group_0"]
    config["config_groups"]["group_1"] = first
    assert parse(config, "test").scheme.name == "w4a4"
    config["config_groups"]["group_1"] = {**first, "input_activations": None}
    with pytest.raises(ConfigError, match="all the same: every linear runs one scheme"):
        parse(config, "test")


@pytest.mark.parametrize(
    ("kind", "path", "value", "message"),
    [
        ("gptq", "surprise", "x", "Extra inputs are not permitted, got 'x'"),
        ("gptq", "bits", 3, "Input should be 4 or 8, got 3"),
        ("gptq", "group_size", 1 << 40, "Input should be -1, 32, 64, 128 or 256"),
        ("gptq", "group_size", 0, "got 0"),
        ("gptq", "sym", MISSING, "Field required"),
        ("gptq", "desc_act", "yes", "Input should be a valid boolean"),
        ("gptq", "checkpoint_format", "marlin", "'gptq' or 'gptq_v2', got 'marlin'"),
        (
            "gptq",
            "format",
            "gptq_v2",
            "checkpoint_format 'gptq' is not format 'gptq_v2",
        ),
        ("gptq", "pack_dtype", "int64", "Input should be 'int32'"),
        ("gptq", "lm_head", True, "a quantized head is not read, got True"),
        ("gptq", "dynamic", {"-:.*down.*": {}}, "linears with settings of their own"),
        ("gptq", "is_marlin_format", True, "repacked for Marlin"),
        ("gptq", "adapter", {"path": "x"}, "adapters would not run"),
        ("gptq", "rotation", "hadamard", "rotated models are not supported"),
        ("awq", "surprise", 1, "Extra inputs are not permitted"),
        ("awq", "bits", 8, "Input should be 4, got 8"),
        ("awq", "group_size", 100, "Input should be -1, 32, 64, 128 or 256"),
        ("awq", "zero_point", None, "Input should be a valid boolean"),
        ("awq", "version", "gemv", "Input should be 'gemm', got 'gemv'"),
        ("awq", "version", MISSING, "Field required"),
        ("awq", "modules_to_not_convert", ["mlp.down_proj"], "only lm_head can be"),
        ("awq", "lm_head", True, "a quantized head is not read"),
        ("awq", "desc_act", True, "inputs in activation order are not supported"),
    ],
)
def test_gptq_and_awq_refused(
    originals: dict[str, Path], kind: str, path: str, value: Any, message: str
) -> None:
    refused(changed(originals, kind, path, value), path, message)


def refused(config: Any, path: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as error:
        parse(config, "some/config.json: quantization_config")
    text = str(error.value)
    assert text.startswith("some/config.json: quantization_config: ")
    assert path.rpartition(".")[2] in text and len(text) < 800


@pytest.mark.parametrize("method", ["fp8", "bitsandbytes", "", None, 7, ["gptq"]])
def test_another_method(method: Any) -> None:
    with pytest.raises(ConfigError, match="key quant_method: the checkpoint is alrea"):
        parse({"quant_method": method}, "test")
