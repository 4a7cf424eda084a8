# SPDX-License-Identifier: Apache-2.0
"""Starts the tests of ``triton/``, each file in a process with Triton's interpreter."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent / "triton"
FILES = sorted(path.name for path in FOLDER.glob("test_*.py"))

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed"
)


def run(file: str, marker: str) -> None:
    result = subprocess.run(
        [
            *(sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"),
            *("--import-mode=importlib", "-m", marker, str(FOLDER / file)),
        ],
        capture_output=True,
        text=True,
        timeout=3600,
        cwd=Path(__file__).parents[2],
        env={**os.environ, "TRITON_INTERPRET": "1"},
    )
    # 5: the file has no test with this marker.
    assert result.returncode in (0, 5), result.stdout[-8000:] + result.stderr[-2000:]
    assert "passed" in result.stdout or result.returncode == 5, result.stdout


@pytest.mark.parametrize("file", FILES)
def test_interpreted(file: str) -> None:
    run(file, "not slow")


@pytest.mark.slow
@pytest.mark.parametrize("file", FILES)
def test_interpreted_in_full(file: str) -> None:
    run(file, "slow")
