# SPDX-License-Identifier: Apache-2.0
"""The schema: what it admits round-trips, what it refuses is named."""

import copy
import json
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from vllm_lowbit.errors import ConfigError
from vllm_lowbit.schema import (
    Activations,
    ClipRatios,
    LoadTimeOptions,
    LowbitConfig,
    Manifest,
    Rotation,
    clipped,
)

SHA = "0" * 64
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.text(max_size=10), inner, max_size=3)
    ),
    max_leaves=8,
)


def config() -> dict[str, Any]:
    """A complete, valid quantization_config."""
    online = {"apply": "online", "order": 64, "block": 128, "scaled": True}
    return {
        "quant_method": "lowbit",
        "format_version": 1,
        "scheme": {
            "weights": {"bits": 4, "symmetric": True, "group_size": 128},
            "activations": {"bits": 4, "symmetric": False, "clip_ratio": 0.9},
            "kv_cache": {"bits": 4},
            "vocab_bits": 8,
        },
        "rotations": {
            "residual": {
                "apply": "folded",
                "kind": "orthogonal",
                "order": 576,
                "block": 576,
                "sign_seed": 7,
            },
            "attn_input": online,
            "k": online,
            "v": {"apply": "folded", "order": 64, "block": 64},
            "o_input": online,
            "mlp_input": None,
            "down_input": online,
            "max_tensor_parallel_size": 8,
        },
        "provenance": {
            "base_model": "org/model",
            "base_revision": "abc",
            "recipe": "name",
            "recipe_sha256": SHA,
        },
    }


def manifest() -> dict[str, Any]:
    """A valid manifest of two tensors."""
    return {
        "format_version": 1,
        "tensors": {
            "model.norm.weight": {
                "file": "model.safetensors",
                "dtype": "BF16",
                "shape": [64],
                "sha256": SHA,
            },
            "scalar": {
                "file": "model-00001-of-00002.safetensors",
                "dtype": "I64",
                "shape": [],
                "sha256": "f" * 64,
            },
        },
        "config": {"hidden_size": 64, "quantization_config": {"format_version": 1}},
    }


def options() -> dict[str, Any]:
    """Load-time options that are all different from their defaults."""
    return {"scheme": "w4a4", "activations_symmetric": True}


PARSERS = {
    "config": (LowbitConfig, config),
    "manifest": (Manifest, manifest),
    "options": (LoadTimeOptions, options),
}


def put(data: Any, path: str, value: Any) -> Any:
    """A copy of nested dicts and lists with one value set; ``DROP`` removes it."""
    data = copy.deepcopy(data)
    *parents, last = path.split("/")
    inner = data
    for key in parents:
        inner = inner[key]
    last = int(last) if isinstance(inner, list) else last
    if value is DROP:
        del inner[last]
    else:
        inner[last] = value
    return data


DROP = object()


@pytest.mark.parametrize("what", PARSERS)
def test_round_trip_through_json(what: str) -> None:
    model, example = PARSERS[what]
    parsed = model.parse(example(), "x")
    text = parsed.model_dump_json()
    assert model.parse(json.loads(text), "x") == parsed
    dumped = parsed.model_dump(mode="json", exclude_none=True)
    for key, value in example().items():
        if what == "options" or key in ("format_version", "quant_method", "scheme"):
            assert dumped[key] == value


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


BAD_MANIFEST = [
    ("format_version", 2, "format_version", "got 2"),
    ("format_version", True, "format_version", "should be a number, got True"),
    ("tensors", [], "tensors", "got []"),
    ("tensors", DROP, "tensors", "Field required"),
    ("tensors/scalar/dtype", "F64", "dtype", "got 'F64'"),
    ("tensors/scalar/dtype", "bf16", "dtype", "got 'bf16'"),
    ("tensors/scalar/shape", [-1], "scalar", "impossible shape [-1]"),
    ("tensors/scalar/shape", [1, 1 << 41], "scalar", "impossible shape"),
    ("tensors/scalar/shape", [1] * 9, "shape", "at most 8 items"),
    ("tensors/scalar/shape", [1.5], "shape.0", "got 1.5"),
    ("tensors/scalar/shape", ["1"], "shape.0", "got '1'"),
    ("tensors/scalar/shape", [True], "shape.0", "got True"),
    ("tensors/scalar/shape", 3, "shape", "got 3"),
    ("tensors/scalar/shape", {"0": 3}, "shape", "got {'0': 3}"),
    ("tensors/scalar/sha256", SHA.upper().replace("0", "A"), "sha256", "got 'AAA"),
    ("tensors/scalar/sha256", SHA[1:], "sha256", "got '000"),
    ("tensors/scalar/sha256", DROP, "sha256", "Field required"),
    ("tensors/scalar/mode", "rw", "mode", "got 'rw'"),
    ("tensors/scalar", None, "scalar", "got None"),
    ("config", [], "config", "got []"),
    ("config", DROP, "config", "Field required"),
]


