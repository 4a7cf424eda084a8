# SPDX-License-Identifier: Apache-2.0
"""What is read from config.json, and where rotations go for real models."""

import dataclasses
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from vllm_lowbit.architecture import (
    MAX_EXPERTS,
    MAX_LAYERS,
    MAX_SIZE,
    ModelShape,
)
from vllm_lowbit.errors import UnsupportedError
from vllm_lowbit.kernels.hadamard.matrices import exists
from vllm_lowbit.placement import MIN_BLOCK, check_scheme, flag_only_rotations
from vllm_lowbit.schema import DEFAULT_SCHEME, ClipRatios, Rotation, scheme_from_name
from vllm_lowbit.supported_models import ARCHITECTURES

W4A4KV4 = scheme_from_name(DEFAULT_SCHEME)
QKV = {"self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"}
MISTRAL = {"architectures": ["MistralForCausalLM"]}
QWEN2 = {"architectures": ["Qwen2ForCausalLM"]}
QWEN3 = {"architectures": ["Qwen3ForCausalLM"]}
PHI3 = {"architectures": ["Phi3ForCausalLM"]}
MIXTRAL = {"architectures": ["MixtralForCausalLM"], "num_local_experts": 4}
GEMMA2: dict[str, Any] = {"architectures": ["Gemma2ForCausalLM"]}
GEMMA3: dict[str, Any] = {"architectures": ["Gemma3ForCausalLM"]}
OPT: dict[str, Any] = {
    "architectures": ["OPTForCausalLM"],
    "ffn_dim": 768,
    "num_key_value_heads": 4,
}
GPT2: dict[str, Any] = {
    "architectures": ["GPT2LMHeadModel"],
    "n_embd": 256,
    "n_layer": 2,
    "n_head": 4,
    "hidden_size": None,
    "num_hidden_layers": None,
    "num_attention_heads": None,
    "num_key_value_heads": None,
}
FULL, SLIDING = "full_attention", "sliding_attention"
QWEN3_MOE = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "num_experts": 6,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 96,
}


def config(**keys: Any) -> dict[str, Any]:
    """A small Llama's config.json, with keys replaced; None removes one."""
    base = {
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": 256,
        "intermediate_size": 768,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 1000,
    }
    return {k: v for k, v in {**base, **keys}.items() if v is not None}


def shape(hidden: int, intermediate: int, heads: int, **keys: Any) -> ModelShape:
    sizes = {
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
    }
    return ModelShape.from_config(config(**{**sizes, **keys}), "config.json")


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({}, {"num_kv_heads": 2, "head_dim": 64}),
        ({"num_key_value_heads": None}, {"num_kv_heads": 4}),
        ({"num_key_value_heads": 4}, {"num_kv_heads": 4}),
        ({"num_key_value_heads": 1}, {"num_kv_heads": 1}),
        ({"head_dim": 128}, {"head_dim": 128, "hidden_size": 256, "num_heads": 4}),
        ({"attention_bias": True}, {"biases": QKV | {"self_attn.o_proj"}}),
        (
            {"mlp_bias": True},
            {"biases": {"mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"}},
        ),
        ({"tie_word_embeddings": True}, {"tie_word_embeddings": True}),
        ({**QWEN2}, {"biases": QKV, "sliding_window": None}),
        ({**QWEN2, "sliding_window": 64}, {"sliding_window": None}),
        ({**MISTRAL, "sliding_window": 64}, {"sliding_window": 64, "biases": set()}),
        ({**QWEN3, "head_dim": 32}, {"head_dim": 32, "biases": set()}),
        (MIXTRAL, {"num_experts": 4, "experts_per_token": 2, "renormalize": True}),
        (
            {**MIXTRAL, "num_experts_per_tok": 3, "head_dim": None},
            {"experts_per_token": 3, "head_dim": 64},
        ),
        (
            GEMMA2,
            {
                "head_dim": 256,
                "tie_word_embeddings": True,
                "sliding_window": 4096,
                "full_layers": {1},
                "query_scalar": 256,
                "attention_cap": 50.0,
                "logits_cap": 30.0,
                "attention_scale": 1 / 16,
            },
        ),
        (
            {
                **GEMMA2,
                "layer_types": [FULL, SLIDING],
                "query_pre_attn_scalar": 144,
                "attn_logit_softcapping": 20,
            },
            {"full_layers": {0}, "attention_scale": 1 / 12, "attention_cap": 20},
        ),
        (
            {**GEMMA3, "sliding_window_pattern": 2, "final_logit_softcapping": 30},
            {"full_layers": {1}, "attention_cap": None, "logits_cap": 30},
        ),
        (GEMMA3, {"full_layers": set(), "sliding_window": 4096, "logits_cap": None}),
        ({"query_pre_attn_scalar": 9}, {"attention_scale": 1 / 8}),
        (
            OPT,
            {
                "positions": 2050,
                "tie_word_embeddings": True,
                "biases": {*QKV, "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj"},
            },
        ),
        ({**OPT, "max_position_embeddings": 30}, {"positions": 32, "num_kv_heads": 4}),
        (
            {**GPT2, "n_inner": 768},
            {"positions": 1024, "tie_word_embeddings": True, "num_kv_heads": 4},
        ),
    ],
)
def test_shape(keys: dict[str, Any], expected: dict[str, Any]) -> None:
    found = ModelShape.from_config(config(**keys), "config.json")
    for name, value in expected.items():
        assert getattr(found, name) == value
    assert (found.intermediate_size, found.num_layers) == (768, 2)
    assert found.vocab_size == 1000


