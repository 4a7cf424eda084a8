# SPDX-License-Identifier: Apache-2.0
"""The reference model reads lowbit checkpoints; every form computes one function."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from vllm_lowbit.calibrate.reference_model import ReferenceModel, load_time_config
from vllm_lowbit.errors import CheckpointError, ConfigError, UnsupportedError
from vllm_lowbit.schema import LowbitConfig, Rotation, Rotations, scheme_from_name

IDS = torch.arange(40) * 5 % 256
HEAD = {"order": 64, "block": 64}
# 384 = 12 * 32: not symmetric, so that H and its transpose differ.
ROTATIONS = {
    "attn_input": {"apply": "online", "order": 192, "block": 384},
    "v": {"apply": "folded", **HEAD},
    "o_input": {"apply": "online", "order": 4, "block": 256},
    "mlp_input": {"apply": "online", "order": 12, "block": 24},
    "down_input": {"apply": "online", "order": 256, "block": 256},
}
# Two query heads for a key, and a hidden size of all heads, which Qwen2 needs.
HEADS = {"num_attention_heads": 6, "num_key_value_heads": 2}
VARIANTS: dict[str, dict[str, Any]] = {
    "llama": {},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "mistral": {
        "architecture": "MistralForCausalLM",
        "sliding_window": 9,
        "initializer_range": 0.05,
    },
    "qwen2": {"architecture": "Qwen2ForCausalLM", **HEADS},
    "qwen3": {"architecture": "Qwen3ForCausalLM", **HEADS},
    "phi3": {"architecture": "Phi3ForCausalLM", **HEADS, "sliding_window": None},
    "gemma2": {
        "architecture": "Gemma2ForCausalLM",
        "tie_word_embeddings": True,
        "sliding_window": 9,
        "attn_logit_softcapping": 2.0,
        "final_logit_softcapping": 4.0,
        "query_pre_attn_scalar": 48,
    },
    "gemma3": {
        "architecture": "Gemma3ForCausalLM",
        "query_pre_attn_scalar": 48,
        "sliding_window": 7,
        "layer_types": ["sliding_attention", "full_attention"],
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
            "full_attention": {
                "rope_type": "linear",
                "rope_theta": 50000.0,
                "factor": 4.0,
            },
        },
    },
    "opt": {"architecture": "OPTForCausalLM"},
    "gpt2": {"architecture": "GPT2LMHeadModel"},
}
FINE = {
    "weights": {"bits": 8, "symmetric": True, "group_size": 32},
    "activations": {"bits": 16},
    "kv_cache": {"bits": 16},
}


@pytest.fixture(scope="module")
def plain(tmp_path_factory: Any, tiny_model: Any, rewrite: Any) -> Callable[..., Path]:
    """``plain(tied, **config)``: a float32 model whose norms are not 1."""

    def build(tied: bool, **config: Any) -> Path:
        directory = tiny_model(
            tmp_path_factory.mktemp("plain"),
            dtype="float32",
            **{
                "tie_word_embeddings": tied,
                "hidden_size": 384,
                "initializer_range": 0.1,
                **config,
            },
        )

        def spread(tensors: dict[str, torch.Tensor]) -> None:
            generator = torch.Generator().manual_seed(1)
            for name, tensor in tensors.items():
                if name.endswith(("norm.weight", "bias")):
                    tensor.uniform_(0.5, 1.5, generator=generator)

        rewrite(directory, spread)
        return directory

    return build


def apart(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("vocab_bits", [16, 8])
@pytest.mark.parametrize(
    ("tied", "residual"),
    [
        (False, None),
        (False, {"apply": "folded", "order": 384, "block": 384, "sign_seed": 2}),
        (True, None),
        (True, {"apply": "online", "order": 384, "block": 384, "sign_seed": 2}),
        (True, {"apply": "online", "order": 12, "block": 384}),
    ],
)
def test_function_of_the_source(
    tied: bool,
    residual: Any,
    vocab_bits: int,
    plain: Any,
    lowbit_checkpoint: Any,
    write_manifest: Any,
    tmp_path: Path,
) -> None:
    """Every transform cancels: what is left is the error of 8 bits."""
    source = plain(tied)
    scheme = {**FINE, "vocab_bits": vocab_bits}
    directory = lowbit_checkpoint(
        tmp_path, source, scheme, residual=residual, **ROTATIONS
    )
    expected = ReferenceModel(str(source))(IDS)
    assert apart(ReferenceModel(str(directory))(IDS), expected) < 0.1
    online = residual is not None and residual["apply"] == "online"
    if online:
        path = directory / "config.json"
        config = json.loads(path.read_text())
        rotations = config["quantization_config"]["rotations"]
        rotations["residual"]["sign_seed"] = 3
        path.write_text(json.dumps(config))
        write_manifest(directory)
        assert apart(ReferenceModel(str(directory))(IDS), expected) > 0.5


@pytest.mark.parametrize("vocab_bits", [16, 8])
@pytest.mark.parametrize(
    "scheme", ["w4a4kv4", "w2a16-g64", "w3a16", "w4a4kv4-g32-ag32"]
)
@pytest.mark.parametrize("variant", VARIANTS)
def test_is_the_plain_model_quantized_here(
    scheme: str,
    vocab_bits: int,
    variant: str,
    plain: Any,
    lowbit_checkpoint: Any,
    tmp_path: Path,
) -> None:
    """Bit for bit, whether the codes are made or read."""
    source = plain(False, **VARIANTS[variant])
    chosen = scheme_from_name(scheme, vocab_bits=vocab_bits)
    if variant in ("gemma2", "opt") and vocab_bits == 8:
        with pytest.raises(UnsupportedError, match="vocab_bits 8 is not supported"):
            load_time_config(str(source), chosen)
        return
    found = load_time_config(str(source), chosen)
    # A checkpoint has no input scales.
    unscaled = {
        name: value.model_copy(update={"scaled": False})
        for name, value in found.rotations
        if isinstance(value, Rotation)
    }
    rotations = found.rotations.model_copy(update=unscaled)
    config = LowbitConfig(scheme=chosen, rotations=rotations)
    directory = lowbit_checkpoint(
        tmp_path, source, scheme, vocab_bits, **rotations.model_dump()
    )
    made, read = (
        ReferenceModel(str(source), config),
        ReferenceModel(str(directory)),
    )
    assert made.scheme_name == read.scheme_name == scheme
    assert read.config == config
    assert torch.equal(made(IDS), read(IDS))


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("tied", [False, True])
def test_float_model_is_that_of_transformers(
    variant: str, tied: bool, plain: Any
) -> None:
    directory = str(plain(tied, **VARIANTS[variant]))
    model = AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, attn_implementation="eager"
    )
    with torch.no_grad():
        expected = model(IDS.unsqueeze(0)).logits[0]
    assert apart(ReferenceModel(directory)(IDS), expected) < 1e-5


def test_float_model(plain: Any) -> None:
    model = ReferenceModel(str(plain(True)))
    assert model.scheme_name == "float" and model.config is None
    assert model(IDS).shape == (40, 256)


def test_8_bit_vocabulary_costs_something(plain: Any) -> None:
    source = str(plain(False))
    outputs = [
        ReferenceModel(
            source,
            LowbitConfig(
                scheme=scheme_from_name("w8a8", vocab_bits=bits), rotations=Rotations()
            ),
        )(IDS)
        for bits in (16, 8)
    ]
    assert 1e-4 < apart(*outputs) < 0.1


@pytest.mark.parametrize("vocab_bits", [16, 8])
def test_values_between_operators_have_the_servers_dtype(
    vocab_bits: int, plain: Any, lowbit_checkpoint: Any, tmp_path: Path
) -> None:
    residual = {"apply": "online", "order": 384, "block": 384}
    directory = lowbit_checkpoint(
        tmp_path, plain(True), "w4a4kv4", vocab_bits, residual=residual
    )
    model = ReferenceModel(str(directory), dtype=torch.bfloat16)
    logits = model(IDS)
    assert torch.equal(logits, logits.bfloat16().float())
    assert not torch.equal(logits, ReferenceModel(str(directory))(IDS))


def test_scheme_cannot_be_chosen(
    plain: Any, lowbit_checkpoint: Any, tmp_path: Path
) -> None:
    source = plain(False)
    directory = lowbit_checkpoint(tmp_path, source, "w4a16")
    config = load_time_config(str(source), scheme_from_name("w4a4"))
    with pytest.raises(ConfigError, match="has its own scheme w4a16; no other can be"):
        ReferenceModel(str(directory), config)


def test_defects_are_named(
    plain: Any, lowbit_checkpoint: Any, rewrite: Any, tmp_path: Path
) -> None:
    directory = lowbit_checkpoint(tmp_path, plain(False))
    name = "model.layers.0.mlp.up_proj.weight_scale"
    rewrite(directory, lambda tensors: tensors[name][0].fill_(torch.nan))
    with pytest.raises(CheckpointError, match=f"tensor {name} has sha256 "):
        ReferenceModel(str(directory))
    rewrite(directory, lambda tensors: tensors.pop(name))
    with pytest.raises(CheckpointError, match=f"tensor {name} is in none of the"):
        ReferenceModel(str(directory))


def test_rotation_that_no_server_runs(
    plain: Any, lowbit_checkpoint: Any, tmp_path: Path
) -> None:
    directory = lowbit_checkpoint(tmp_path, plain(False))
    path = directory / "config.json"
    config = json.loads(path.read_text())
    v = {"apply": "online", **HEAD}
    config["quantization_config"]["rotations"]["v"] = v
    path.write_text(json.dumps(config))
    with pytest.raises(ConfigError, match="rotations.v: apply is online; supported"):
        ReferenceModel(str(directory))


def test_needs_no_vllm() -> None:
    code = (
        "import sys, vllm_lowbit.calibrate.reference_model;"
        "assert 'vllm' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd="/")
