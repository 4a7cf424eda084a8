# SPDX-License-Identifier: Apache-2.0
"""A real nginx in front of a stub that records what reaches it."""

import contextlib
import http.server
import json
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from vllm_lowbit.deploy.front_door import FrontDoor, read_keys, render

ALICE = "alice-0123456789-ABCDEFGHIJ"
BOB = "bob_9876543210_abcdefghijk"
POST = "/v1/completions"
LIMITS = {"body_bytes": 4096, "header_seconds": 1, "body_seconds": 1, "send_seconds": 1}


@dataclass(frozen=True)
class Door:
    """A front door that runs, with the keys it knows."""

    url: str
    port: int
    access_log: Path
    conf: Path
    alice: str = ALICE
    bob: str = BOB

    @property
    def head(self) -> str:
        """Of a request for a completion; more headers may follow."""
        return f"POST {POST} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {ALICE}\r\n"

    def bearer(self, key: str = ALICE) -> dict[str, str]:
        return {"Authorization": f"Bearer {key}"}

    def post(self, key: str = ALICE, **kwargs: Any) -> httpx.Response:
        """A completion."""
        if "content" not in kwargs:
            kwargs.setdefault("json", {"prompt": "x"})
        url, headers = self.url + POST, self.bearer(key)
        return httpx.post(url, headers=headers, timeout=30, **kwargs)

    def raw(self, data: bytes, seconds: float = 10) -> bytes:
        """What comes back until the server closes or resets the connection."""
        found = b""
        address = ("127.0.0.1", self.port)
        with socket.create_connection(address, timeout=seconds) as sock:
            sock.sendall(data)
            with contextlib.suppress(ConnectionResetError):
                while part := sock.recv(65536):
                    found += part
        return found

    @staticmethod
    def refused(response: httpx.Response, status: int) -> None:
        """In the form OpenAI's clients read."""
        assert response.status_code == status, response.text
        assert response.headers["Content-Type"] == "application/json"
        error = response.json()["error"]
        assert error["code"] == status and error["message"] and error["type"]
        assert "nginx/" not in response.headers["Server"]


class Stub(http.server.BaseHTTPRequestHandler):
    """Does what the body asks: wait, stream, fill or die."""

    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.server.seen.append((self.command, self.path, dict(self.headers), body))  # type: ignore[attr-defined]
        order = json.loads(body) if body[:1] == b"{" else {}
        if "die" in order:
            self.close_connection = True
            self.connection.close()
            return
        time.sleep(order.get("wait", 0))
        self.send_response(200)
        if "stream" in order or "fill" in order:
            self.send_header("Connection", "close")
            self.close_connection = True
            self.end_headers()
            for _ in range(order.get("stream", 0)):
                self.wfile.write(b"data: x\n\n")
                time.sleep(0.3)
            try:
                for _ in range(order.get("fill", 0) >> 16):
                    self.wfile.write(bytes(1 << 16))
            except OSError:
                self.server.cut.set()  # type: ignore[attr-defined]
            return
        answer = b'{"ok":true}'
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(answer)

    do_GET = do_HEAD = do_PUT = do_DELETE = do_OPTIONS = do_POST

    def log_message(self, *args: object) -> None:
        """Not on the tests' output."""


@pytest.fixture(scope="module")
def stub() -> Iterator[Any]:
    server: Any = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Stub)
    server.seen, server.cut = [], threading.Event()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()


@pytest.fixture
def seen(stub: Any) -> list[tuple[str, str, dict[str, str], bytes]]:
    """Requests that reached the stub during one test."""
    stub.seen.clear()
    stub.cut.clear()
    return stub.seen


@pytest.fixture(scope="module")
def start(
    program: Any,
    running: Any,
    free_port: Callable[[], int],
    tmp_path_factory: pytest.TempPathFactory,
) -> Any:
    """``start(upstream_ports, **config)``: context manager of an nginx."""
    nginx = program("nginx", "nginx")

    @contextlib.contextmanager
    def door(ports: list[int], **config: Any) -> Iterator[Door]:
        directory = tmp_path_factory.mktemp("door")
        keys = directory / "keys.txt"
        keys.write_text(f"# clients\nalice {ALICE}\nbob {BOB}\n")
        keys.chmod(0o600)
        port = free_port()
        settings = FrontDoor.model_validate(
            {
                "listen": f"127.0.0.1:{port}",
                "upstreams": [f"127.0.0.1:{upstream}" for upstream in ports],
                "keys_file": str(keys),
                "runtime_dir": str(directory / "run"),
                "access_log": str(directory / "access.log"),
                "limits": LIMITS,
                **config,
            }
        )
        path = render(settings, read_keys(keys), directory / "conf")
        subprocess.run([nginx, "-t", "-c", path], check=True, capture_output=True)
        with running([nginx, "-c", path], directory / "log") as process:
            deadline = time.monotonic() + 20
            while time.monotonic() < deadline:
                assert process.poll() is None, (directory / "log").read_text()
                with socket.socket() as probe:
                    if not probe.connect_ex(("127.0.0.1", port)):
                        break
                time.sleep(0.05)
            scheme = "https" if settings.tls else "http"
            url = f"{scheme}://127.0.0.1:{port}"
            yield Door(url, port, directory / "access.log", directory / "conf")

    return door


@pytest.fixture(scope="module")
def door(start: Any, stub: Any) -> Iterator[Door]:
    with start([stub.server_port]) as found:
        yield found
