# SPDX-License-Identifier: Apache-2.0
"""What a probe says of a server that answers, refuses, hangs or is busy."""

import http.server
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

GOOD = {"usage": {"completion_tokens": 1}}


class Stub(http.server.BaseHTTPRequestHandler):
    """``server.answer`` to a completion: JSON, a status or None for silence."""

    def do_POST(self) -> None:
        self.server.keys.append(self.headers["Authorization"])  # type: ignore[attr-defined]
        self.rfile.read(int(self.headers["Content-Length"]))
        answer = self.server.answer  # type: ignore[attr-defined]
        if answer is None:
            self.server.leave.wait(30)  # type: ignore[attr-defined]
        elif isinstance(answer, int):
            self._send(answer, b"no")
        elif isinstance(answer, bytes):
            self._send(200, answer)
        else:
            self._send(200, json.dumps(answer).encode())

    def do_GET(self) -> None:
        server: Any = self.server
        server.tokens += server.step
        text = (
            "# TYPE vllm:generation_tokens_total counter\n"
            f'vllm:generation_tokens_total{{engine="0"}} {server.tokens}\n'
            'vllm:prompt_tokens_total{engine="0"} 7.0\n'
        )
        self._send(200 if server.metrics else 404, text.encode())

    def _send(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args: object) -> None:
        """Not on the tests' output."""


@pytest.fixture
def stub() -> Iterator[Any]:
    server: Any = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Stub)
    server.answer, server.tokens, server.step, server.metrics = GOOD, 5.0, 0, True
    server.keys, server.leave = [], threading.Event()
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.leave.set()
    server.shutdown()


def probe(
    question: str, url: str, seconds: float = 1, **environment: str
) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "vllm_lowbit.deploy.probe", question]
    return subprocess.run(
        [*command, f"--url={url}", f"--seconds={seconds}"],
        capture_output=True,
        text=True,
        timeout=60,
        cwd="/",
        env={**os.environ, **environment},
    )


def answers(stub: Any, **environment: str) -> dict[str, bool]:
    url = f"http://127.0.0.1:{stub.server_port}"
    return {q: probe(q, url, **environment).returncode == 0 for q in ("ready", "live")}


def test_good(stub: Any) -> None:
    assert answers(stub, VLLM_API_KEY="secret") == {"ready": True, "live": True}
    assert stub.keys == ["Bearer secret"] * 2


@pytest.mark.parametrize(
    "answer", [500, 503, 404, b"{", {}, {"usage": {"completion_tokens": 0}}, [], b"3"]
)
def test_no_token(stub: Any, answer: Any) -> None:
    """A green /health would have passed all of these."""
    stub.answer = answer
    assert answers(stub) == {"ready": False, "live": False}


def test_silence(stub: Any) -> None:
    stub.answer = None
    assert answers(stub) == {"ready": False, "live": False}
    stub.metrics = False
    assert answers(stub) == {"ready": False, "live": False}


def test_busy_is_not_dead(stub: Any) -> None:
    stub.answer, stub.step = None, 3
    assert answers(stub) == {"ready": False, "live": True}


def test_nobody_listens(free_port: Any) -> None:
    for question in ("ready", "live"):
        result = probe(question, f"http://127.0.0.1:{free_port()}")
        assert result.returncode == 1
        assert "Connection refused" in result.stderr
        assert "Traceback" not in result.stderr


def test_starts_without_frameworks() -> None:
    code = (
        "import sys, vllm_lowbit.deploy.probe\n"
        "print({'torch', 'vllm', 'pydantic', 'numpy'} & set(sys.modules))"
    )
    found = subprocess.check_output([sys.executable, "-c", code], cwd="/", text=True)
    assert found.strip() == "set()"


@pytest.mark.live
def test_a_stopped_engine_is_found(server: SimpleNamespace) -> None:
    """/health cannot tell a server whose engine stands still from a good one."""
    import httpx

    children = psutil.Process(server.pid).children(recursive=True)
    (engine,) = [c for c in children if "EngineCore" in " ".join(c.cmdline())]
    assert probe("ready", server.url, 60).returncode == 0
    assert probe("live", server.url, 60).returncode == 0
    engine.send_signal(signal.SIGSTOP)
    try:
        assert httpx.get(f"{server.url}/health", timeout=10).status_code == 200
        for question in ("ready", "live"):
            start = time.monotonic()
            result = probe(question, server.url, 2)
            assert result.returncode == 1 and "timed out" in result.stderr
            assert time.monotonic() - start < 15
    finally:
        engine.send_signal(signal.SIGCONT)
    assert probe("ready", server.url, 60).returncode == 0