NOT_NULL = {  # transformers' config class, or what reads it, refuses these
    ("MistralForCausalLM", "num_key_value_heads"),
    ("Qwen3ForCausalLM", "head_dim"),
    ("Phi3ForCausalLM", "head_dim"),
    ("MixtralForCausalLM", "num_key_value_heads"),
    ("Qwen3MoeForCausalLM", "num_key_value_heads"),
    ("OPTForCausalLM", "max_position_embeddings"),
    ("OPTForCausalLM", "tie_word_embeddings"),
    ("GPT2LMHeadModel", "n_positions"),
    ("GPT2LMHeadModel", "tie_word_embeddings"),
    *(
        (f"Gemma{version}ForCausalLM", key)
        for version in (2, 3)
        for key in (
            "num_key_value_heads",
            "head_dim",
            "sliding_window",
            "sliding_window_pattern",
            "query_pre_attn_scalar",
            "tie_word_embeddings",
        )
    ),
}
OF_EXPERTS = {c["architectures"][0]: c for c in (MIXTRAL, QWEN3_MOE)}
LEFT_OUT = ("num_key_value_heads", "head_dim", "sliding_window")
OF = {
    "Gem": (
        "sliding_window_pattern",
        "tie_word_embeddings",
        "layer_types",
        "query_pre_attn_scalar",
        "attn_logit_softcapping",
        "final_logit_softcapping",
    ),
    "OPT": ("max_position_embeddings", "tie_word_embeddings", "word_embed_proj_dim"),
    "GPT": ("n_positions", "n_inner", "tie_word_embeddings"),
}


@pytest.mark.parametrize(
    ("name", "dropped", "how"),
    [
        (name, dropped, how)
        for name in ARCHITECTURES
        for dropped in (*LEFT_OUT, *OF.get(name[:3], ()))
        for how in ("missing", "null")
        if how == "missing" or (name, dropped) not in NOT_NULL
    ],
)
def test_keys_left_out_mean_what_they_mean_to_transformers(
    name: str, dropped: str, how: str
) -> None:
    """Whether config.json or transformers' config is read."""
    transformers = pytest.importorskip("transformers")
    keys = {**config(), "num_attention_heads": 32, "hidden_size": 1024}
    if name != "Qwen2ForCausalLM":
        keys["head_dim"] = 64
    keys["architectures"] = [name]
    keys |= OF_EXPERTS.get(name, {})
    if name == "OPTForCausalLM":
        keys |= {"ffn_dim": 768, "num_key_value_heads": 32, "head_dim": 32}
    if name == "GPT2LMHeadModel":
        sizes = {"n_embd": 1024, "n_layer": 2, "n_head": 32, "n_inner": 768}
        keys = {"architectures": [name], "vocab_size": 1000, "n_positions": 64, **sizes}
    keys.pop(dropped, None)
    if how == "null":
        keys[dropped] = None
    config_class = getattr(transformers, name).config_class
    expected = ModelShape.from_config(config_class(**keys).to_dict(), "config.json")
    assert ModelShape.from_config(keys, "config.json") == expected


