# SPDX-License-Identifier: Apache-2.0
"""A small model, and runs in this process."""

import contextlib
import json
from pathlib import Path
from typing import Any

import pytest

from vllm_lowbit.calibrate.processes import Ended
from vllm_lowbit.calibrate.sweep import one, run
from vllm_lowbit.errors import LowbitError


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, tiny_model: Any) -> Path:
    return tiny_model(tmp_path_factory.mktemp("model"), tokenizer=True)


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the runs; they are done in this process, which is quicker."""
    names: list[str] = []

    def work(job: run.Job, cores: list[int], running: Any) -> Ended:
        names.append(job.run.name)
        with contextlib.redirect_stdout(None):
            try:
                return Ended(0, json.loads(json.dumps(one.run(job.task))), "", 1.5)
            except LowbitError as error:
                return Ended(1, None, f"some words\nerror: {error}\n", 0.5)

    monkeypatch.setattr(run, "work", work)
    return names
