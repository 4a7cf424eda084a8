# SPDX-License-Identifier: Apache-2.0
"""Idle threads of CPU workers: what is set, and what a user has chosen is left."""

import logging
import os

import pytest

from vllm_lowbit.threads import CHOICES, SPIN_COUNT, TURNS, let_idle_threads_sleep


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in CHOICES:
        # First set, so that what a test sets is undone as well.
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)


def test_set_and_said_once(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="vllm_lowbit"):
        let_idle_threads_sleep()
        let_idle_threads_sleep()
    assert os.environ[SPIN_COUNT] == TURNS
    (record,) = caplog.records
    assert SPIN_COUNT in record.getMessage()


@pytest.mark.parametrize("name", CHOICES)
def test_a_choice_is_left(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "7")
    let_idle_threads_sleep()
    assert {key: os.environ.get(key) for key in CHOICES if key in os.environ} == {
        name: "7"
    }


def test_a_config_on_a_cpu_sets_it(engine_config: object) -> None:
    pytest.importorskip("vllm")
    assert callable(engine_config)
    engine_config()
    assert os.environ[SPIN_COUNT] == TURNS
