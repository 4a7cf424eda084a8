# SPDX-License-Identifier: Apache-2.0
"""Rotations of a checkpoint: what the server runs passes, all else is named."""

from dataclasses import replace
from typing import Any

import pytest

from vllm_lowbit.architecture import ModelShape
from vllm_lowbit.errors import ConfigError
from vllm_lowbit.placement import flag_only_rotations
from vllm_lowbit.rotations import check_rotations
from vllm_lowbit.schema import LowbitConfig, Rotation, scheme_from_name
from vllm_lowbit.supported_models import ARCHITECTURES

SHAPE = ModelShape(384, 1152, 2, 8, 2, 64, 512, False)
TIED = replace(SHAPE, tie_word_embeddings=True)


def turn(apply: str, order: int, block: int | None = None, **more: Any) -> Any:
    return {"apply": apply, "order": order, "block": block or order, **more}


GOOD = {
    "residual": turn("folded", 384, sign_seed=3),
    "attn_input": turn("online", 12, 24),
    "k": turn("online", 64),
    "v": turn("folded", 64, sign_seed=4),
    "o_input": turn("online", 4, 256),
    "mlp_input": turn("online", 128),
    "down_input": turn("online", 576),
    "max_tensor_parallel_size": 2,
}


def check(rotations: Any, shape: ModelShape = SHAPE, scheme: str = "w4a4kv4") -> None:
    data = {"scheme": scheme_from_name(scheme).model_dump(), "rotations": rotations}
    check_rotations(shape, LowbitConfig.parse(data, "test"), "config.json")


def test_what_the_server_runs() -> None:
    check(GOOD)
    check({})
    check({**GOOD, "residual": turn("online", 12, 384, sign_seed=3)}, TIED)
    check({**GOOD, "residual": None}, TIED)
    check({**GOOD, "k": None}, scheme="w4a4")
    # Folded, the server runs nothing: any orthogonal matrix will do.
    check({**GOOD, "residual": turn("folded", 384, kind="orthogonal")})


@pytest.mark.parametrize("name", ["attn_input", "o_input", "mlp_input", "down_input"])
def test_each_may_be_left_out(name: str) -> None:
    check({**GOOD, name: None})


@pytest.mark.parametrize("scheme", ["w4a4kv4", "w4a16"])
@pytest.mark.parametrize("heads", [8, 6, 1])
@pytest.mark.parametrize("intermediate", [1152, 768, 80])
def test_load_time_rotations_are_among_them(
    scheme: str, heads: int, intermediate: int
) -> None:
    """Apart from their input scales, which are no tensors of a checkpoint."""
    shape = replace(
        SHAPE, num_heads=heads, num_kv_heads=1, intermediate_size=intermediate
    )
    rotations = flag_only_rotations(shape, scheme_from_name(scheme), "config.json")
    unscaled = {
        name: value.model_copy(update={"scaled": False})
        for name, value in rotations
        if isinstance(value, Rotation)
    }
    check(rotations.model_copy(update=unscaled).model_dump(), shape, scheme)


@pytest.mark.parametrize(
    ("name", "rotation", "message"),
    [
        ("attn_input", turn("folded", 384), "apply is folded; supported: online"),
        ("k", turn("folded", 64), "apply is folded; supported: online"),
        ("o_input", turn("folded", 64), "apply is folded; supported: online"),
        ("mlp_input", turn("folded", 64), "apply is folded; supported: online"),
        ("down_input", turn("folded", 64), "apply is folded; supported: online"),
        ("v", turn("online", 64), "apply is online; supported: folded"),
        (
            "down_input",
            turn("online", 576, kind="orthogonal"),
            "kind 'orthogonal' cannot run online; supported: hadamard",
        ),
        ("mlp_input", turn("online", 6), "order 6 has no Hadamard matrix"),
        ("residual", turn("folded", 6), "order 6 has no Hadamard matrix"),
        (
            "attn_input",
            turn("online", 256),
            "block 256 does not divide hidden_size 384",
        ),
        ("residual", turn("folded", 256), "block 256 does not divide hidden_size 384"),
        (
            "o_input",
            turn("online", 12, 768),
            "block 768 does not divide num_attention_heads * head_dim 512",
        ),
        (
            "down_input",
            turn("online", 1024),
            "block 1024 does not divide intermediate_size 1152",
        ),
        ("k", turn("online", 128), "block 128 does not divide head_dim 64"),
        ("k", turn("online", 32), "order 32: it has to be head_dim 64"),
        ("v", turn("folded", 32, 64), "order 32: it has to be head_dim 64"),
        (
            "k",
            turn("online", 64, sign_seed=0),
            "sign_seed 0 is set; signs are supported on residual and v",
        ),
        ("down_input", turn("online", 64, sign_seed=9), "sign_seed 9 is set; signs"),
        ("mlp_input", turn("online", 64, scaled=True), "scaled is true; a checkpoint"),
    ],
)
def test_what_it_does_not(name: str, rotation: Any, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        check({**GOOD, name: rotation})
    start = f"config.json: quantization_config: rotations.{name}: {message}"
    assert str(error.value).startswith(start)


@pytest.mark.parametrize(
    ("apply", "shape", "tied", "supported"),
    [("online", SHAPE, "false", "folded"), ("folded", TIED, "true", "online")],
)
def test_residual_and_tied_embeddings(
    apply: str, shape: ModelShape, tied: str, supported: str
) -> None:
    message = f"rotations.residual: apply is {apply} and tie_word_embeddings {tied}; "
    with pytest.raises(ConfigError, match=f"{message}.*: {supported}$"):
        check({"residual": turn(apply, 384)}, shape)


def test_residual_and_output_norms() -> None:
    """What attention and MLP add goes through weights that no rotation passes."""
    shape = replace(TIED, architecture=ARCHITECTURES["Gemma2ForCausalLM"])
    message = "rotations.residual: the weights of post_attention_layernorm and post_fee"
    with pytest.raises(ConfigError, match=message):
        check({"residual": turn("online", 384)}, shape)
    check({**GOOD, "residual": None}, shape)


def test_keys_without_a_quantized_cache() -> None:
    with pytest.raises(ConfigError, match="rotations.k: keys.*kv_cache.bits is 16$"):
        check(GOOD, scheme="w4a4")


@pytest.mark.parametrize(
    ("parallel", "message"),
    [
        (3, "does not divide num_attention_heads 8"),
        (4, "shards of num_attention_heads * head_dim 512 are not whole blocks of rot"),
        (8, "shards of num_attention_heads * head_dim 512 are not whole blocks of rot"),
    ],
)
def test_tensor_parallel_size(parallel: int, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        check({**GOOD, "max_tensor_parallel_size": parallel})
    start = f"rotations.max_tensor_parallel_size {parallel}: {message}"
    assert start in str(error.value)


def test_shards_of_the_mlp() -> None:
    part = {"down_input": GOOD["down_input"], "max_tensor_parallel_size": 4}
    message = r"shards of intermediate_size 1152 are not .*rotations.down_input \(576"
    with pytest.raises(ConfigError, match=message):
        check(part)


def test_a_block_across_heads_keeps_them_together() -> None:
    whole = {"o_input": turn("online", 8, 512), "max_tensor_parallel_size": 2}
    with pytest.raises(ConfigError, match=r"not whole blocks of rotations.o_input \(5"):
        check(whole)
