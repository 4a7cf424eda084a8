# SPDX-License-Identifier: Apache-2.0
"""A real nginx in front of a stub that records what reaches it."""

import contextlib
import http.server
import json
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_lowbit.deploy.front_door import ROUTES, FrontDoor, read_keys, render

ALICE = "alice-0123456789-ABCDEFGHIJ"
BOB = "bob_9876543210_abcdefghijk"
LIMITS = {"body_bytes": 4096, "header_seconds": 1, "body_seconds": 1, "send_seconds": 1}
POST = "/v1/completions"


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
    def door(ports: list[int], **config: Any) -> Iterator[SimpleNamespace]:
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
            yield SimpleNamespace(
                url=f"{scheme}://127.0.0.1:{port}",
                port=port,
                access_log=directory / "access.log",
                conf=directory / "conf",
            )

    return door


@pytest.fixture(scope="module")
def door(start: Any, stub: Any) -> Iterator[SimpleNamespace]:
    with start([stub.server_port]) as found:
        yield found


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


def post(door: SimpleNamespace, key: str = ALICE, **kwargs: Any) -> httpx.Response:
    kwargs.setdefault("json", {"prompt": "x"})
    return httpx.post(door.url + POST, headers=bearer(key), timeout=30, **kwargs)


def raw(door: SimpleNamespace, data: bytes, seconds: float = 10) -> bytes:
    """What comes back until the server closes or resets the connection."""
    found = b""
    with socket.create_connection(("127.0.0.1", door.port), timeout=seconds) as sock:
        sock.sendall(data)
        with contextlib.suppress(ConnectionResetError):
            while part := sock.recv(65536):
                found += part
    return found


def refused(response: httpx.Response, status: int) -> None:
    """In the form OpenAI's clients read."""
    assert response.status_code == status, response.text
    assert response.headers["Content-Type"] == "application/json"
    error = response.json()["error"]
    assert error["code"] == status and error["message"] and error["type"]
    assert "nginx/" not in response.headers["Server"]


def test_a_request_goes_through(door: SimpleNamespace, seen: list[Any]) -> None:
    body = {"prompt": "x" * 3000}
    answer = post(door, json=body, params={"a": "b"})
    assert answer.json() == {"ok": True}
    ((command, path, headers, received),) = seen
    assert (command, path) == ("POST", POST + "?a=b")
    assert json.loads(received) == body
    # vLLM never sees the key.
    assert "Authorization" not in headers and ALICE not in str(headers)
    assert headers["X-Request-Id"]


def test_log_names_the_client_and_no_key(
    door: SimpleNamespace, seen: list[Any]
) -> None:
    post(door, BOB, params={"key": "in-the-arguments"})
    post(door, "wrong")
    time.sleep(0.2)
    text = door.access_log.read_text()
    good, bad = [json.loads(line) for line in text.splitlines()[-2:]]
    assert (good["client"], good["status"], good["path"]) == ("bob", 200, POST)
    assert (bad["client"], bad["status"]) == ("", 401)
    assert BOB not in text and "in-the-arguments" not in text


@pytest.mark.parametrize(
    "header",
    [
        None,
        "",
        "Bearer",
        "Bearer wrong-0123456789-ABCDEFGHIJ",
        f"Bearer {ALICE.lower()}",
        f"Bearer {ALICE}x",
        f"Bearer x{ALICE}",
        f"Bearer {ALICE[:-1]}",
        f"Bearer {ALICE} {BOB}",
        f"Basic {ALICE}",
        ALICE,
    ],
)
def test_wrong_key(door: SimpleNamespace, seen: list[Any], header: str | None) -> None:
    headers = {} if header is None else {"Authorization": header}
    for route in ROUTES:
        answer = httpx.request(
            route.method, door.url + route.path, headers=headers, timeout=30
        )
        refused(answer, 401)
    assert not seen


def test_health_needs_no_key(door: SimpleNamespace, seen: list[Any]) -> None:
    assert httpx.get(f"{door.url}/health").status_code == 200
    assert httpx.head(f"{door.url}/health").status_code == 200
    refused(httpx.post(f"{door.url}/health"), 405)
    assert [path for _, path, *_ in seen] == ["/health"] * 2


UNLISTED = [
    "/",
    "/metrics",
    "/metrics/",
    "//metrics",
    "/./metrics",
    "/%2e/metrics",
    "/%6Detrics",
    "/METRICS",
    "/v1/../metrics",
    "//v1/../metrics",
    "/v1/%2e%2e/metrics",
    "/v1/.%2e/metrics",
    "/v1%2f..%2fmetrics",
    "/v1/models/../../metrics",
    "/v1/completions/../../metrics",
    "/health/../metrics",
    "/v1/models%3f/../../metrics",
    "/v1/models/",
    "/v1/models;a=b",
    "/v1/models%00",
    "/v1/models%20",
    "/v1/models\\..\\metrics",
    "/v1/MODELS",
    "/v1/models/ref-7m",
    "/../metrics",
    "/v1/../../metrics",
    "http://127.0.0.1/metrics",
    "/tokenize",
    "/version",
    "/docs",
    "/openapi.json",
    "/server_info",
    "/collective_rpc",
    "/v1/load_lora_adapter",
    "/v1/embeddings",
    "*",
    "metrics",
]


