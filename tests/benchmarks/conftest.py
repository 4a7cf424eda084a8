# SPDX-License-Identifier: Apache-2.0
"""The package of benchmarks, which is not installed."""

import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def benchmark_module() -> Iterator[Callable[[str], ModuleType]]:
    """``benchmark_module(name)``: a module of the package."""
    spec = importlib.util.spec_from_file_location(
        "benchmarks",
        BENCHMARKS / "__init__.py",
        submodule_search_locations=[str(BENCHMARKS)],
    )
    assert spec is not None and spec.loader is not None

    def load(name: str) -> ModuleType:
        return importlib.import_module(f"benchmarks.{name}")

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "benchmarks", importlib.util.module_from_spec(spec))
        yield load


@pytest.fixture(scope="module")
def methods(benchmark_module: Callable[[str], ModuleType]) -> Any:
    """``methods(name)``: a module of the table's package."""
    return lambda name: benchmark_module(f"methods.{name}")
