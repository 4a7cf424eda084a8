# SPDX-License-Identifier: Apache-2.0
"""Rules by promtool; each query of the dashboard in a real Prometheus, live."""

import json
import re
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
import yaml

from vllm_lowbit.deploy.observe.dashboard import FILE, WIDTH, dashboard

OBSERVE = Path(__file__).parents[2] / "deploy" / "observe"


def promtool(program: Any, *args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [program("promtool", "prometheus"), *args],
        cwd=OBSERVE,
        capture_output=True,
        text=True,
        timeout=60,
    )


@pytest.mark.parametrize(
    "args",
    [
        ("check", "config", "prometheus.yml"),
        ("check", "rules", "rules.yml"),
        ("test", "rules", "rules_test.yml"),
    ],
    ids=" ".join,
)
def test_rules(program: Any, args: tuple[str, ...]) -> None:
    result = promtool(program, *args)
    assert result.returncode == 0, result.stdout + result.stderr


def test_every_alert_is_tested_to_fire() -> None:
    rules = yaml.safe_load((OBSERVE / "rules.yml").read_text())
    tests = yaml.safe_load((OBSERVE / "rules_test.yml").read_text())
    alerts = {r["alert"] for g in rules["groups"] for r in g["rules"] if "alert" in r}
    fired = {
        case["alertname"]
        for test in tests["tests"]
        for case in test["alert_rule_test"]
        if case.get("exp_alerts")
    }
    assert fired == alerts and len(alerts) >= 10


def test_a_broken_rule_fails(program: Any, tmp_path: Path) -> None:
    """The unit tests of the rules hold their expressions and times."""
    rules = (OBSERVE / "rules.yml").read_text()
    (tmp_path / "rules_test.yml").write_text((OBSERVE / "rules_test.yml").read_text())
    for old, new in (
        ('up{job="vllm"} == 0', 'up{job="vllm"} == 2'),
        ("num_requests_running > 0", "num_requests_running >= 0"),
        ("[5m])) > 0.01", "[5m])) > 0.3"),
        ("unless on (instance)", "and on (instance)"),
        ("kv_cache_usage_perc[10m]) > 0.95", "kv_cache_usage_perc[10m]) > 0.9"),
    ):
        assert old in rules
        (tmp_path / "rules.yml").write_text(rules.replace(old, new))
        result = promtool(program, "test", "rules", str(tmp_path / "rules_test.yml"))
        assert result.returncode == 1 and "FAILED" in result.stdout + result.stderr, old


class TestDashboard:
    def test_committed_file(self) -> None:
        """`python -m vllm_lowbit.deploy.observe.dashboard` writes it."""
        assert json.loads(FILE.read_text()) == dashboard()

    def test_panels_fit_the_grid(self) -> None:
        cells: set[tuple[int, int]] = set()
        panels = dashboard()["panels"]
        assert len({panel["id"] for panel in panels}) == len(panels) > 15
        for panel in panels:
            box = panel["gridPos"]
            assert box["x"] + box["w"] <= WIDTH
            mine = {
                (x, y)
                for x in range(box["x"], box["x"] + box["w"])
                for y in range(box["y"], box["y"] + box["h"])
            }
            assert not mine & cells, panel["title"]
            cells |= mine


def queries() -> list[str]:
    """PromQL of every panel, with the variables filled in as Grafana does for All."""
    found = [t["expr"] for p in dashboard()["panels"] for t in p.get("targets", [])]
    values = {"$model": ".*", "$instance": ".*", "$__rate_interval": "30s"}
    for name, value in values.items():
        found = [query.replace(name, value) for query in found]
    assert not any("$" in query for query in found)
    return found


@pytest.fixture(scope="module")
def prometheus(
    program: Any,
    running: Any,
    wait_for: Any,
    free_port: Any,
    server: SimpleNamespace,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[str]:
    """A Prometheus that scrapes the server each second, with traffic; its URL."""
    directory = tmp_path_factory.mktemp("prometheus")
    config = yaml.safe_load((OBSERVE / "prometheus.yml").read_text())
    config["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
    config["scrape_configs"][0]["static_configs"][0]["targets"] = [
        server.url.removeprefix("http://")
    ]
    (directory / "prometheus.yml").write_text(yaml.safe_dump(config))
    (directory / "rules.yml").write_text((OBSERVE / "rules.yml").read_text())
    listen = f"127.0.0.1:{free_port()}"
    command = [
        program("prometheus", "prometheus"),
        f"--config.file={directory / 'prometheus.yml'}",
        f"--storage.tsdb.path={directory / 'data'}",
        f"--web.listen-address={listen}",
    ]
    with running(command, directory / "log") as process:
        url = f"http://{listen}"
        wait_for(process, f"{url}/-/ready", directory / "log", 60)
        # A counter that starts with its first request needs one more to have a rate.
        for number in range(4):
            body = {
                "model": server.name,
                "prompt": f"Chapter {number}. " + "The old house " * 60,
                "max_tokens": 16,
            }
            answer = httpx.post(f"{server.url}/v1/completions", json=body, timeout=120)
            answer.raise_for_status()
            time.sleep(2)
        yield url


def ask(url: str, query: str) -> list[Any]:
    answer = httpx.get(f"{url}/api/v1/query", params={"query": query}, timeout=30)
    assert answer.json()["status"] == "success", (query, answer.text)
    return answer.json()["data"]["result"]


@pytest.mark.live
def test_every_panel_has_live_data(prometheus: str) -> None:
    empty = set()
    for query in queries():
        values = [float(sample["value"][1]) for sample in ask(prometheus, query)]
        if not values or any(value != value for value in values):
            empty.add(query)
    assert not empty


@pytest.mark.live
def test_numbers_are_the_servers(prometheus: str, server: SimpleNamespace) -> None:
    """What Prometheus answers is what the server exports."""
    (sample,) = ask(prometheus, "vllm_lowbit_kv_bytes_per_token")
    text = httpx.get(f"{server.url}/metrics", timeout=30).text
    exported = re.search(r"^vllm_lowbit_kv_bytes_per_token\{.*\} (\S+)", text, re.M)
    assert exported is not None and float(sample["value"][1]) == float(exported[1])
    (scheme,) = ask(prometheus, "vllm_lowbit_info")
    assert scheme["metric"]["weights"] == "int4"
    assert scheme["metric"]["instance"] == server.url.removeprefix("http://")


@pytest.mark.live
def test_rules_are_loaded_and_quiet(prometheus: str) -> None:
    data = httpx.get(f"{prometheus}/api/v1/rules", timeout=30).json()["data"]
    rules = [rule for group in data["groups"] for rule in group["rules"]]
    assert len(rules) >= 13 and {rule["health"] for rule in rules} == {"ok"}
    firing = httpx.get(f"{prometheus}/api/v1/alerts", timeout=30).json()["data"]
    assert [a for a in firing["alerts"] if a["state"] == "firing"] == []
