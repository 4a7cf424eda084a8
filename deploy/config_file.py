# SPDX-License-Identifier: Apache-2.0
"""YAML files that people edit: strict, and every error names its line and key."""

import difflib
import typing
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from ..calibrate.files import read_bytes
from ..calibrate.strict_yaml import KeyPath, parse_mapping
from ..errors import ConfigError
from ..schema import StrictModel, dotted, shorten

MAX_BYTES = 1 << 16
_Model = TypeVar("_Model", bound=StrictModel)


def read_config(path: Path, model: type[_Model]) -> _Model:
    """Read and validate a file.

    Raises:
        ConfigError: as ``FILE:LINE: problem``, naming the key, what it was and what is
            supported; or that the file cannot be read.
    """
    mapping, lines = parse_mapping(read_bytes(path, MAX_BYTES), str(path))
    try:
        return model.model_validate(mapping)
    except ValidationError as error:
        # A list counts as too short without its items that are wrong themselves.
        errors = [
            e for e in error.errors() if e["type"] != "too_short" or not e["input"]
        ]
        located = sorted(_located(e, lines, model) for e in errors)
        problems = [f"{path}:{line}: {problem}" for line, problem in located[:8]]
        raise ConfigError("; ".join(problems)) from None


def _located(
    details: ErrorDetails, lines: dict[KeyPath, int], model: type[BaseModel]
) -> tuple[int, str]:
    path = tuple("[]" if isinstance(p, int) else p for p in details["loc"])
    # A missing key, or a check of the whole, has no line of its own.
    known = path
    while known and known not in lines:
        known = known[:-1]
    line, name = lines.get(known, 1), f"key {_name(details['loc'])}"
    if details["type"] == "extra_forbidden":
        return line, f"{name} does not exist; {_known(path, model)}"
    if details["type"] == "missing":
        return line, f"{name} is missing"
    message = details["msg"].removeprefix("Value error, ")
    if details["type"] == "model_type":
        message = "must hold keys and values"
    if not path:
        return line, message
    return line, f"{name}: {message}, got {shorten(details['input'])}"


def _name(path: tuple[int | str, ...]) -> str:
    """``routes[0].path``."""
    parts = (f"[{p}]" if isinstance(p, int) else f".{dotted((p,))}" for p in path)
    return "".join(parts).removeprefix(".")


def _known(path: KeyPath, model: type[BaseModel]) -> str:
    here: Any = model
    for key in path[:-1]:
        field = here.model_fields.get(key)
        # Items of lists and keys of a mapping stand for the model they hold.
        here = here if field is None else _model_of(field.annotation)
    names = list(here.model_fields)
    close = difflib.get_close_matches(path[-1], names, n=1)
    hint = f"did you mean {close[0]}? " if close else ""
    return f"{hint}known: {', '.join(names)}"


def _model_of(annotation: Any) -> Any:
    """The model inside ``X``, ``X | None``, ``tuple[X, ...]`` or ``dict[str, X]``."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    found = (_model_of(argument) for argument in typing.get_args(annotation))
    return next((model for model in found if model is not None), None)
