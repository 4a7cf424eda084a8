# SPDX-License-Identifier: Apache-2.0
"""What a real nginx lets through to a stub, and to whom."""

import json
import ssl
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_lowbit.deploy.front_door import ROUTES

POST = "/v1/completions"


def test_a_request_goes_through(door: Any, seen: list[Any]) -> None:
    body = {"prompt": "x" * 3000}
    answer = door.post(json=body, params={"a": "b"})
    assert answer.json() == {"ok": True}
    ((command, path, headers, received),) = seen
    assert (command, path) == ("POST", POST + "?a=b")
    assert json.loads(received) == body
    # vLLM never sees the key.
    assert "Authorization" not in headers and door.alice not in str(headers)
    assert headers["X-Request-Id"]


def test_log_names_the_client_and_no_key(door: Any, seen: list[Any]) -> None:
    door.post(door.bob, params={"key": "in-the-arguments"})
    door.post("wrong")
    time.sleep(0.2)
    text = door.access_log.read_text()
    good, bad = [json.loads(line) for line in text.splitlines()[-2:]]
    assert (good["client"], good["status"], good["path"]) == ("bob", 200, POST)
    assert (bad["client"], bad["status"]) == ("", 401)
    assert door.bob not in text and "in-the-arguments" not in text


@pytest.mark.parametrize(
    "send",
    [
        lambda key: None,
        lambda key: "",
        lambda key: "Bearer",
        lambda key: "Bearer wrong-0123456789-ABCDEFGHIJ",
        lambda key: f"Bearer {key.lower()}",
        lambda key: f"Bearer {key}x",
        lambda key: f"Bearer x{key}",
        lambda key: f"Bearer {key[:-1]}",
        lambda key: f"Bearer {key} {key}",
        lambda key: f"Basic {key}",
        lambda key: key,
    ],
)
def test_wrong_key(door: Any, seen: list[Any], send: Any) -> None:
    header = send(door.alice)
    headers = {} if header is None else {"Authorization": header}
    for route in ROUTES:
        answer = httpx.request(
            route.method, door.url + route.path, headers=headers, timeout=30
        )
        door.refused(answer, 401)
    assert not seen


def test_health_needs_no_key(door: Any, seen: list[Any]) -> None:
    assert httpx.get(f"{door.url}/health").status_code == 200
    assert httpx.head(f"{door.url}/health").status_code == 200
    door.refused(httpx.post(f"{door.url}/health"), 405)
    assert [path for _, path, *_ in seen] == ["/health"] * 2


def plain(door: Any, method: str, path: str) -> bytes:
    """A request with a key and no body; clients would tidy up the path."""
    key = f"Authorization: Bearer {door.alice}\r\n"
    rest = "Content-Length: 0\r\nConnection: close\r\n\r\n"
    return f"{method} {path} HTTP/1.1\r\nHost: x\r\n{key}{rest}".encode()


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
def test_unlisted_route(door: Any, seen: list[Any], path: str, method: str) -> None:
    answer = door.raw(plain(door, method, path))
    assert answer.split()[1] in (b"400", b"404"), answer
    assert not seen


PIECES = ("/", "v1", "models", "completions", "chat", "metrics", "health", "tokenize")
TRICKS = ("..", ".", "%2e", "%2E", "%2f", "%5c", "%00", "%25", "%", "//", ";", "?", "#")


@given(st.lists(st.sampled_from(PIECES + TRICKS), max_size=10), st.booleans())
@settings(max_examples=300)
def test_only_canonical_listed_paths_arrive(
    door: Any, stub: Any, pieces: list[str], slashes: bool
) -> None:
    """Whatever is sent, what vLLM gets is one of the listed paths, spelled plainly."""
    stub.seen.clear()
    path = "/" + ("/" if slashes else "").join(pieces)
    for method in ("GET", "POST"):
        door.raw(plain(door, method, path))
    listed = {("GET", "/health")} | {(r.method, r.path) for r in ROUTES}
    arrived = {(method, path.partition("?")[0]) for method, path, *_ in stub.seen}
    assert arrived <= listed


@pytest.mark.parametrize("path", ["//v1/models", "/v1/./models", "/%761/x/../models"])
def test_other_spellings_arrive_plainly(door: Any, seen: list[Any], path: str) -> None:
    request = f"GET {path} HTTP/1.0\r\nAuthorization: Bearer {door.alice}\r\n\r\n"
    assert door.raw(request.encode()).split()[1] == b"200"
    assert [arrived for _, arrived, *_ in seen] == ["/v1/models"]


@pytest.mark.parametrize("method", ["GET", "HEAD", "PUT", "DELETE", "OPTIONS", "TRACE"])
def test_method(door: Any, seen: list[Any], method: str) -> None:
    answer = httpx.request(method, door.url + POST, headers=door.bearer())
    assert answer.status_code == 405
    assert not seen


@pytest.mark.parametrize(
    "framing",
    [
        "Content-Length: 4\r\nTransfer-Encoding: chunked\r\n",
        "Transfer-Encoding: chunked\r\nContent-Length: 4\r\n",
        "Transfer-Encoding: gzip, chunked\r\n",
        "Content-Length: 4\r\nContent-Length: 40\r\n",
        "Content-Length: +4\r\n",
        "Content-Length: 4, 4\r\n",
    ],
)
def test_a_second_request_cannot_hide_in_a_body(
    door: Any, seen: list[Any], framing: str
) -> None:
    hidden = "0\r\n\r\nGET /metrics HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
    answer = door.raw(f"{door.head}{framing}\r\n{hidden}".encode())
    assert answer.split()[1] in (b"400", b"501"), answer
    assert not seen


def test_a_second_request_is_looked_at_too(door: Any, seen: list[Any]) -> None:
    """On the same connection, after one that is let through."""
    first = f"{door.head}Content-Length: 2\r\n\r\n{{}}"
    second = "GET /metrics HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
    answer = door.raw((first + second).encode())
    assert answer.count(b"HTTP/1.1 200") == answer.count(b"HTTP/1.1 404") == 1
    assert [path for _, path, *_ in seen] == [POST]


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
            door.url + POST, headers=door.bearer(), json={}, verify=trust
        )
        assert answer.status_code == 200


def test_keys_are_the_owners_alone(door: Any) -> None:
    modes = {path.name: path.stat().st_mode & 0o777 for path in door.conf.iterdir()}
    assert modes == {"nginx.conf": 0o600, "keys.conf": 0o600}
    assert door.alice not in (door.conf / "nginx.conf").read_text()