@pytest.mark.parametrize("method", ["GET", "POST"])
@pytest.mark.parametrize("path", UNLISTED)
def test_unlisted_route(
    door: SimpleNamespace, seen: list[Any], path: str, method: str
) -> None:
    request = (
        f"{method} {path} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {ALICE}\r\n"
        "Content-Length: 0\r\nConnection: close\r\n\r\n"
    )
    answer = raw(door, request.encode())
    assert answer.split()[1] in (b"400", b"404"), answer
    assert not seen


PIECES = ("/", "v1", "models", "completions", "chat", "metrics", "health", "tokenize")
TRICKS = ("..", ".", "%2e", "%2E", "%2f", "%5c", "%00", "%25", "%", "//", ";", "?", "#")


@given(st.lists(st.sampled_from(PIECES + TRICKS), max_size=10), st.booleans())
@settings(max_examples=300)
def test_only_canonical_listed_paths_arrive(
    door: SimpleNamespace, stub: Any, pieces: list[str], slashes: bool
) -> None:
    """Whatever is sent, what vLLM gets is one of the listed paths, spelled plainly."""
    stub.seen.clear()
    path = "/" + ("/" if slashes else "").join(pieces)
    for method in ("GET", "POST"):
        raw(
            door,
            f"{method} {path} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {ALICE}\r\n"
            "Content-Length: 0\r\nConnection: close\r\n\r\n".encode(),
        )
    listed = {("GET", "/health")} | {(r.method, r.path) for r in ROUTES}
    arrived = {(method, path.partition("?")[0]) for method, path, *_ in stub.seen}
    assert arrived <= listed


@pytest.mark.parametrize("path", ["//v1/models", "/v1/./models", "/%761/x/../models"])
def test_other_spellings_arrive_plainly(
    door: SimpleNamespace, seen: list[Any], path: str
) -> None:
    request = f"GET {path} HTTP/1.0\r\nAuthorization: Bearer {ALICE}\r\n\r\n"
    assert raw(door, request.encode()).split()[1] == b"200"
    assert [arrived for _, arrived, *_ in seen] == ["/v1/models"]


@pytest.mark.parametrize("method", ["GET", "HEAD", "PUT", "DELETE", "OPTIONS", "TRACE"])
def test_method(door: SimpleNamespace, seen: list[Any], method: str) -> None:
    answer = httpx.request(method, door.url + POST, headers=bearer(ALICE))
    assert answer.status_code == 405
    assert not seen


def test_oversized_body(door: SimpleNamespace, seen: list[Any]) -> None:
    assert post(door, content=bytes(4096)).status_code == 200
    seen.clear()
    refused(post(door, content=bytes(4097)), 413)

    def chunks() -> Iterator[bytes]:
        for _ in range(64):
            yield bytes(1024)

    with contextlib.suppress(httpx.WriteError):  # closed with the rest on its way
        refused(post(door, content=chunks()), 413)
    assert not seen


def test_a_huge_length_is_refused_unread(
    door: SimpleNamespace, seen: list[Any]
) -> None:
    request = (
        f"POST {POST} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {ALICE}\r\n"
        "Content-Length: 99999999999\r\n\r\n"
    )
    assert raw(door, request.encode()).split()[1] == b"413"
    assert not seen


HEAD = f"POST {POST} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {ALICE}\r\n"


@pytest.mark.parametrize(
    "sent",
    ["", HEAD, f"{HEAD}Content-Length: 100\r\n\r\nhalf"],
    ids=["nothing", "headers", "body"],
)
def test_slow_client(door: SimpleNamespace, seen: list[Any], sent: str) -> None:
    """Cut off after the second it is given, and vLLM hears nothing of it."""
    start = time.monotonic()
    answer = raw(door, sent.encode(), seconds=20)
    assert 0.9 < time.monotonic() - start < 15
    assert answer == b"" or answer.split()[1] == b"408"
    assert not seen


def test_headers_drop_by_drop(door: SimpleNamespace, seen: list[Any]) -> None:
    """The time is for all headers, not between two bytes."""
    start = time.monotonic()
    with socket.create_connection(("127.0.0.1", door.port), timeout=20) as sock:
        sock.sendall(f"POST {POST} HTTP/1.1\r\nX: ".encode())
        with pytest.raises(OSError):
            while time.monotonic() - start < 15:
                sock.sendall(b"x")
                time.sleep(0.2)
    assert time.monotonic() - start < 15
    assert not seen


