# SPDX-License-Identifier: Apache-2.0
"""`serve run` of ref-7m: scaling with the load, and a replica that is killed."""

import contextlib
import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

pytestmark = [pytest.mark.live, pytest.mark.slow]
ROOT = Path(__file__).parents[2]
RESULT = ROOT / "benchmarks" / "results" / "ray_serve.json"
COMMAND = (
    "LOWBIT_WRITE_RESULTS=1 .venv/bin/pytest -m slow tests/deploy/test_ray_serve.py"
)
CONFIG = """\
model: {model}
name: ref-7m
replicas:
  minimum: 1
  maximum: 2
  target_ongoing_requests: 2
  upscale_delay_seconds: 2
  downscale_delay_seconds: 10
resources:
  cpus: 0.5
engine:
  max_model_len: 512
  kv_cache_memory_bytes: 33554432
  enforce_eager: true
"""
CLIENTS = 8
TOKEN = secrets.token_hex(32)
MINUTES = 10 * 60


@dataclass
class Load:
    """Clients that ask one after the other; requests as (start, end, status)."""

    url: str
    done: list[tuple[float, float, int]] = field(default_factory=list)
    stop: threading.Event = field(default_factory=threading.Event)

    def client(self, number: int) -> None:
        body = {"model": "ref-7m", "max_tokens": 32, "ignore_eos": True}
        with httpx.Client(timeout=3600) as session:
            while not self.stop.is_set():
                body["prompt"] = f"Chapter {number}"
                start = time.monotonic()
                try:
                    answer = session.post(f"{self.url}/v1/completions", json=body)
                    status = answer.status_code
                except httpx.HTTPError:
                    status = 0
                self.done.append((start, time.monotonic(), status))

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        threads = [
            threading.Thread(target=self.client, args=(number,))
            for number in range(CLIENTS)
        ]
        for thread in threads:
            thread.start()
        try:
            yield
        finally:
            self.stop.set()
            for thread in threads:
                thread.join()


def ask(url: str) -> httpx.Response:
    """Of Ray's dashboard, which answers those who have the cluster's token."""
    headers = {"Authorization": f"Bearer {TOKEN}"}
    return httpx.get(url, headers=headers, timeout=30)


def replicas(dashboard: str) -> dict[str, int]:
    """Replicas that run the engine: name to process id."""
    answer = ask(f"{dashboard}/api/serve/applications/").json()
    deployments = answer["applications"]["default"]["deployments"]
    (engine,) = [d for name, d in deployments.items() if "ref-7m" in name]
    return {
        r["replica_id"]: r["pid"] for r in engine["replicas"] if r["state"] == "RUNNING"
    }


def until(condition: Callable[[], bool], what: str, seconds: float = MINUTES) -> float:
    """Seconds until it holds."""
    start = time.monotonic()
    # Counted, not timed: a machine that stands still meanwhile is no failure.
    for _ in range(int(2 * seconds)):
        with contextlib.suppress(httpx.TransportError, KeyError, ValueError):
            if condition():
                return time.monotonic() - start
        time.sleep(0.5)
    raise AssertionError(f"{what}: not within {seconds} s")


@contextlib.contextmanager
def removed(directory: Path) -> Iterator[None]:
    """The directory is gone at the end."""
    try:
        yield
    finally:
        shutil.rmtree(directory, ignore_errors=True)


