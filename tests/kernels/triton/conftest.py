# SPDX-License-Identifier: Apache-2.0
"""Tests of the Triton kernels in Triton's interpreter, in a process of their own.

Triton decides at its import whether kernels are interpreted, so these files are only
collected where TRITON_INTERPRET=1 is set: ``tests/kernels/test_triton.py`` starts them.
"""

import os
from collections.abc import Callable

import pytest

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
collect_ignore_glob = [] if INTERPRETED else ["test_*.py"]


@pytest.fixture(autouse=True)
def _poison(garbage_in_empty: None) -> None:
    """What a kernel does not write shows as NaN or an odd integer."""


@pytest.fixture
def many_processors(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Let a linear's module see a chip so wide that split-K takes all parts."""

    def widen(operator: str) -> None:
        path = f"vllm_lowbit.kernels.{operator}.triton.processors"
        monkeypatch.setattr(path, lambda device: 1 << 20)

    return widen
