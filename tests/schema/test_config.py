# SPDX-License-Identifier: Apache-2.0
"""The quantization_config: what it refuses is named by key and value."""

import copy
import json
import math
from typing import Any

import pytest
from pydantic import ValidationError

from vllm_lowbit.errors import ConfigError
from vllm_lowbit.schema import (
    Activations,
    ClipRatios,
    LoadTimeOptions,
    LowbitConfig,
    Rotation,
    clipped,
)

from .documents import DROP, config, put


def test_defaults_are_filled_in() -> None:
    minimal = {"scheme": config()["scheme"], "rotations": {}}
    parsed = LowbitConfig.parse(minimal, "x")
    assert parsed.quant_method == "lowbit"
    assert parsed.format_version == 1
    assert parsed.provenance is None
    assert parsed.rotations.max_tensor_parallel_size == 1
    assert parsed.rotations.residual is None
    assert LoadTimeOptions.parse({}, "x") == LoadTimeOptions()


BAD_CONFIG = [
    ("quant_method", "gptq", "'gptq'"),
    ("format_version", 2, "got 2"),
    ("format_version", 0, "got 0"),
    ("format_version", "1", "got '1'"),
    ("scheme", DROP, "Field required"),
    ("scheme", "w4a4kv4", "got 'w4a4kv4'"),
    ("scheme/weights", None, "got None"),
    ("scheme/weights/bits", DROP, "Field required"),
    ("scheme/weights/bits", 5, "got 5"),
    ("scheme/weights/bits", -4, "got -4"),
    ("scheme/weights/bits", "4", "got '4'"),
    ("scheme/weights/bits", 4.5, "got 4.5"),
    ("scheme/weights/symmetric", 1, "got 1"),
    ("scheme/weights/symmetric", "true", "got 'true'"),
    ("scheme/weights/group_size", -128, "got -128"),
    ("scheme/weights/group_size", 0, "got 0"),
    ("scheme/weights/group_size", 1 << 62, f"got {1 << 62}"),
    ("scheme/weights/zero_point", 3, "got 3"),
    ("scheme/activations/bits", 3, "got 3"),
    ("scheme/activations/bits", True, "got True"),
    ("scheme/activations/group_size", 48, "32, 64, 128 or 256, got 48"),
    ("scheme/activations/group_size", "128", "got '128'"),
    ("scheme/kv_cache/bits", 8, "got 8"),
    ("scheme/kv_cache/bits", [4], "got [4]"),
    ("rotations", DROP, "Field required"),
    ("rotations/q", {"apply": "online"}, "got {'apply': 'online'}"),
    ("rotations/max_tensor_parallel_size", 0, "got 0"),
    ("rotations/max_tensor_parallel_size", 1025, "got 1025"),
    ("rotations/k/apply", "none", "got 'none'"),
    ("rotations/k/apply", DROP, "Field required"),
    ("rotations/k/kind", "fourier", "got 'fourier'"),
    ("rotations/k/order", 1, "got 1"),
    ("rotations/k/order", 1 << 21, f"got {1 << 21}"),
    ("rotations/k/order", "64", "got '64'"),
    ("rotations/k/block", -64, "got -64"),
    ("rotations/k/block", float("inf"), "got inf"),
    ("rotations/k/sign_seed", 0.5, "got 0.5"),
    ("rotations/k/scaled", None, "got None"),
    ("rotations/k/order ", 64, "got 64"),
    ("provenance/recipe_sha256", "0" * 63, "got '000"),
    ("provenance/recipe_sha256", "G" * 64, "got 'GGG"),
    ("provenance/base_model", DROP, "Field required"),
    ("surprise", {}, "Extra inputs are not permitted, got {}"),
]


