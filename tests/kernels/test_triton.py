# SPDX-License-Identifier: Apache-2.0
"""Starts the tests of ``triton/``, each file in a process with Triton's interpreter."""

import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent / "triton"
FILES = sorted(path.name for path in FOLDER.glob("test_*.py"))

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed"
)


def run(file: str, marker: str) -> None:
    # A run of its own; to write a report is for the one that waits for it.
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
    # The interpreter runs one program after the other: a thread is enough.
    environment |= {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [
            *(sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"),
            *("--import-mode=importlib", "-m", marker, str(FOLDER / file)),
        ],
        capture_output=True,
        text=True,
        timeout=3600,
        cwd=Path(__file__).parents[2],
        env=environment,
    )
    # 5: the file has no test with this marker.
    assert result.returncode in (0, 5), result.stdout[-8000:] + result.stderr[-2000:]
    assert "passed" in result.stdout or result.returncode == 5, result.stdout


@pytest.fixture(scope="module")
def finished(request: pytest.FixtureRequest) -> Iterator[Callable[[str, str], None]]:
    """Waits for a file; the selected ones run side by side, large ones first."""
    selected = {
        (item.callspec.params["file"], item.callspec.params["marker"])
        for item in request.session.items
        if item.path == Path(__file__)
    }
    order = sorted(selected, key=lambda one: -(FOLDER / one[0]).stat().st_size)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        runs = {one: pool.submit(run, *one) for one in order}
        yield lambda *one: runs[one].result()
        # Those that nobody waits for: the session was stopped.
        pool.shutdown(wait=False, cancel_futures=True)


@pytest.mark.parametrize(
    "marker", ["not slow", pytest.param("slow", marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("file", FILES)
def test_interpreted(
    file: str, marker: str, finished: Callable[[str, str], None]
) -> None:
    finished(file, marker)
