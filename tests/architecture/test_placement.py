# SPDX-License-Identifier: Apache-2.0
"""Where rotations go for real models, and for whatever a config.json says."""

import dataclasses
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from vllm_lowbit.architecture import MAX_LAYERS, MAX_SIZE, ModelShape
from vllm_lowbit.errors import UnsupportedError
from vllm_lowbit.kernels.hadamard.matrices import exists
from vllm_lowbit.placement import MIN_BLOCK, check_scheme, flag_only_rotations
from vllm_lowbit.schema import DEFAULT_SCHEME, ClipRatios, Rotation, scheme_from_name

from .configs import GEMMA2, GEMMA3, GPT2, OPT, SIZES, config, shape

W4A4KV4 = scheme_from_name(DEFAULT_SCHEME)
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


def test_vocabulary_that_vllm_holds() -> None:
    read = ModelShape.from_config(config(**GEMMA2), "m/config.json")
    scheme = scheme_from_name(DEFAULT_SCHEME, vocab_bits=8)
    with pytest.raises(UnsupportedError, match="config.json: vocab_bits 8 is not supp"):
        check_scheme(read, scheme, "m/config.json")


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