def test_client_that_does_not_read(door: SimpleNamespace, stub: Any) -> None:
    stub.cut.clear()
    body = b'{"fill": 100000000}'
    head = (
        f"POST {POST} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {ALICE}\r\n"
        f"Content-Length: {len(body)}\r\n\r\n"
    )
    with socket.create_connection(("127.0.0.1", door.port)) as sock:
        sock.sendall(head.encode() + body)
        assert stub.cut.wait(20)


def test_tokens_are_not_held_back(door: SimpleNamespace) -> None:
    start, times = time.monotonic(), []
    with httpx.stream(
        "POST", door.url + POST, headers=bearer(ALICE), json={"stream": 4}, timeout=30
    ) as answer:
        for _ in answer.iter_raw():
            times.append(time.monotonic() - start)
    assert len(times) >= 3 and times[-1] - times[0] > 0.5


def test_leaving_client_ends_the_request(door: SimpleNamespace, stub: Any) -> None:
    stub.cut.clear()
    with httpx.stream(
        "POST", door.url + POST, headers=bearer(ALICE), json={"fill": 100_000_000}
    ) as answer:
        next(answer.iter_raw())
    assert stub.cut.wait(20)


def test_rate_per_key(start: Any, stub: Any, seen: list[Any]) -> None:
    with start(
        [stub.server_port], limits={"requests_per_minute": 6, "burst": 4}
    ) as door:
        codes = [post(door).status_code for _ in range(10)]
        assert codes == [200] * 5 + [429] * 5
        refused(post(door), 429)
        assert post(door, BOB).status_code == 200
    assert len(seen) == 6


def test_requests_in_flight_per_key(start: Any, stub: Any) -> None:
    from concurrent.futures import ThreadPoolExecutor

    with (
        start([stub.server_port], limits={"connections_per_key": 2}) as door,
        ThreadPoolExecutor(5) as pool,
    ):
        waits = list(pool.map(lambda _: post(door, json={"wait": 1}), range(5)))
        assert sorted(r.status_code for r in waits) == [200, 200, 429, 429, 429]
        assert post(door).status_code == 200


def test_engine_that_dies_is_not_asked_twice(
    start: Any, stub: Any, seen: list[Any]
) -> None:
    """Both addresses are the stub's: a second try would be seen there."""
    port = stub.server_port
    with start([port, port]) as door:
        refused(post(door, json={"die": 1}), 502)
        assert len(seen) == 1


def test_unreachable_engine(
    start: Any, stub: Any, free_port: Callable[[], int], seen: list[Any]
) -> None:
    with start([free_port(), stub.server_port]) as door:
        assert {post(door).status_code for _ in range(6)} == {200}
    with start([free_port()]) as door:
        refused(post(door), 502)
        refused(httpx.get(f"{door.url}/health"), 502)


def test_metrics_from_inside_only(
    start: Any, stub: Any, free_port: Callable[[], int], seen: list[Any]
) -> None:
    listen = f"127.0.0.1:{free_port()}"
    with start([stub.server_port], metrics={"listen": listen}):
        assert httpx.get(f"http://{listen}/metrics/0").status_code == 200
        assert [path for _, path, *_ in seen] == ["/metrics"]
        assert "Active connections" in httpx.get(f"http://{listen}/door").text
        assert httpx.get(f"http://{listen}/v1/models").status_code == 404
        assert httpx.get(f"http://{listen}/metrics/1").status_code == 404
    seen.clear()
    outside = {"listen": listen, "allow": ["10.0.0.0/8"]}
    with start([stub.server_port], metrics=outside):
        assert httpx.get(f"http://{listen}/metrics/0").status_code == 403
        assert httpx.get(f"http://{listen}/door").status_code == 403
        assert not seen


def test_tls(start: Any, stub: Any, program: Any, tmp_path: Path) -> None:
    certificate, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    subprocess.run(
        [
            program("openssl", "openssl"),
            *("req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1"),
            *("-subj", "/CN=127.0.0.1", "-addext", "subjectAltName=IP:127.0.0.1"),
            *("-keyout", key, "-out", certificate),
        ],
        check=True,
        capture_output=True,
    )
    tls = {"certificate": str(certificate), "key": str(key)}
    with start([stub.server_port], tls=tls) as door:
        trust = ssl.create_default_context(cafile=str(certificate))
        answer = httpx.post(
            door.url + POST, headers=bearer(ALICE), json={}, verify=trust
        )
        assert answer.status_code == 200


def test_keys_are_the_owners_alone(door: SimpleNamespace) -> None:
    modes = {path.name: path.stat().st_mode & 0o777 for path in door.conf.iterdir()}
    assert modes == {"nginx.conf": 0o600, "keys.conf": 0o600}
    assert ALICE not in (door.conf / "nginx.conf").read_text()
