# SPDX-License-Identifier: Apache-2.0
"""Documents of every kind: they round-trip, or one short message refuses them."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from vllm_lowbit.errors import ConfigError
from vllm_lowbit.schema import LoadTimeOptions

from .documents import PARSERS

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.text(max_size=10), inner, max_size=3)
    ),
    max_leaves=8,
)


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