@pytest.mark.parametrize(("path", "value", "key", "message"), BAD_MANIFEST)
def test_bad_manifest_names_tensor_and_value(
    path: str, value: Any, key: str, message: str
) -> None:
    with pytest.raises(ConfigError) as error:
        Manifest.parse(put(manifest(), path, value), "lowbit_manifest.json")
    text = str(error.value)
    assert text.startswith("lowbit_manifest.json: key ")
    if path.startswith("tensors/"):
        assert "tensors.scalar" in text
    assert key in text
    assert message in text


@pytest.mark.parametrize(
    "file",
    [
        "",
        "model.bin",
        "../model.safetensors",
        "/etc/model.safetensors",
        "a\\b.safetensors",
        ".hidden.safetensors",
        "model.safetensors\n",
        "\u00e9.safetensors",
    ],
)
def test_manifest_file_is_a_plain_safetensors_name(file: str) -> None:
    with pytest.raises(ConfigError) as error:
        Manifest.parse(put(manifest(), "tensors/scalar/file", file), "x")
    assert "key tensors.scalar.file: " in str(error.value)
    assert str(error.value).endswith(f"got {file!r}")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"scheme": 4}, "key scheme: Input should be a valid string, got 4"),
        ({"scheme": None}, "key scheme: Input should be a valid string, got None"),
        ({"activations_symmetric": 1}, "key activations_symmetric: .*got 1"),
        ({"weights": 4}, "key weights: Extra inputs are not permitted, got 4"),
        ([], r"key \(top level\): .*got \[\]"),
        (None, r"key \(top level\): .*got None"),
        ("w4a4", r"key \(top level\): .*got 'w4a4'"),
    ],
)
def test_bad_load_time_options(data: object, message: str) -> None:
    with pytest.raises(ConfigError, match=f"^--option: {message}"):
        LoadTimeOptions.parse(data, "--option")


@pytest.mark.parametrize("what", PARSERS)
@given(data=st.data())
def test_any_json_raises_only_config_errors(what: str, data: st.DataObject) -> None:
    """Whole documents, and valid ones with one value replaced."""
    model, example = PARSERS[what]
    document: Any = data.draw(JSON)
    if data.draw(st.booleans(), "mutate a valid one"):
        value, document = document, example()
        inner = document
        while True:
            key = data.draw(st.sampled_from(sorted(inner)))
            if not isinstance(inner[key], dict) or not inner[key]:
                break
            if data.draw(st.booleans()):
                break
            inner = inner[key]
        inner[key] = value
    try:
        parsed = model.parse(document, "here")
    except ConfigError as error:
        assert str(error).startswith("here: key ")
        assert len(str(error)) < 4000
    else:
        assert model.parse(json.loads(parsed.model_dump_json()), "here") == parsed


def test_message_stays_short_and_printable() -> None:
    """Keys and values are the file's; neither floods nor breaks the terminal."""
    hostile = {"k" * 10**6: 1, "two\nlines": 2, "v": "x" * 10**6}
    with pytest.raises(ConfigError) as error:
        LoadTimeOptions.parse(hostile, "--option")
    message = str(error.value)
    assert len(message) < 2000
    assert "\n" not in message
    assert "two\\nlines" in message


@pytest.mark.parametrize("data", [{"\ud800": 1}, {"activations_symmetric": "\ud800"}])
def test_lone_surrogate_is_escaped(data: dict[str, Any]) -> None:
    with pytest.raises(ConfigError) as error:
        LoadTimeOptions.parse(data, "--option")
    assert "\\ud800" in str(error.value)
    str(error.value).encode()


def test_many_errors_are_bounded() -> None:
    with pytest.raises(ConfigError) as error:
        LoadTimeOptions.parse({f"key{i}": i for i in range(1000)}, "--option")
    assert str(error.value).count("; key ") == 7


@pytest.mark.parametrize("what", PARSERS)
def test_frozen(what: str) -> None:
    model, example = PARSERS[what]
    parsed = model.parse(example(), "x")
    for name in model.model_fields:
        with pytest.raises(ValidationError, match="frozen"):
            setattr(parsed, name, getattr(parsed, name))
    with pytest.raises(ValidationError):
        parsed.surprise = 1


def test_frozen_all_the_way_down() -> None:
    parsed = LowbitConfig.parse(config(), "x")
    with pytest.raises(ValidationError, match="frozen"):
        parsed.scheme.weights.bits = 8
    with pytest.raises(ValidationError, match="frozen"):
        parsed.rotations.k.order = 32
