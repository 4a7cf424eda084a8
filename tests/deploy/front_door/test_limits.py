# SPDX-License-Identifier: Apache-2.0
"""What a real nginx bears of one client, in front of a stub."""

import contextlib
import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

POST = "/v1/completions"


def test_oversized_body(door: Any, seen: list[Any]) -> None:
    assert door.post(content=bytes(4096)).status_code == 200
    seen.clear()
    door.refused(door.post(content=bytes(4097)), 413)

    def chunks() -> Iterator[bytes]:
        for _ in range(64):
            yield bytes(1024)

    with contextlib.suppress(httpx.WriteError):  # closed with the rest on its way
        door.refused(door.post(content=chunks()), 413)
    assert not seen


def test_a_huge_length_is_refused_unread(door: Any, seen: list[Any]) -> None:
    request = f"{door.head}Content-Length: 99999999999\r\n\r\n"
    assert door.raw(request.encode()).split()[1] == b"413"
    assert not seen


@pytest.mark.parametrize(
    "sent",
    ["", "HEAD", "HEADContent-Length: 100\r\n\r\nhalf"],
    ids=["nothing", "headers", "body"],
)
def test_slow_client(door: Any, seen: list[Any], sent: str) -> None:
    """Cut off after the second it is given, and vLLM hears nothing of it."""
    start = time.monotonic()
    answer = door.raw(sent.replace("HEAD", door.head).encode(), seconds=20)
    assert 0.9 < time.monotonic() - start < 15
    assert answer == b"" or answer.split()[1] == b"408"
    assert not seen


def test_headers_drop_by_drop(door: Any, seen: list[Any]) -> None:
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


def test_client_that_does_not_read(door: Any, stub: Any) -> None:
    stub.cut.clear()
    body = b'{"fill": 100000000}'
    head = f"{door.head}Content-Length: {len(body)}\r\n\r\n"
    with socket.create_connection(("127.0.0.1", door.port)) as sock:
        sock.sendall(head.encode() + body)
        assert stub.cut.wait(20)


def test_tokens_are_not_held_back(door: Any) -> None:
    start, times = time.monotonic(), []
    with httpx.stream(
        "POST", door.url + POST, headers=door.bearer(), json={"stream": 4}, timeout=30
    ) as answer:
        for _ in answer.iter_raw():
            times.append(time.monotonic() - start)
    assert len(times) >= 3 and times[-1] - times[0] > 0.5


def test_leaving_client_ends_the_request(door: Any, stub: Any) -> None:
    stub.cut.clear()
    with httpx.stream(
        "POST", door.url + POST, headers=door.bearer(), json={"fill": 100_000_000}
    ) as answer:
        next(answer.iter_raw())
    assert stub.cut.wait(20)


def test_rate_per_key(start: Any, stub: Any, seen: list[Any]) -> None:
    with start(
        [stub.server_port], limits={"requests_per_minute": 6, "burst": 4}
    ) as door:
        codes = [door.post().status_code for _ in range(10)]
        assert codes == [200] * 5 + [429] * 5
        door.refused(door.post(), 429)
        assert door.post(door.bob).status_code == 200
    assert len(seen) == 6


def test_requests_in_flight_per_key(start: Any, stub: Any) -> None:
    with (
        start([stub.server_port], limits={"connections_per_key": 2}) as door,
        ThreadPoolExecutor(5) as pool,
    ):
        waits = list(pool.map(lambda _: door.post(json={"wait": 1}), range(5)))
        assert sorted(r.status_code for r in waits) == [200, 200, 429, 429, 429]
        assert door.post().status_code == 200


def test_engine_that_dies_is_not_asked_twice(
    start: Any, stub: Any, seen: list[Any]
) -> None:
    """Both addresses are the stub's: a second try would be seen there."""
    port = stub.server_port
    with start([port, port]) as door:
        door.refused(door.post(json={"die": 1}), 502)
        assert len(seen) == 1


def test_unreachable_engine(
    start: Any, stub: Any, free_port: Callable[[], int], seen: list[Any]
) -> None:
    with start([free_port(), stub.server_port]) as door:
        assert {door.post().status_code for _ in range(6)} == {200}
    with start([free_port()]) as door:
        door.refused(door.post(), 502)
        door.refused(httpx.get(f"{door.url}/health"), 502)
