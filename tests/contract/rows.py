# SPDX-License-Identifier: Apache-2.0
"""Registers the assertions of rows of the ledger, and what several of them need."""

import inspect
from collections.abc import Callable
from typing import Any

CONTRACT: dict[str, Callable[[Any, Any], None]] = {}


def holds(symbol: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Registers the assertion of a row, named by the last part of its symbol."""

    def register(assertion: Callable[..., None]) -> Callable[..., None]:
        CONTRACT[symbol] = assertion
        return assertion

    return register


def members(value: Any, names: set[str]) -> None:
    for name in names:
        assert hasattr(value, name), f"{type(value).__name__} has no {name}"


def parameters(function: Any) -> list[str]:
    return [name for name in inspect.signature(function).parameters if name != "self"]
