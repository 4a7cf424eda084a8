# SPDX-License-Identifier: Apache-2.0
"""What a config may not say is refused by name; RoPE is what vLLM computes."""

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from vllm_lowbit.architecture import ModelShape
from vllm_lowbit.checkpoint import check_plain_checkpoint
from vllm_lowbit.errors import CheckpointError, UnsupportedError
from vllm_lowbit.inspection import read_checkpoint
from vllm_lowbit.manifest import require_headers, verify
from vllm_lowbit.schema import shorten
from vllm_lowbit.supported_models import ARCHITECTURES, architecture_of

LLAMA, MISTRAL = "LlamaForCausalLM", "MistralForCausalLM"
QWEN2, QWEN3 = "Qwen2ForCausalLM", "Qwen3ForCausalLM"
PHI3 = "Phi3ForCausalLM"
MIXTRAL, QWEN3_MOE = "MixtralForCausalLM", "Qwen3MoeForCausalLM"
GEMMA2 = "Gemma2ForCausalLM"
GEMMA3 = "Gemma3ForCausalLM"
GEMMAS = (GEMMA2, GEMMA3)
OPT, GPT2 = "OPTForCausalLM", "GPT2LMHeadModel"
EVERY = tuple(ARCHITECTURES)
ROPED = tuple(n for n, own in ARCHITECTURES.items() if own.position_rows is None)
NOT_ROPED = tuple(name for name in EVERY if name not in ROPED)
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
FULL, SLIDING = "full_attention", "sliding_attention"
REFUSED: list[tuple[tuple[str, ...], str, object, str]] = [
    (EVERY, "model_type", "t5", "'{model_type}'"),
    (tuple({*ROPED} - {*GEMMAS}), "hidden_act", "gelu", "'silu' or null"),
    ((OPT,), "activation_function", "gelu", "'relu' or null"),
    ((OPT,), "do_layer_norm_before", False, "true or null, norms before attention"),
    ((OPT,), "do_layer_norm_before", 1, "true or null, norms before attention and"),
    ((OPT,), "_remove_final_layer_norm", True, "false or null"),
    ((OPT,), "enable_bias", False, "true or null"),
    ((OPT,), "layer_norm_elementwise_affine", False, "true or null"),
    ((OPT,), "word_embed_proj_dim", 512, "256 or null"),
    ((GPT2,), "activation_function", "relu", "'gelu_new' or null"),
    ((GPT2,), "scale_attn_weights", False, "true or null"),
    ((GPT2,), "scale_attn_by_inverse_layer_idx", True, "false or null"),
    ((GPT2,), "reorder_and_upcast_attn", True, "false or null"),
    ((GPT2,), "add_cross_attention", True, "false or null"),
    ((GPT2,), "hidden_size", 256, "null"),
    ((GPT2,), "num_hidden_layers", 2, "null"),
    ((GPT2,), "num_attention_heads", 4, "null"),
    ((GPT2,), "max_position_embeddings", 1024, "null"),
    (NOT_ROPED, "num_key_value_heads", 2, "4 or null"),
    (NOT_ROPED, "rope_theta", 10000.0, "null"),
    (NOT_ROPED, "rope_scaling", {"type": "linear", "factor": 2.0}, "null"),
    (NOT_ROPED, "rope_parameters", {"rope_theta": 10000.0}, "null"),
    (NOT_ROPED, "sliding_window", 4096, "null"),
    (GEMMAS, "hidden_act", "silu", "'gelu_pytorch_tanh' or null"),
    (GEMMAS, "hidden_activation", "gelu", "'gelu_pytorch_tanh' or null"),
    (GEMMAS, "mlp_bias", True, "false or null"),
    (GEMMAS, "layer_types", [FULL, "chunked"], f"a list of '{FULL}' and '{SLIDING}'"),
    (GEMMAS, "layer_types", FULL, f"a list of '{FULL}' and '{SLIDING}', or null"),
    ((GEMMA2,), "tie_word_embeddings", False, "true or null"),
    ((LLAMA, GEMMA3), "attn_logit_softcapping", 50.0, "null"),
    ((GEMMA3,), "rope_parameters", "default", f"an object with {FULL} and {SLIDING},"),
    ((GEMMA3,), "rope_local_base_freq", 0, "a number above 0"),
    (EVERY, "is_causal", False, "true or null"),
    (EVERY, "use_bidirectional_attention", True, "false or null"),
    (EVERY, "attention_chunk_size", 1024, "null"),
    (EVERY, "dual_chunk_attention_config", {"chunk_size": 8}, "null"),
    (EVERY, "logit_scale", 0.5, "1.0 or null"),
    (EVERY, "logit_scale", True, "1.0 or null"),
    (EVERY, "bias", True, "false or null"),
    (EVERY, "qkv_bias", True, "false or null"),
    (EVERY, "qk_norm", True, "false or null"),
    (EVERY, "llama_4_scaling", {"beta": 1}, "null"),
    (EVERY, "ada_rms_norm_t_cond", True, "false or null"),
    (EVERY, "partial_rotary_factor", 0.5, "1.0 or null"),
    (EVERY, "rotary_pct", 0.5, "1.0 or null"),
    (EVERY, "rotary_emb_base", 5000, "null"),
    (ROPED, "rope_theta", -1.0, "a number above 0"),
    (ROPED, "rope_theta", "10000", "a number above 0"),
    (ROPED, "rope_theta", float("inf"), "a number above 0"),
    ((MISTRAL, QWEN2, QWEN3, PHI3), "attention_bias", True, "false or null"),
    ((MISTRAL, QWEN2, QWEN3, PHI3), "mlp_bias", True, "false or null"),
    ((LLAMA,), "sliding_window", 4096, "null"),
    ((QWEN2, QWEN3), "use_sliding_window", True, "false or null"),
    ((QWEN2, QWEN3), "use_sliding_window", 1, "false or null"),
    ((MISTRAL, PHI3), "layer_types", [FULL, FULL], "null"),
    ((MISTRAL,), "layer_types", [SLIDING, SLIDING], "null"),
    ((LLAMA, QWEN2, QWEN3), "layer_types", [FULL, SLIDING], "'full_attention' in"),
    ((LLAMA, QWEN2, QWEN3), "layer_types", "full", "'full_attention' in every layer"),
    (ROPED, "rope_scaling", "yarn", "an object, or null"),
    ((PHI3,), "partial_rotary_factor", 0.75, "1.0 or null"),
    ((MIXTRAL,), "sliding_window", 4096, "null"),
    ((QWEN3_MOE,), "use_sliding_window", True, "false or null"),
    ((QWEN3_MOE,), "mlp_only_layers", [0], "[] or null"),
    ((QWEN3_MOE,), "decoder_sparse_step", 2, "1 or null"),
    ((QWEN3_MOE,), "shared_expert_intermediate_size", 64, "0 or null"),
    ((MIXTRAL, QWEN3_MOE), "attention_bias", True, "false or null"),
]
ROPE: list[tuple[dict[str, Any], str, object, str]] = [
    ({"rope_type": "dynamic", "factor": 2.0}, "rope_type", "dynamic", "default, lin"),
    ({"type": "longrope"}, "rope_type", "longrope", "default, linear, llama3, yarn"),
    ({"rope_type": ["yarn"]}, "rope_type", ["yarn"], "default, linear, llama3, yarn"),
    ({**YARN, "type": "linear"}, "type", "linear", "'yarn', as rope_type has it"),
    ({"mrope_section": [1, 2]}, "'mrope_section'", [1, 2], "rope_type, type, rope_th"),
    ({FULL: {"rope_theta": 1.0}}, f"'{FULL}'", {"rope_theta": 1.0}, "rope_type"),
    ({"partial_rotary_factor": 0.5}, "partial_rotary_factor", 0.5, "1.0 or null"),
    ({"type": "linear"}, "factor", None, "a number above 0"),
    ({"type": "linear", "factor": 2}, "factor", 2, "a fraction such as 2.0"),
    ({**YARN, "factor": "4"}, "factor", "4", "a number above 0"),
    ({**YARN, "beta_fast": 0}, "beta_fast", 0, "a number above 0"),
    ({**YARN, "attention_factor": True}, "attention_factor", True, "a number above"),
    ({**YARN, "truncate": 0}, "truncate", 0, "true or false"),
    ({**YARN, "finetuned": True}, "'finetuned'", True, "rope_type, type, rope_theta"),
    ({"rope_type": "llama3", "factor": 8.0}, "low_freq_factor", None, "a number above"),
    ({"rope_theta": 0}, "rope_theta", 0, "a number above 0"),
]


