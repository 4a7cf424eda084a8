# SPDX-License-Identifier: Apache-2.0
"""Scheme names: each stands for one scheme, everything else is refused by name."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_lowbit.errors import ConfigError
from vllm_lowbit.schema import (
    DEFAULT_SCHEME,
    SCHEME_NAMES,
    LoadTimeOptions,
    Scheme,
    scheme_from_name,
)

SIZES = (32, 64, 128, 256)
SUFFIXES = ("", *(f"-g{size}" for size in SIZES))
BITS = {
    "w4a4kv4": (4, 4, 4),
    "w4a4": (4, 4, 16),
    "w4a8kv4": (4, 8, 4),
    "w4a16": (4, 16, 16),
    "w4a16kv4": (4, 16, 4),
    "w3a16": (3, 16, 16),
    "w2a16": (2, 16, 16),
    "w6a6": (6, 6, 16),
    "w8a8": (8, 8, 16),
}


def test_scheme_names_are_the_documented_ones() -> None:
    assert set(SCHEME_NAMES) == set(BITS)
    assert DEFAULT_SCHEME == LoadTimeOptions().scheme == "w4a4kv4"


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("name", SCHEME_NAMES)
def test_scheme_name_round_trips(name: str, suffix: str) -> None:
    scheme = scheme_from_name(name + suffix)
    bits = (scheme.weights.bits, scheme.activations.bits, scheme.kv_cache.bits)
    assert bits == BITS[name]
    assert scheme.weights.group_size == (int(suffix[2:]) if suffix else None)
    assert scheme.weights.symmetric == (bits[0] > 3)
    assert not scheme.activations.symmetric
    assert scheme.name == name + suffix
    assert Scheme.model_validate_json(scheme.model_dump_json()) == scheme
    again = json.loads(json.dumps(scheme.model_dump()))
    assert Scheme.model_validate(again) == scheme
    assert scheme_from_name(name + suffix, True).activations.symmetric


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", [n for n in SCHEME_NAMES if BITS[n][1] != 16])
def test_groups_of_activations(name: str, size: int) -> None:
    scheme = scheme_from_name(f"{name}-g{size}-ag{size}", clip_ratio=0.9)
    assert scheme.name == f"{name}-g{size}-ag{size}"
    assert scheme.activations.group_size == scheme.weights.group_size == size
    assert scheme.activations.per == f"token and group of {size}"
    per_token = scheme_from_name(f"{name}-g{size}", clip_ratio=0.9)
    assert per_token.activations.group_size is None
    assert per_token.activations.per == "token"
    data = scheme.model_dump(exclude_none=True)
    assert Scheme.model_validate(data) == scheme
    del data["activations"]["group_size"]
    assert Scheme.model_validate(data) == per_token


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("w4a4kv4-ag128", "activations.group_size 128 with weights.group_size None: "),
        ("w4a4-g64-ag128", "activations.group_size 128 with weights.group_size 64: "),
        (
            "w4a16-g128-ag128",
            "activations: .*group_size has no effect with bits 16",
        ),
        ("w4a4-g128-ag48", "key activations.group_size: .*32, 64, 128 or 256, got 48"),
    ],
)
def test_groups_of_activations_that_are_refused(name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=f"^scheme '{name}': .*{message}"):
        scheme_from_name(name)


@pytest.mark.parametrize(
    "name",
    [
        "",
        "w5a5",
        "w4a4kv8",
        "W4A4KV4",
        " w4a4",
        "w4a4\n",
        "w4a4kv4-g",
        "w4a4kv4-g0",
        "w4a4kv4-g0128",
        "w4a4kv4-g-128",
        "w4a4kv4-g99999",
        "w4a4kv4-g128-g128",
        "w4a4kv4-ag128-g128",
        "w4a4kv4-g128-ag",
        "w4a4kv4-g128-ag0",
        "w4a4kv4-g128ag128",
        "w4a4kv4-g\u0661\u0662\u0668",  # 128 in Arabic digits
        "w4a4" * 10_000,
    ],
)
def test_scheme_that_does_not_exist(name: str) -> None:
    with pytest.raises(ConfigError) as error:
        scheme_from_name(name)
    message = str(error.value)
    assert message.startswith(f"scheme {repr(name)[:57]}")
    assert "does not exist; supported: w4a4kv4, w4a4, " in message
    assert len(message) < 400


@pytest.mark.parametrize("group_size", [1, 7, 16, 100, 512, 9999])
def test_group_size_that_does_not_exist(group_size: int) -> None:
    with pytest.raises(ConfigError) as error:
        scheme_from_name(f"w4a16-g{group_size}")
    message = str(error.value)
    assert message.startswith(f"scheme 'w4a16-g{group_size}': key weights.group_size:")
    assert "32, 64, 128 or 256" in message
    assert message.endswith(f"got {group_size}")


FORM = r"w\d{1,3}a\d{1,3}(kv\d)?(-g\d{1,5})?(-ag\d{1,5})?"


@given(st.text(max_size=20) | st.from_regex(FORM))
def test_any_scheme_name_is_canonical_or_refused(name: str) -> None:
    try:
        scheme = scheme_from_name(name)
    except ConfigError:
        return
    assert scheme.name == name