@pytest.mark.parametrize(("path", "value", "message"), BAD_CONFIG)
def test_bad_config_names_key_and_value(path: str, value: Any, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        LowbitConfig.parse(put(config(), path, value), "config.json")
    text = str(error.value)
    assert text.startswith("config.json: key ")
    last = path.rpartition("/")[2]
    key = path.replace("/", ".") if last.isidentifier() else repr(last)
    assert key in text
    assert message in text


@pytest.mark.parametrize(
    ("weights", "activations", "message"),
    [
        (
            64,
            {"group_size": 128},
            "size 128 with weights.group_size 64: scales",
        ),
        (
            None,
            {"group_size": 32},
            "size 32 with weights.group_size None: scales",
        ),
        (128, {"group_size": 128, "bits": 16}, "group_size has no effect with bits 16"),
    ],
)
def test_groups_of_activations_are_those_of_weights(
    weights: int | None, activations: dict[str, Any], message: str
) -> None:
    data = put(config(), "scheme/weights/group_size", weights)
    data = put(data, "scheme/activations", {"bits": 4, **activations})
    with pytest.raises(ConfigError, match=f"^config.json: key scheme.*{message}"):
        LowbitConfig.parse(data, "config.json")
    sound = put(config(), "scheme/activations/group_size", 128)
    parsed = LowbitConfig.parse(sound, "config.json")
    assert parsed.scheme.name == "w4a4kv4-g128-ag128"


RATIOS = {
    "attn_input": [0.9, 1.0],
    "o_input": [0.5, 0.85],
    "mlp_input": [0.875, 0.95],
    "down_input": [1, 0.8001],
}


def _with_ratios(path: str, value: Any) -> dict[str, Any]:
    data = put(config(), "scheme/activations/clip_ratio", DROP)
    data = put(data, "scheme/activations/clip_ratios", copy.deepcopy(RATIOS))
    return put(data, path, value)


def test_clip_ratios() -> None:
    data = _with_ratios("scheme/activations/symmetric", True)
    parsed = LowbitConfig.parse(data, "x")
    assert LowbitConfig.parse(json.loads(parsed.model_dump_json()), "x") == parsed
    grouped = parsed.scheme.model_copy(
        update={"activations": Activations(bits=4, group_size=128)}
    )
    again = grouped.with_clip_ratios(ClipRatios(**RATIOS)).activations
    assert again.group_size == 128 and again.kept("o_input") == (0.5, 0.85)
    activations = parsed.scheme.activations
    assert activations.kept("o_input") == (0.5, 0.85)
    assert len(activations.kept()) == 8
    assert clipped(activations.kept()) == ", clipped to 0.5 to 1 of its range, by layer"
    assert clipped(activations.kept("down_input")[:1]) == ""
    one = LowbitConfig.parse(config(), "x").scheme.activations
    assert one.kept() == one.kept("o_input") == (0.9,)
    assert clipped(one.kept()) == ", clipped to 0.9 of its range"
    assert clipped((1.0, 1.0)) == ""


RATIOS_AT = "scheme/activations/clip_ratios"
BAD_RATIOS = [
    (
        f"{RATIOS_AT}/o_input/1",
        0.49,
        "o_input.1: Input should be greater than or equal",
    ),
    (
        f"{RATIOS_AT}/o_input/1",
        1.5,
        "o_input.1: Input should be less than or equal to 1",
    ),
    (f"{RATIOS_AT}/o_input/0", math.nan, "o_input.0: .*got nan"),
    (f"{RATIOS_AT}/o_input/0", "0.9", "o_input.0: .*got '0.9'"),
    (f"{RATIOS_AT}/o_input/0", True, "o_input.0: .*got True"),
    (f"{RATIOS_AT}/o_input", 0.9, "o_input: .*got 0.9"),
    (f"{RATIOS_AT}/o_input", [], "o_input: .*at least 1 item"),
    (f"{RATIOS_AT}/o_input", DROP, "o_input: Field required"),
    (f"{RATIOS_AT}/k", [0.9, 0.9], "clip_ratios.k: Extra inputs are not permitted"),
    (RATIOS_AT, 0.9, "clip_ratios: .*got 0.9"),
    ("scheme/activations/clip_ratio", 0.9, "clip_ratio has no effect with clip_ratios"),
    ("scheme/activations/bits", 16, "clip_ratios has no effect with bits 16"),
]


@pytest.mark.parametrize(("path", "value", "message"), BAD_RATIOS)
def test_bad_clip_ratios(path: str, value: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=f"^config.json: key scheme.*{message}"):
        LowbitConfig.parse(_with_ratios(path, value), "config.json")


def test_order_must_divide_block() -> None:
    rotation = {"apply": "online", "order": 24, "block": 64}
    data = put(config(), "rotations/down_input", rotation)
    message = "key rotations.down_input: .*order 24 does not divide block 64"
    with pytest.raises(ConfigError, match=message):
        LowbitConfig.parse(data, "x")
    assert Rotation(apply="online", order=16, block=64).stride == 4


def test_equal_number_is_read_as_the_integer() -> None:
    parsed = LowbitConfig.parse(put(config(), "scheme/weights/bits", 4.0), "x")
    assert type(parsed.scheme.weights.bits) is int


def test_frozen_all_the_way_down() -> None:
    parsed = LowbitConfig.parse(config(), "x")
    with pytest.raises(ValidationError, match="frozen"):
        parsed.scheme.weights.bits = 8
    with pytest.raises(ValidationError, match="frozen"):
        parsed.rotations.k.order = 32