ROPES: list[tuple[dict[str, Any], str, object, str]] = [
    ({"rope_type": "default"}, "'rope_type'", "default", f"{FULL} and {SLIDING}"),
    ({FULL: 5}, FULL, 5, "an object, or null"),
    ({FULL: YARN}, f"{FULL}.rope_type", "yarn", "default, linear"),
    ({SLIDING: {"rope_theta": 0}}, f"{SLIDING}.rope_theta", 0, "a number above 0"),
]


def refusal(name: str, key: str, value: object) -> str:
    keys = ARCHITECTURES[name].keys
    sizes = {"hidden_size": 256, "num_attention_heads": 4}
    sizes = {keys.get(size, size): number for size, number in sizes.items()}
    config = {"architectures": [name], **sizes, key: value}
    with pytest.raises(UnsupportedError) as error:
        architecture_of(config, "m/config.json")
    return str(error.value)


@pytest.mark.parametrize(("names", "key", "value", "supported"), REFUSED)
def test_refused(
    names: tuple[str, ...], key: str, value: object, supported: str
) -> None:
    for name in names:
        expected = supported.format(model_type=ARCHITECTURES[name].model_type)
        assert refusal(name, key, value).startswith(
            f"m/config.json: {key} {shorten(value)} is not supported with {name}; "
            f"supported: {expected}"
        )


