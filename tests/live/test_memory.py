# SPDX-License-Identifier: Apache-2.0
"""Quantizing while loading never holds the float model."""

import importlib
import importlib.util
import json
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def _check(result: dict[str, float]) -> None:
    assert result["parameters"] >= 0.5e9
    allowed = result["quantized_model"] + result["two_largest_layers"]
    assert allowed < result["bf16_model"]
    assert result["model_peak"] <= allowed


def test_committed_peak() -> None:
    _check(json.loads((BENCHMARKS / "results" / "memory.json").read_text()))


@pytest.mark.slow
@pytest.mark.live
def test_peak() -> None:
    """Measures it again: about three minutes on two cores."""
    spec = importlib.util.spec_from_file_location(
        "benchmarks",
        BENCHMARKS / "__init__.py",
        submodule_search_locations=[str(BENCHMARKS)],
    )
    assert spec is not None and spec.loader is not None
    with pytest.MonkeyPatch.context() as patch:
        package = importlib.util.module_from_spec(spec)
        patch.setitem(sys.modules, "benchmarks", package)
        memory = importlib.import_module("benchmarks.memory")
        _check(memory.run())
