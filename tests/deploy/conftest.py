# SPDX-License-Identifier: Apache-2.0
"""Programs of other packages, and one `vllm serve` that these tests share."""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest

ROOT = Path(__file__).parents[2]
MODEL = ROOT / "models" / "ref-7m"
NAME = "ref-7m"
READY_SECONDS = 600  # on a machine that does much else


def _program(name: str, package: str) -> str:
    path = os.pathsep.join((os.environ["PATH"], "/usr/sbin"))
    found = shutil.which(name, path=path)
    if found is None:
        message = f"{name} is not installed (Debian: apt-get install {package})"
        if os.environ.get("CI"):
            pytest.fail(message)
        pytest.skip(message)
    return found


@pytest.fixture(scope="session")
def program() -> Callable[[str, str], str]:
    """``program(name, debian_package)``: its path, else the test is skipped.

    With CI set in the environment it fails instead.
    """
    return _program


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="session")
def free_port() -> Callable[[], int]:
    """A port of 127.0.0.1 that nothing listens on."""
    return _free_port


@contextlib.contextmanager
def _process(command: list[Any], log: Path, **kwargs: Any) -> Iterator[Any]:
    with log.open("w") as out:
        process = subprocess.Popen(
            [str(word) for word in command],
            stdout=out,
            stderr=out,
            process_group=0,
            **kwargs,
        )
    try:
        yield process
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


@pytest.fixture(scope="session")
def running() -> Any:
    """``running(command, log, **kwargs)``: context manager of a process."""
    return _process


def _wait(process: Any, url: str, log: Path, seconds: float = READY_SECONDS) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        assert process.poll() is None, log.read_text()[-4000:]
        with contextlib.suppress(httpx.TransportError):
            if httpx.get(url, timeout=5).status_code == 200:
                return
        time.sleep(0.2)
    raise AssertionError(f"{url} not ready in {seconds} s: {log.read_text()[-4000:]}")


@pytest.fixture(scope="session")
def wait_for() -> Callable[..., None]:
    """``wait_for(process, url, log, seconds)``: until it answers 200."""
    return _wait


@contextlib.contextmanager
def _vllm(log: Path, *options: Any) -> Iterator[SimpleNamespace]:
    port = _free_port()
    command = [
        Path(sys.executable).parent / "vllm",
        *("serve", MODEL, "--quantization", "lowbit", "--served-model-name", NAME),
        *("--host", "127.0.0.1", "--port", port, "--enforce-eager"),
        *("--kv-cache-memory-bytes", 64 << 20, "--max-model-len", 1024, *options),
    ]
    environment = {**os.environ, "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    with _process(command, log, env=environment) as process:
        url = f"http://127.0.0.1:{port}"
        _wait(process, f"{url}/health", log)
        yield SimpleNamespace(url=url, port=port, log=log, name=NAME, pid=process.pid)


@pytest.fixture(scope="session")
def vllm_serve() -> Any:
    """``vllm_serve(log, *options)``: context manager of a server of ref-7m."""
    return _vllm


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SimpleNamespace]:
    """A server of ref-7m with two API processes; ``url``, ``port``, ``name``."""
    log = tmp_path_factory.mktemp("server") / "log"
    with _vllm(log, "--api-server-count", "2") as found:
        yield found