@pytest.fixture(scope="module")
def cluster(
    tmp_path_factory: pytest.TempPathFactory, free_port: Callable[[], int], running: Any
) -> Iterator[dict[str, Any]]:
    """A Ray of this test's own, and `serve run` in it."""
    pytest.importorskip("ray", reason="extra `ray`")
    directory = tmp_path_factory.mktemp("ray")
    # Sockets below a longer path would have names that are too long.
    temporary = Path("/tmp") / f"lowbit-ray-{os.getpid()}"
    bin = Path(sys.executable).parent
    ports = {name: free_port() for name in ("gcs", "dashboard", "http")}
    environment = {
        **os.environ,
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": TOKEN,
        "RAY_ADDRESS": f"127.0.0.1:{ports['gcs']}",
        "PATH": f"{bin}{os.pathsep}{os.environ['PATH']}",
    }
    config = directory / "serve.yaml"
    config.write_text(CONFIG.format(model=ROOT / "models" / "ref-7m"))
    head = [
        *(bin / "ray", "start", "--head", "--block", "--num-cpus=2"),
        *("--node-ip-address=127.0.0.1", f"--port={ports['gcs']}"),
        *(f"--dashboard-port={ports['dashboard']}", f"--temp-dir={temporary}"),
        f"--object-store-memory={100 << 20}",
    ]
    dashboard = f"http://127.0.0.1:{ports['dashboard']}"
    with removed(temporary), running(head, directory / "head", env=environment) as ray:
        until(
            lambda: (
                ray.poll() is not None
                or ask(f"{dashboard}/api/version").status_code == 200
            ),
            "dashboard",
            120,
        )
        assert ray.poll() is None, (directory / "head").read_text()[-4000:]
        # As the HTTP options of a file for `serve deploy`: `serve run` has none.
        code = (
            "from ray import serve; "
            f"serve.start(http_options={{'port': {ports['http']}}})"
        )
        subprocess.run([sys.executable, "-c", code], env=environment, check=True)
        command = [bin / "serve", "run", "vllm_lowbit.deploy.ray_serve:app"]
        command += [f"config={config}"]
        start = time.monotonic()
        with running(command, directory / "serve", env=environment) as process:
            url = f"http://127.0.0.1:{ports['http']}"
            until(lambda: process.poll() is not None or answers(url), "first answer")
            log = (directory / "serve").read_text()
            assert process.poll() is None, log[-4000:]
            yield {
                "url": url,
                "dashboard": dashboard,
                "start_seconds": time.monotonic() - start,
            }


def answers(url: str) -> bool:
    body = {"model": "ref-7m", "prompt": "The old house", "max_tokens": 8}
    answer = httpx.post(f"{url}/v1/completions", json=body, timeout=60)
    return (
        answer.status_code == 200 and answer.json()["usage"]["completion_tokens"] == 8
    )


def test_scaling_and_a_killed_replica(cluster: dict[str, Any]) -> None:
    url, dashboard = cluster["url"], cluster["dashboard"]
    measured: dict[str, Any] = {"first_answer_seconds": cluster["start_seconds"]}
    assert len(replicas(dashboard)) == 1

    load = Load(url)
    with load.running():
        measured["one_to_two_seconds"] = until(
            lambda: len(replicas(dashboard)) == 2, "1 -> 2"
        )
        time.sleep(10)  # both take requests
        victim, pid = next(iter(replicas(dashboard).items()))
        family = [pid, *(c.pid for c in psutil.Process(pid).children(recursive=True))]
        killed = time.monotonic()
        os.kill(pid, signal.SIGKILL)
        measured["killed_to_two_again_seconds"] = until(
            lambda: len(set(replicas(dashboard)) - {victim}) == 2, "a replacement"
        )
        time.sleep(10)
    failed = [request for request in load.done if request[2] != 200]
    in_flight = [r for r in load.done if r[0] <= killed <= r[1]]
    measured |= {
        "requests": len(load.done),
        "in_flight_at_the_kill_on_both": len(in_flight),
        "failed": len(failed),
        "failed_that_began_after_the_kill": sum(r[0] > killed for r in failed),
        # 0 is a connection that broke.
        "failures": [
            {
                "status": r[2],
                "began_after_kill_seconds": round(r[0] - killed, 2),
                "ended_after_kill_seconds": round(r[1] - killed, 2),
            }
            for r in failed
        ],
        "orphans_of_the_killed_replica": sum(map(psutil.pid_exists, family)),
    }
    measured["two_to_one_seconds"] = until(
        lambda: len(replicas(dashboard)) == 1, "2 -> 1"
    )
    assert answers(url)
    print(json.dumps(measured, indent=2))
    if os.environ.get("LOWBIT_WRITE_RESULTS"):
        _write(measured)

    assert measured["failed_that_began_after_the_kill"] == 0
    assert measured["failed"] <= measured["in_flight_at_the_kill_on_both"] <= CLIENTS
    assert measured["requests"] > 50
    assert measured["orphans_of_the_killed_replica"] == 0


def _write(measured: dict[str, Any]) -> None:
    packages = ("ray", "vllm", "torch", "vllm-lowbit")
    cpu = next(
        line.partition(":")[2].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith("model name")
    )
    result = {
        "command": COMMAND,
        "environment": {
            "date": time.strftime("%Y-%m-%d"),
            "cpu": cpu,
            "cores": os.cpu_count(),
            **{package: metadata.version(package) for package in packages},
        },
        "clients": CLIENTS,
        **{k: round(v, 1) if isinstance(v, float) else v for k, v in measured.items()},
    }
    RESULT.write_text(json.dumps(result, indent=2) + "\n")
