# SPDX-License-Identifier: Apache-2.0
"""Every command of deploy/README.md, as written, but those it says were not run."""

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

pytestmark = [pytest.mark.live, pytest.mark.slow]
ROOT = Path(__file__).parents[2]
README = ROOT / "deploy" / "README.md"
DEMO = Path("/tmp/lowbit-demo")
URL = "http://127.0.0.1:8000"
SERVERS = ("make serve", "serve run ")


def commands() -> dict[str, list[str]]:
    """Commands of each section; comments are left to the shell."""
    found: dict[str, list[str]] = {}
    section, run = "", True
    for block in README.read_text().split("\n\n"):
        if block.startswith("#"):
            section, run = block.removeprefix("## "), True
        elif not block.startswith("    "):
            run = "*not run*" not in block.lower()
        elif run:
            text = re.sub(r"\\\n\s*", "", re.sub("^    ", "", block, flags=re.M))
            found.setdefault(section, []).extend(text.splitlines())
    return found


def shell(command: str, background: bool) -> subprocess.Popen[str]:
    path = f"{Path(sys.executable).parent}:/usr/sbin:{os.environ['PATH']}"
    return subprocess.Popen(
        ["bash", "-c", command],
        # Nobody reads what a server says: a pipe would fill up and stop it.
        stdout=None if background else subprocess.PIPE,
        stderr=None if background else subprocess.STDOUT,
        text=True,
        cwd=ROOT,
        env={**os.environ, "PATH": path, "RAY_USAGE_STATS_ENABLED": "0"},
        process_group=0,
    )


@contextlib.contextmanager
def section() -> Iterator[list[subprocess.Popen[str]]]:
    """Servers that are stopped at the end."""
    started: list[subprocess.Popen[str]] = []
    try:
        yield started
    finally:
        for process in reversed(started):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=60)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


def run(lines: list[str], started: list[subprocess.Popen[str]]) -> None:
    for line in lines:
        print(f"$ {line}", flush=True)
        server = line.startswith(SERVERS)
        process = shell(line.removesuffix("&"), server or line.endswith("&"))
        if server:
            started.append(process)
            wait(process)
        elif line.endswith("&"):
            started.append(process)
            time.sleep(20)  # a scrape of Prometheus
            assert process.poll() is None
        else:
            output, _ = process.communicate(timeout=1800)
            print(output)
            assert process.returncode == 0, line
            if line.startswith("curl"):
                assert (
                    output and '"error"' not in output and '"result":[]' not in output
                )


def wait(process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 900
    while time.monotonic() < deadline:
        assert process.poll() is None
        with contextlib.suppress(httpx.TransportError):
            if httpx.get(f"{URL}/v1/models", timeout=10).status_code == 200:
                return
        time.sleep(1)
    raise AssertionError("no server")


@pytest.fixture(autouse=True)
def demo() -> Iterator[None]:
    assert not DEMO.exists(), f"{DEMO} is in the way"
    DEMO.mkdir(mode=0o700)
    yield
    subprocess.run(["rm", "-r", DEMO], check=True)


def test_all_sections_are_run() -> None:
    assert [*commands()] == [
        "One machine",
        "Front door",
        "Metrics, rules, dashboard",
        "Images",
        "Ray Serve",
    ]


def test_one_machine() -> None:
    blocks = commands()
    with section() as started:
        for name in ("One machine", "Front door", "Metrics, rules, dashboard"):
            run(blocks[name], started)


def test_ray_serve() -> None:
    pytest.importorskip("ray", reason="extra `ray`")
    with section() as started:
        run(commands()["Ray Serve"], started)


def test_images() -> None:
    with section() as started:
        run(commands()["Images"], started)