@pytest.mark.parametrize("key", ["rope_parameters", "rope_scaling"])
@pytest.mark.parametrize(("rope", "inner", "value", "supported"), ROPE)
def test_refused_rope(
    key: str, rope: dict[str, Any], inner: str, value: object, supported: str
) -> None:
    assert refusal(QWEN2, key, rope).startswith(
        f"m/config.json: {key}.{inner} {value!r} is not supported with {QWEN2}; "
        f"supported: {supported}"
    )


@pytest.mark.parametrize(("ropes", "inner", "value", "supported"), ROPES)
def test_refused_rope_of_a_type_of_layer(
    ropes: dict[str, Any], inner: str, value: object, supported: str
) -> None:
    assert refusal(GEMMA3, "rope_parameters", ropes).startswith(
        f"m/config.json: rope_parameters.{inner} {shorten(value)} is not supported "
        f"with {GEMMA3}; supported: {supported}"
    )


def test_params_json_is_not_read(
    tiny_model: Callable[..., Path], tmp_path: Path, engine_config: Callable[..., Any]
) -> None:
    """vLLM takes it, where Mistral's own files lie beside those of Hugging Face."""
    model = tiny_model(
        tmp_path, tokenizer=True, architecture=MISTRAL, sliding_window=None
    )
    sizes = {"dim": 128, "n_layers": 2, "head_dim": 64, "hidden_dim": 256}
    sizes |= {"n_heads": 4, "n_kv_heads": 2, "vocab_size": 4096}
    params = {**sizes, "norm_eps": 1e-5, "rope_theta": 5000.0}
    (model / "params.json").write_text(json.dumps(params))
    shutil.copy(model / "model.safetensors", model / "consolidated.safetensors")
    with pytest.raises(ValueError, match="model_type '' is not .* --config-format hf"):
        engine_config(model, tokenizer_mode="hf")
    (model / "consolidated.safetensors").unlink()
    config = engine_config(model, tokenizer_mode="hf", config_format="hf")
    assert config.model_config.hf_config.model_type == "mistral"