@pytest.mark.parametrize(
    "architectures",
    [
        None,
        [],
        ["GPTNeoForCausalLM"],
        ["LlamaForSequenceClassification"],
        ["Qwen2ForCausalLM", "LlamaForCausalLM"],
        ["Qwen2MoeForCausalLM"],
        "LlamaForCausalLM",
        5,
        True,
        [["LlamaForCausalLM"]],
        {"LlamaForCausalLM": 1},
    ],
)
def test_other_architectures(architectures: object) -> None:
    with pytest.raises(UnsupportedError) as error:
        ModelShape.from_config(config(architectures=architectures), "m/config.json")
    assert str(error.value) == (
        f"m/config.json: architectures {architectures!r} is not supported; "
        "supported: LlamaForCausalLM, MistralForCausalLM, Qwen2ForCausalLM, "
        "Qwen3ForCausalLM, Phi3ForCausalLM, MixtralForCausalLM, Qwen3MoeForCausalLM, "
        "Gemma2ForCausalLM, Gemma3ForCausalLM, OPTForCausalLM, GPT2LMHeadModel"
    )


@pytest.mark.parametrize("count", ["num_experts", "num_local_experts"])
def test_experts_of_qwen3(count: str) -> None:
    """transformers writes the number under another name than the model's makers."""
    keys = {**QWEN3_MOE, "num_experts_per_tok": 2, "norm_topk_prob": True}
    keys[count] = keys.pop("num_experts")
    found = ModelShape.from_config(config(**keys), "config.json")
    assert (found.num_experts, found.experts_per_token, found.renormalize) == (6, 2, 1)
    assert found.intermediate_size == 96
    plain = ModelShape.from_config(config(**{**keys, "norm_topk_prob": None}), "x")
    assert not plain.renormalize


