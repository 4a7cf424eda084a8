# SPDX-License-Identifier: Apache-2.0
"""A small, strict YAML: plain values, and a line number for every key and error."""

import re
from typing import Any

import yaml

from ..errors import ConfigError
from ..schema import dotted, shorten

MAX_DEPTH = 16
_SURROGATE = re.compile("[\ud800-\udfff]")
_TAG = "tag:yaml.org,2002:"
KeyPath = tuple[str, ...]


class _Loader(yaml.SafeLoader):
    """Safe YAML without anchors, tags and deep nesting, and the scalars of YAML 1.2.

    YAML 1.1 would make ``no`` a boolean, ``010`` eight, ``1:30`` ninety and ``1e-3`` a
    string.
    """

    yaml_implicit_resolvers: dict[str, Any] = {}
    depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        event = self.peek_event()
        if event.anchor is not None:
            raise _problem(event, "anchors and aliases are not supported")
        if event.tag is not None:
            raise _problem(event, f"the tag {shorten(event.tag)} is not supported")
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise _problem(event, f"nested more than {MAX_DEPTH} deep")
        node = super().compose_node(parent, index)
        if isinstance(node, yaml.ScalarNode) and _SURROGATE.search(node.value):
            raise _problem(event, f"{shorten(node.value)} is not text")
        self.depth -= 1
        return node


for _type, _pattern, _first in (
    ("null", r"null|Null|NULL|~|", ["n", "N", "~", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?[0-9]{1,30}", list("-+0123456789")),
    (
        "float",
        r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]{1,5})?",
        list("-+.0123456789"),
    ),
):
    _Loader.add_implicit_resolver(
        _TAG + _type, re.compile(rf"(?:{_pattern})\Z"), _first
    )


def _problem(place: Any, problem: str) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(problem=problem, problem_mark=place.start_mark)


def parse_mapping(
    data: bytes, source: str
) -> tuple[dict[str, Any], dict[KeyPath, int]]:
    """A document that is one mapping, and the line of each of its keys.

    Args:
        data: UTF-8 text.
        source: file named in errors.

    Returns:
        Mappings, lists, strings, numbers, booleans and None; and, by the path of
        keys, lines counted from 1.

    Raises:
        ConfigError: as ``SOURCE:LINE: problem``.
    """
    node = _compose(_decode(data, source), source)
    lines: dict[KeyPath, int] = {}
    if node is None:
        raise ConfigError(f"{source}:1: the file is empty")
    try:
        if not isinstance(node, yaml.MappingNode):
            kind = "a list" if isinstance(node, yaml.SequenceNode) else "one value"
            raise _problem(node, f"the file must hold keys and values, not {kind}")
        return _plain(node, (), lines), lines
    except yaml.MarkedYAMLError as error:
        raise _located(error, source) from None


def _decode(data: bytes, source: str) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        byte = data[error.start]
        raise ConfigError(
            f"{source}:{line}: not UTF-8 text, found byte 0x{byte:02x}"
        ) from None


def _compose(text: str, source: str) -> Any:
    try:
        loader = _Loader(text)
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        character = shorten(text[error.position])
        raise ConfigError(
            f"{source}:{line}: the character {character} is not allowed in YAML"
        ) from None
    try:
        return loader.get_single_node()
    except yaml.MarkedYAMLError as error:
        raise _located(error, source) from None
    except (ValueError, OverflowError) as error:
        # PyYAML converts escapes such as "\\UFFFFFFFF" without a check of their range.
        raise ConfigError(
            f"{source}:{loader.line + 1}: not YAML: {shorten(str(error))}"
        ) from None


def _located(error: yaml.MarkedYAMLError, source: str) -> ConfigError:
    mark = error.problem_mark or error.context_mark
    problem = ", ".join(part for part in (error.context, error.problem) if part)
    return ConfigError(f"{source}:{mark.line + 1}: {problem}")


def _plain(node: Any, path: KeyPath, lines: dict[KeyPath, int]) -> Any:
    if isinstance(node, yaml.SequenceNode):
        return [_plain(item, (*path, "[]"), lines) for item in node.value]
    if isinstance(node, yaml.MappingNode):
        return _mapping(node, path, lines)
    kind = node.tag.removeprefix(_TAG)
    if kind == "null":
        return None
    if kind == "bool":
        return node.value.lower() == "true"
    return {"int": int, "float": float}.get(kind, str)(node.value)


def _mapping(node: Any, path: KeyPath, lines: dict[KeyPath, int]) -> dict[str, Any]:
    data: dict[str, Any] = {}
    for key_node, value_node in node.value:
        if not isinstance(key_node, yaml.ScalarNode):
            raise _problem(key_node, "a key must be a word, not a list or a mapping")
        key, line = key_node.value, key_node.start_mark.line + 1
        here = (*path, key)
        if key in data:
            raise _problem(
                key_node,
                f"key {dotted(here)} is there twice, first on line {lines[here]}",
            )
        lines[here] = line
        data[key] = _plain(value_node, here, lines)
    return data
