# SPDX-License-Identifier: Apache-2.0
"""``vllm_lowbit_*`` whichever process answers, and with several engines."""

import os
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from vllm_lowbit import worker_metrics
from vllm_lowbit.kernels.kv4_store.layout import bytes_per_token

PER_TOKEN = 6 * 2 * bytes_per_token(64)
Samples = dict[str, list[tuple[dict[str, str], float]]]


def scrape(url: str) -> Samples:
    """Samples by name, of a connection of its own."""
    found: Samples = {}
    text = httpx.get(f"{url}/metrics", timeout=30).raise_for_status().text
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            found.setdefault(sample.name, []).append((sample.labels, sample.value))
    return found


def check(samples: Samples, name: str, engines: list[str]) -> None:
    """One sample of each metric per engine, with the computed values."""
    for metric, value in (
        ("vllm_lowbit_info", 1),
        ("vllm_lowbit_kv_bytes_per_token", PER_TOKEN),
        ("vllm_lowbit_kv_capacity_ratio", 256 / bytes_per_token(64)),
    ):
        found = samples[metric]
        assert sorted(labels["engine"] for labels, _ in found) == engines
        assert all(labels["model_name"] == name for labels, _ in found)
        assert all(got == pytest.approx(value) for _, got in found)
    info = samples["vllm_lowbit_info"][0][0]
    assert info["weights"] == info["activations"] == info["kv"] == "int4"
    assert info["backend"] == "cpu"
    seconds = samples["vllm_lowbit_load_seconds"]
    assert sorted((s["engine"], s["rank"]) for s, _ in seconds) == [
        (engine, "0") for engine in engines
    ]
    assert all(0 < value < 300 for _, value in seconds)
    # The labels of vLLM's own metrics, so that the two can be joined.
    own = samples["vllm:generation_tokens_total"][0][0]
    assert {"model_name", "engine"} <= set(own) and own["model_name"] == name


@pytest.mark.live
def test_two_api_processes_export_the_same(server: SimpleNamespace) -> None:
    """The kernel spreads connections over both: every one sees every metric once."""
    scrapes = [scrape(server.url) for _ in range(8)]
    for samples in scrapes:
        check(samples, server.name, ["0"])
    for metric in ("vllm_lowbit_info", "vllm_lowbit_load_seconds"):
        assert all(samples[metric] == scrapes[0][metric] for samples in scrapes)


@pytest.mark.live
def test_tokens_are_counted_whoever_serves(server: SimpleNamespace) -> None:
    def total(metric: str) -> float:
        return sum(value for _, value in scrape(server.url)[metric])

    before = total("vllm:generation_tokens_total")
    body = {"model": server.name, "prompt": "The old house", "max_tokens": 5}
    body["ignore_eos"] = True
    for _ in range(6):
        answer = httpx.post(f"{server.url}/v1/completions", json=body, timeout=60)
        answer.raise_for_status()
    deadline = time.monotonic() + 30
    while total("vllm:generation_tokens_total") - before < 30:
        assert time.monotonic() < deadline
        time.sleep(0.2)
    assert total("vllm:generation_tokens_total") - before == 30


@pytest.mark.live
@pytest.mark.slow
def test_two_engines(vllm_serve: Any, tmp_path: Path) -> None:
    """Two data parallel engines behind two API processes."""
    with vllm_serve(tmp_path / "log", "--data-parallel-size", 2) as server:
        for _ in range(4):
            check(scrape(server.url), server.name, ["0", "1"])


class TestWorkerFiles:
    @pytest.fixture(autouse=True)
    def directory(self, monkeypatch: Any, tmp_path: Path) -> Iterator[Path]:
        monkeypatch.setenv(worker_metrics.DIRECTORY, str(tmp_path))
        monkeypatch.setattr(worker_metrics, "_worker", None)
        # Kept: engines that ran in this process may have made it.
        monkeypatch.setattr(worker_metrics, "_made", None)
        yield tmp_path

    @staticmethod
    def load(seconds: float) -> None:
        worker_metrics.load_time(lambda: time.sleep(seconds))()

    def test_seconds_add_up_per_worker(self, directory: Path) -> None:
        worker_metrics.identify(1, 0)
        self.load(0.02)
        self.load(0.03)
        worker_metrics.identify(1, 10)
        self.load(0.01)
        found = worker_metrics.load_seconds(1)
        assert list(found) == [0, 10]
        assert 0.05 <= found[0] < 5 and 0.01 <= found[10] < 5
        assert worker_metrics.load_seconds(10) == worker_metrics.load_seconds(0) == {}

    def test_unnamed_worker_writes_nothing(self, directory: Path) -> None:
        self.load(0)
        assert not list(directory.iterdir())

    def test_worker_without_the_directory(
        self, directory: Path, monkeypatch: Any
    ) -> None:
        """On another machine: no file, and no error."""
        worker_metrics.identify(0, 0)
        monkeypatch.setenv(worker_metrics.DIRECTORY, str(directory / "elsewhere"))
        self.load(0)
        monkeypatch.delenv(worker_metrics.DIRECTORY)
        self.load(0)
        assert not list(directory.iterdir())
        assert worker_metrics.load_seconds(0) == {}

    def test_an_error_while_loading_stays_one(self) -> None:
        def fail() -> None:
            raise ValueError("no")

        with pytest.raises(ValueError, match="no"):
            worker_metrics.load_time(fail)()

    def test_directory_is_made_once(self, monkeypatch: Any) -> None:
        monkeypatch.delenv(worker_metrics.DIRECTORY)
        worker_metrics.make_directory()
        first = os.environ[worker_metrics.DIRECTORY]
        worker_metrics.make_directory()
        assert os.environ[worker_metrics.DIRECTORY] == first
        assert Path(first).is_dir()
