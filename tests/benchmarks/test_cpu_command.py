# SPDX-License-Identifier: Apache-2.0
"""The command line of the CPU benchmark."""

from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest


@pytest.fixture(scope="module")
def parser(benchmark_module: Callable[[str], ModuleType]) -> Any:
    return benchmark_module("cpu.__main__")._parser()


@pytest.mark.parametrize("parts", [[], ["serve"], ["linear", "report"]])
def test_parts(parser: Any, parts: list[str]) -> None:
    assert parser.parse_args([*parts, "--again"]).parts == parts


def test_unknown_part(parser: Any, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parser.parse_args(["linears"])
    message = capsys.readouterr().err
    assert "linears is no part; parts are linear, attention" in message