@pytest.mark.parametrize("name", [PHI3, GEMMA2])
@pytest.mark.parametrize("kind", ["longrope", "su", "yarn", "linear"])
def test_some_have_no_other_rope(name: str, kind: str) -> None:
    rope = {"type": kind, "factor": 4.0}
    assert refusal(name, "rope_scaling", rope).startswith(
        f"m/config.json: rope_scaling.rope_type {kind!r} is not supported with {name}; "
        "supported: default"
    )


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_what_transformers_writes_by_itself_is_not_refused(name: str) -> None:
    transformers = pytest.importorskip("transformers")
    config = getattr(transformers, name).config_class(architectures=[name])
    assert architecture_of(config.to_dict(), "x") is ARCHITECTURES[name]
    neutral = {"logit_scale": 1, "is_causal": True, "bias": None}
    neutral[ARCHITECTURES[name].activation_keys[0]] = ARCHITECTURES[name].activation
    config = {**config.to_dict(), **neutral}
    assert architecture_of(config, "x") is ARCHITECTURES[name]


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "default"},
        {"rope_type": "default", "partial_rotary_factor": 1.0},
        {"rope_type": "linear", "factor": 3.0},
        {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
        YARN,
        {**YARN, "factor": 4, "beta_fast": 16, "beta_slow": 2, "truncate": False},
        {**YARN, "mscale": 0.7, "mscale_all_dim": 0.4},
        {**YARN, "attention_factor": 1.3},
        {"rope_type": "yarn", "factor": 2.0},
    ],
)
def test_rope_is_that_of_vllm(name: str, rope: dict[str, Any]) -> None:
    """Every type that is not refused, over all positions the model has."""
    pytest.importorskip("vllm")
    import torch
    import transformers
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.model_executor.layers.rotary_embedding import get_rope

    from vllm_lowbit.calibrate.rotary import RotaryEmbedding

    positions, of_all = 256, {"rope_theta": 50_000.0, **rope}
    of_type = {FULL: of_all, SLIDING: {"rope_type": "default", "rope_theta": 100.0}}
    by_type = ARCHITECTURES[name].rope_by_type
    if rope["rope_type"] not in ARCHITECTURES[name].rope_types:
        return
    config = getattr(transformers, name).config_class(
        architectures=[name],
        hidden_size=128,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=positions,
        rope_parameters=of_type if by_type else of_all,
    )
    shape = ModelShape.from_config(config.to_dict(), "x")
    rotary = RotaryEmbedding(config, shape)
    # Of Gemma 3 the first with a window and the first without.
    for layer in (0, 5) if by_type else (0,):
        kind, found = shape.layer_type(layer), config.rope_parameters
        cos, sin = rotary(torch.empty(0), torch.arange(positions)[None], layer)
        with set_current_vllm_config(VllmConfig()):
            served = get_rope(
                64,
                max_position=positions,
                rope_parameters=found[kind] if by_type else found,
                dtype=torch.float32,
            )
        ours = torch.cat((cos[0, :, :32], sin[0, :, :32]), dim=-1)
        theirs = served.cos_sin_cache[:positions]
        assert (ours - theirs).abs().max() < 1e-4


@pytest.fixture(
    scope="module",
    params=[QWEN2, QWEN3, MISTRAL, PHI3, MIXTRAL, QWEN3_MOE, *GEMMAS, *NOT_ROPED],
)
def plain(request: Any, tmp_path_factory: Any, tiny_model: Callable[..., Path]) -> Path:
    """A checkpoint of each architecture but Llama."""
    return tiny_model(tmp_path_factory.mktemp("plain"), **_keys(request.param))


def _keys(name: str) -> dict[str, Any]:
    own = {
        GEMMA2: {"tie_word_embeddings": True},
        MIXTRAL: {"num_local_experts": 2},
        QWEN3_MOE: {
            "num_experts": 2,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 64,
        },
    }
    return {"architecture": name, "hidden_size": 256, **own.get(name, {})}


def check(directory: Path) -> None:
    config = json.loads((directory / "config.json").read_text())
    shape = ModelShape.from_config(config, "config.json")
    check_plain_checkpoint(str(directory), shape)