@pytest.mark.parametrize(
    ("key", "value", "largest"),
    [
        ("num_local_experts", 0, MAX_EXPERTS // 2),
        ("num_local_experts", MAX_EXPERTS, MAX_EXPERTS // 2),
        ("num_local_experts", None, MAX_EXPERTS // 2),
        ("num_local_experts", True, MAX_EXPERTS // 2),
        ("num_experts_per_tok", 5, 4),
        ("num_experts_per_tok", "2", 4),
    ],
)
def test_impossible_experts(key: str, value: object, largest: int) -> None:
    keys = {**MIXTRAL, key: value}
    with pytest.raises(UnsupportedError) as error:
        ModelShape.from_config(config(**keys), "m/config.json")
    assert str(error.value) == (
        f"m/config.json: {key} must be an integer from 1 to {largest}, got {value!r}"
    )


@pytest.mark.parametrize("key", ["query_pre_attn_scalar", "attn_logit_softcapping"])
@pytest.mark.parametrize("value", [0, -1.0, True, "50", float("inf"), float("nan")])
def test_impossible_number(key: str, value: object) -> None:
    with pytest.raises(UnsupportedError) as error:
        ModelShape.from_config(config(**{**GEMMA2, key: value}), "m/config.json")
    message = f"m/config.json: {key} must be a number above 0 or null, got {value!r}"
    assert str(error.value) == message


def test_types_of_every_layer() -> None:
    keys = {**GEMMA2, "layer_types": [FULL, SLIDING, FULL]}
    with pytest.raises(UnsupportedError, match="layer_types has 3 layers, num_hidden_"):
        ModelShape.from_config(config(**keys), "m/config.json")


def test_vocabulary_that_vllm_holds() -> None:
    read = ModelShape.from_config(config(**GEMMA2), "m/config.json")
    scheme = scheme_from_name(DEFAULT_SCHEME, vocab_bits=8)
    with pytest.raises(UnsupportedError, match="config.json: vocab_bits 8 is not supp"):
        check_scheme(read, scheme, "m/config.json")


SIZES = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "vocab_size",
)


@pytest.mark.parametrize("key", SIZES)
@pytest.mark.parametrize("value", [0, -1, True, 64.0, "64", [64], {}, 1 << 60])
def test_impossible_size(key: str, value: object) -> None:
    with pytest.raises(UnsupportedError) as error:
        ModelShape.from_config(config(**{key: value}), "m/config.json")
    largest = MAX_LAYERS if key == "num_hidden_layers" else MAX_SIZE
    assert str(error.value) == (
        f"m/config.json: {key} must be an integer from 1 to {largest}, got {value!r}"
    )


@pytest.mark.parametrize(
    "key", sorted(set(SIZES) - {"num_key_value_heads", "head_dim"})
)
def test_missing_size(key: str) -> None:
    with pytest.raises(UnsupportedError, match=f"config.json: {key} must be .*None"):
        ModelShape.from_config(config(**{key: None}), "config.json")


@pytest.mark.parametrize("key", ["attention_bias", "mlp_bias", "tie_word_embeddings"])
@pytest.mark.parametrize("value", ["false", 1, 0.0, []])
def test_flag_is_a_boolean(key: str, value: object) -> None:
    with pytest.raises(UnsupportedError) as error:
        ModelShape.from_config(config(**{key: value}), "config.json")
    message = f"config.json: {key} must be true or false, got {value!r}"
    assert str(error.value) == message


def test_kv_heads_must_divide_heads() -> None:
    with pytest.raises(UnsupportedError) as error:
        ModelShape.from_config(config(num_key_value_heads=3), "config.json")
    assert "num_attention_heads 4 is not a multiple of num_key_value_heads 3" in str(
        error.value
    )


OTHER_KEYS = (
    "mlp_bias",
    "architectures",
    "model_type",
    "sliding_window",
    "layer_types",
    "rope_scaling",
    "rope_theta",
    "rope_parameters",
    "query_pre_attn_scalar",
    "sliding_window_pattern",
    "ffn_dim",
    "n_embd",
    "n_head",
    "n_inner",
    "n_positions",
    "max_position_embeddings",
    "word_embed_proj_dim",
)
JUNK = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-4, 300),
    st.integers(),
    st.floats(),
    st.text(max_size=5),
    st.lists(st.integers(), max_size=2),
    st.dictionaries(
        st.sampled_from(["rope_type", "type", "factor", "truncate"]),
        st.one_of(st.integers(), st.floats(), st.sampled_from(["yarn", "linear"])),
    ),
)


@settings(max_examples=1000)
@example({"head_dim": 1}, {})
@example({"head_dim": MAX_SIZE}, {})
@example({"head_dim": MAX_SIZE, "num_attention_heads": 1, "num_key_value_heads": 1}, {})
@given(
    st.dictionaries(st.sampled_from([*SIZES, *OTHER_KEYS]), JUNK),
    st.sampled_from([{}, GEMMA2, GEMMA3, OPT, GPT2]),
)
def test_any_config_is_read_or_refused(
    keys: dict[str, Any], base: dict[str, Any]
) -> None:
    """Also whatever follows from it: bounded work, errors of one kind."""
    try:
        read = ModelShape.from_config({**config(**base), **keys}, "config.json")
        check_scheme(read, W4A4KV4, "config.json")
        rotations = flag_only_rotations(read, W4A4KV4, "config.json")
    except UnsupportedError as error:
        assert str(error).startswith("config.json: ")
    else:
        check_placement(read, rotations)


def test_largest_sizes_take_bounded_time_and_memory() -> None:
    """What a hostile config can ask for stays small."""
    keys = {"head_dim": 64, "num_hidden_layers": MAX_LAYERS}
    largest = shape(MAX_SIZE, MAX_SIZE, MAX_SIZE // 64, **keys)
    assert len(largest.tensors()) == 9 * MAX_LAYERS + 3
    rotations = flag_only_rotations(largest, W4A4KV4, "config.json")
    check_placement(largest, rotations)
    prime = shape(MAX_SIZE, MAX_SIZE - 3, 1, head_dim=64)
    with pytest.raises(UnsupportedError, match="intermediate_size 1048573 has no Had"):
        flag_only_rotations(prime, W4A4KV4, "config.json")
    with pytest.raises(UnsupportedError) as error:
        shape(256, 768, MAX_SIZE, head_dim=64)
    assert (
        f"num_attention_heads {MAX_SIZE} * head_dim 64 is larger than {MAX_SIZE}"
        in str(error.value)
    )


def _in_files(model: Any, config: Any) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor; each expert has its own in files."""
    found = {}
    of_mlp = {"MixtralForCausalLM": ("block_sparse_moe", "w1", "w3", "w2")}
    usual = ("mlp", "gate_proj", "up_proj", "down_proj")
    mlp, gate, up, down = of_mlp.get(config.architectures[0], usual)
    for name, tensor in model.state_dict().items():
        block, experts, part = name.partition(".experts.")
        if not experts:
            found[name.replace(".mlp.", f".{mlp}.")] = tuple(tensor.shape)
            continue
        n, k = tensor.shape[1:]
        block = block.replace(".mlp", f".{mlp}")
        shapes = {down: (n, k)}
        if part == "gate_up_proj":
            shapes = {gate: (n // 2, k), up: (n // 2, k)}
        for expert in range(len(tensor)):
            for linear, size in shapes.items():
                found[f"{block}.experts.{expert}.{linear}.weight"] = size
    return found


@pytest.mark.parametrize(
    "keys",
    [
        {},
        {"num_key_value_heads": 4},
        {"num_key_value_heads": 1},
        {"head_dim": 128},
        {"attention_bias": True},
        {"mlp_bias": True, "num_hidden_layers": 1},
        {"tie_word_embeddings": True},
        MISTRAL,
        QWEN2,
        {**QWEN2, "tie_word_embeddings": True, "num_key_value_heads": 1},
        QWEN3,
        {**QWEN3, "head_dim": 32, "tie_word_embeddings": True},
        {**PHI3, "pad_token_id": None},
        {**PHI3, "pad_token_id": None, "num_key_value_heads": 1, "head_dim": 32},
        MIXTRAL,
        QWEN3_MOE,
        {**QWEN3_MOE, "tie_word_embeddings": True, "head_dim": 32},
        {**GEMMA2, "tie_word_embeddings": True, "attention_bias": True},
        {**GEMMA3, "tie_word_embeddings": False},
        {**OPT, "tie_word_embeddings": True},
        {**OPT, "tie_word_embeddings": False, "max_position_embeddings": 30},
        {**GPT2, "tie_word_embeddings": True, "n_positions": 40},
        {**GPT2, "tie_word_embeddings": False, "n_inner": 96},
    ],
)
def test_tensors_are_those_of_transformers(keys: dict[str, Any]) -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    keys = config(**keys) | {k: v for k, v in keys.items() if k == "pad_token_id"}
    model_class = getattr(transformers, keys["architectures"][0])
    hf_config = model_class.config_class(**keys)
    with torch.device("meta"):
        model = model_class(hf_config)
    expected = _in_files(model, hf_config)
    if keys.get("tie_word_embeddings"):
        assert model.lm_head.weight is model.get_input_embeddings().weight
        del expected["lm_head.weight"]
    read = ModelShape.from_config(hf_config.to_dict(), "config.json")
    assert read.plain_tensors() == expected


# name: hidden, intermediate, heads, head_dim, largest tensor parallel size
MODELS = {
    "Llama-2-7B": (4096, 11008, 32, 128, 8),
    "Llama-2-13B": (5120, 13824, 40, 128, 2),
    "Llama-3-8B": (4096, 14336, 32, 128, 8),
    "Llama-3-70B": (8192, 28672, 64, 128, 8),
    "Llama-3.2-1B": (2048, 8192, 32, 64, 8),
    "Llama-3.2-3B": (3072, 8192, 24, 128, 2),
    "TinyLlama-1.1B": (2048, 5632, 32, 64, 8),
    "SmolLM-135M": (576, 1536, 9, 64, 1),
    "SmolLM-360M": (960, 2560, 15, 64, 1),
    "Mistral-Nemo": (5120, 14336, 32, 128, 8),
    "Qwen2.5-0.5B": (896, 4864, 14, 64, 1),
    "Qwen2.5-7B": (3584, 18944, 28, 128, 1),
    "Qwen3-0.6B": (1024, 3072, 16, 128, 8),
    "Qwen3-32B": (5120, 25600, 64, 128, 8),
    "Phi-3-mini": (3072, 8192, 32, 96, 8),
    "Phi-4": (5120, 17920, 40, 128, 2),
    "ref-7m": (256, 768, 4, 64, 2),
}


def check_placement(read: ModelShape, rotations: Any) -> None:
    """Every block divides what it transforms, also on each shard it allows."""
    hidden, heads = read.hidden_size, read.num_heads * read.head_dim
    intermediate = read.intermediate_size
    for name, rotation in rotations:
        if isinstance(rotation, Rotation):
            assert exists(rotation.order), name
            assert rotation.block % rotation.order == 0, name
    assert hidden % rotations.attn_input.block == 0
    assert rotations.mlp_input == rotations.attn_input
    for online in (rotations.attn_input, rotations.down_input):
        assert online.apply == "online" and online.stride == 1 and online.scaled
        assert online.order >= MIN_BLOCK
    largest = rotations.max_tensor_parallel_size
    assert largest in (1, 2, 4, 8)
    for parallel in (n for n in (1, 2, 4, 8) if largest % n == 0):
        assert intermediate % (parallel * rotations.down_input.block) == 0
        if rotations.o_input is not None:
            assert heads % (parallel * rotations.o_input.block) == 0
    if rotations.o_input is not None:
        # Across heads: the folded rotation of values is inside of each head.
        assert rotations.o_input.stride == read.head_dim
        assert rotations.o_input.apply == "online" and not rotations.o_input.scaled
    assert rotations.v.apply == "folded"
    assert rotations.v.order == rotations.v.block == read.head_dim
    assert rotations.residual is None


@pytest.mark.parametrize("model", MODELS)
def test_flag_only_rotations(model: str) -> None:
    hidden, intermediate, heads, head_dim, parallel = MODELS[model]
    read = shape(hidden, intermediate, heads, head_dim=head_dim)
    check_scheme(read, W4A4KV4, model)
    rotations = flag_only_rotations(read, W4A4KV4, model)
    check_placement(read, rotations)
    assert rotations.max_tensor_parallel_size == parallel
    assert (rotations.o_input is None) == (heads % 2 == 1)
    # The whole width is mixed, and down_proj's in as few blocks as it may be.
    assert rotations.attn_input.order == hidden
    assert rotations.k is not None and rotations.k.apply == "online"
    assert rotations.k.order == head_dim
    unquantized = flag_only_rotations(read, scheme_from_name("w4a4"), model)
    assert unquantized.k is None
    assert unquantized.model_copy(update={"k": rotations.k}) == rotations


@pytest.mark.parametrize(
    ("intermediate", "order", "parallel"),
    [(11008, 1376, 8), (96, 24, 4), (64, 16, 4), (88, 44, 2), (16, 16, 1)],
)
def test_down_proj_blocks(intermediate: int, order: int, parallel: int) -> None:
    """T is the largest of 8, 4, 2 and 1 whose shard is one Hadamard block."""
    read = shape(512, intermediate, 64)
    rotations = flag_only_rotations(read, W4A4KV4, "config.json")
    assert rotations.down_input.order == rotations.down_input.block == order
    assert rotations.max_tensor_parallel_size == parallel


@pytest.mark.parametrize(
    ("key", "size", "order"),
    [
        ("hidden_size", 202, 2),
        ("hidden_size", 1010, 2),
        ("hidden_size", 8 * 4099, 8),
        ("intermediate_size", 8 * 4099, 8),
        ("intermediate_size", 5461, 1),
        ("intermediate_size", 8, 8),
    ],
)
def test_size_without_a_block(key: str, size: int, order: int) -> None:
    read = shape(hidden=256, intermediate=768, heads=4)
    with pytest.raises(UnsupportedError) as error:
        flag_only_rotations(
            dataclasses.replace(read, **{key: size}), W4A4KV4, "m/config.json"
        )
    assert str(error.value) == (
        f"m/config.json: {key} {size} has no Hadamard block: the largest order that "
        f"divides it is {order}, at least {MIN_BLOCK} is supported"
    )


def test_head_dim_without_a_hadamard_matrix() -> None:
    with pytest.raises(UnsupportedError, match="head_dim 66 has no Hadamard matrix"):
        check_scheme(shape(256, 768, 4, head_dim=66), W4A4KV4, "config.json")


def test_clip_ratios_are_of_the_layers_there_are() -> None:
    read = shape(256, 768, 4)
    for name in ClipRatios.model_fields:
        ratios = dict.fromkeys(ClipRatios.model_fields, [0.9] * read.num_layers)
        right = W4A4KV4.with_clip_ratios(ClipRatios.model_validate(ratios))
        check_scheme(read, right, "config.json")
        ratios[name] = [0.9] * (read.num_layers + 1)
        wrong = W4A4KV4.with_clip_ratios(ClipRatios.model_validate(ratios))
        with pytest.raises(UnsupportedError) as error:
            check_scheme(read, wrong, "config.json")
        assert str(error.value) == (
            f"config.json: scheme.activations.clip_ratios.{name} has "
            f"{read.num_layers + 1} values; supported: one for each of the "
            f"{read.num_layers} layers"
        )


@pytest.mark.parametrize(
    ("keys", "named"),
    [
        ({"hidden_size": 320}, "hidden_size 320"),
        ({"head_dim": 48}, r"num_attention_heads \* head_dim 192"),
        ({"intermediate_size": 704}, "intermediate_size 704"),
    ],
)
def test_group_size_must_divide_every_input(keys: dict[str, int], named: str) -> None:
    read = ModelShape.from_config(config(**{"head_dim": 64, **keys}), "config.json")
    check_scheme(read, scheme_from_name("w4a16-g64"), "config.json")
    message = f"group_size 128 does not divide {named}$"
    with pytest.raises(UnsupportedError, match=message):
        check_scheme(read, scheme_from_name("w4a16-g128"), "config.json")
