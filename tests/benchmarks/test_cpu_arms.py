# SPDX-License-Identifier: Apache-2.0
"""Arms of the CPU benchmark: what their engines are started with."""

from collections.abc import Callable
from dataclasses import replace
from types import ModuleType
from typing import Any

import pytest

from vllm_lowbit.threads import SPIN_COUNT


@pytest.fixture(scope="module")
def arms(benchmark_module: Callable[[str], ModuleType]) -> Any:
    return benchmark_module("cpu.arms")


def test_stock_arms_run_without_plugin_and_settings(arms: Any) -> None:
    for name in arms.STOCK:
        assert arms.ARMS[name].environment() == {"VLLM_PLUGINS": "none"}, name
    assert {*arms.STOCK, *arms.LOWBIT, arms.BF16_SLEEPING} == set(arms.ARMS)


def test_what_waiting_alone_gives_is_an_arm_of_its_own(arms: Any) -> None:
    sleeping = arms.ARMS[arms.BF16_SLEEPING]
    assert SPIN_COUNT in sleeping.environment()
    assert replace(sleeping, sleeping=False) == arms.ARMS[arms.BF16]