def own(directory: Path) -> list[str]:
    """Tensors of a layer that a Llama without biases does not have."""
    architecture = ARCHITECTURES[
        json.loads((directory / "config.json").read_text())["architectures"][0]
    ]
    names = [f"{linear}.bias" for linear in architecture.biases]
    if architecture.experts is not None:
        names.append("mlp.gate.weight")
    if architecture.layer_norm:
        names += ["input_layernorm.bias", "post_attention_layernorm.bias"]
    if architecture.qk_norm:
        names += ["self_attn.q_norm.weight", "self_attn.k_norm.weight"]
    if architecture.output_norms:
        names += ["pre_feedforward_layernorm.weight"]
        names += ["post_feedforward_layernorm.weight"]
    names = [f"model.layers.1.{name}" for name in names]
    if architecture.position_rows is not None:
        names += ["model.norm.bias", "model.embed_positions.weight"]
    # One tensor has q, k and v.
    return list(dict.fromkeys(architecture.names.stored(name) for name in names))


def test_files_of_each_architecture(
    plain: Path, tmp_path: Path, lowbit_checkpoint: Callable[..., Path]
) -> None:
    """Whole, and then as a lowbit checkpoint."""
    check(plain)
    out = lowbit_checkpoint(tmp_path, plain, "w3a16-g64")
    problems = list(verify(out, *read_checkpoint(out)))
    assert [problem.tensor for problem in problems] == [None]  # it has no recipe


def _made(plain: Path) -> dict[str, Any]:
    config = json.loads((plain / "config.json").read_text())
    return _keys(config["architectures"][0])


def test_tensors_of_an_architecture_are_needed(
    plain: Path,
    tmp_path: Path,
    tiny_model: Callable[..., Path],
    lowbit_checkpoint: Callable[..., Path],
    rewrite: Callable[..., Path],
) -> None:
    for name in own(plain):
        packed = lowbit_checkpoint(tmp_path / name, plain)
        rewrite(packed, lambda t, n=name: t.pop(n))
        with pytest.raises(CheckpointError, match=f"{name} is in none of the files"):
            require_headers(packed, *read_checkpoint(packed))
        source = tiny_model(tmp_path / f"plain {name}", **_made(plain))
        rewrite(source, lambda t, n=name: t.update({n: t[n][:-1].clone()}))
        with pytest.raises(CheckpointError, match=f"{name} has shape .*, the model ne"):
            check(source)
        rewrite(source, lambda t, n=name: t.pop(n))
        with pytest.raises(CheckpointError, match=f"are missing, first {name}"):
            check(source)


@pytest.mark.parametrize(
    ("architecture", "name"),
    [
        (GEMMA2, "model.embed_tokens.weight"),
        (OPT, "model.decoder.embed_tokens.weight"),
        (OPT, "model.decoder.embed_positions.weight"),
        (OPT, "lm_head.weight"),
        (GPT2, "transformer.wpe.weight"),
    ],
)
def test_a_vocabulary_that_vllm_holds_is_finite(
    architecture: str,
    name: str,
    tmp_path: Path,
    tiny_model: Callable[..., Path],
    rewrite: Callable[..., Path],
) -> None:
    """No layer method of ours sees it."""
    plain = tiny_model(tmp_path, **_keys(architecture))
    rewrite(plain, lambda tensors: tensors[name][3].fill_(math.nan))
    with pytest.raises(CheckpointError, match=f"{name} of .* holds a non-finite value"):
        check(plain)


@pytest.mark.parametrize(
    "name", ["q_norm.weight", "q_proj.bias", "o_proj.bias", "rotary.weight"]
)
def test_tensors_of_another_architecture_are_not_read(
    plain: Path,
    tmp_path: Path,
    tiny_model: Callable[..., Path],
    rewrite: Any,
    name: str,
) -> None:
    import torch

    name = f"model.layers.1.self_attn.{name}"
    if name in own(plain):
        return
    source = tiny_model(tmp_path, **_made(plain))
    rewrite(source, lambda tensors: tensors.update({name: torch.ones(64)}))
    with pytest.raises(CheckpointError, match=f"{name} does not belong to the model"):
        check(source)
