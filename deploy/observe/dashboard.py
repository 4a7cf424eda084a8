# SPDX-License-Identifier: Apache-2.0
"""Writes ``dashboard.json``: what vLLM exports, and rows for lowbit.

    python -m vllm_lowbit.deploy.observe.dashboard

The queries are the substance; Grafana's JSON around them is the same for every panel.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FILE = Path(__file__).with_name("dashboard.json")
WIDTH, HEIGHT = 24, 7
DATASOURCE = {"type": "prometheus", "uid": "${datasource}"}
# The engines that are chosen at the top of the page.
CHOSEN = 'model_name=~"$model", instance=~"$instance"'


@dataclass(frozen=True)
class Panel:
    """One graph, number or table.

    Attributes:
        title: of the panel.
        queries: legend to PromQL.
        unit: one of Grafana's unit ids.
        kind: ``timeseries``, ``stat`` or ``table``.
        width: of the 24 columns.
        description: shown on the panel's corner.
    """

    title: str
    queries: dict[str, str]
    unit: str = "short"
    kind: str = "timeseries"
    width: int = 8
    description: str = ""


def rate(metric: str, by: str = "") -> str:
    return f"sum by ({by}) (rate({metric}{{{CHOSEN}}}[$__rate_interval]))"


def last(metric: str, by: str = "instance, engine") -> str:
    return f"sum by ({by}) ({metric}{{{CHOSEN}}})"


def quantiles(metric: str) -> dict[str, str]:
    buckets = rate(f"{metric}_bucket", "le")
    return {
        f"p{int(100 * q)}": f"histogram_quantile({q}, {buckets})" for q in QUANTILES
    }


QUANTILES = (0.5, 0.95, 0.99)
ROWS: dict[str, list[Panel]] = {
    "lowbit: what runs": [
        Panel(
            "Scheme",
            {"": f"vllm_lowbit_info{{{CHOSEN}}}"},
            kind="table",
            width=24,
            description="The effective scheme of every engine; a server without a row "
            "runs stock vLLM.",
        ),
        Panel(
            "KV cache bytes per token",
            {"{{instance}} {{engine}}": last("vllm_lowbit_kv_bytes_per_token")},
            unit="bytes",
            kind="stat",
            width=6,
        ),
        Panel(
            "Capacity against a bf16 cache",
            {"{{instance}} {{engine}}": last("vllm_lowbit_kv_capacity_ratio")},
            kind="stat",
            width=6,
        ),
        Panel(
            "Cached tokens in one GiB",
            {
                "{{instance}} {{engine}}": f"{2**30} / "
                + last("vllm_lowbit_kv_bytes_per_token")
            },
            kind="stat",
            width=6,
        ),
        Panel(
            "Seconds of quantizing while loading",
            {
                "{{instance}} {{engine}} rank {{rank}}": last(
                    "vllm_lowbit_load_seconds", "instance, engine, rank"
                )
            },
            unit="s",
            kind="stat",
            width=6,
        ),
        Panel(
            "KV cache written",
            {
                "{{instance}} {{engine}}": "("
                + rate("vllm:prompt_tokens_total", "instance, engine")
                + " + "
                + rate("vllm:generation_tokens_total", "instance, engine")
                + ") * on (instance, engine) "
                + last("vllm_lowbit_kv_bytes_per_token")
            },
            unit="Bps",
            width=12,
            description="Tokens times bytes per token; tokens found in the prefix "
            "cache are counted although they are not written again.",
        ),
        Panel(
            "Schemes per model",
            {
                "{{model_name}}": "count by (model_name) (count by (model_name, "
                "weights, activations, kv, vocabulary, rotation, checkpoint) "
                f"(vllm_lowbit_info{{{CHOSEN}}}))"
            },
            width=12,
            description="More than one: replicas give different answers.",
        ),
    ],
    "Traffic": [
        Panel(
            "Requests",
            {
                "{{finished_reason}}": rate(
                    "vllm:request_success_total", "finished_reason"
                )
            },
            unit="reqps",
        ),
        Panel(
            "Tokens",
            {
                "prompt": rate("vllm:prompt_tokens_total"),
                "generated": rate("vllm:generation_tokens_total"),
            },
        ),
        Panel(
            "In flight",
            {
                "running": last("vllm:num_requests_running", ""),
                "waiting": last("vllm:num_requests_waiting", ""),
            },
        ),
    ],
    "Latency": [
        Panel(title, quantiles(metric), unit="s")
        for title, metric in (
            ("Time to first token", "vllm:time_to_first_token_seconds"),
            ("Between tokens", "vllm:inter_token_latency_seconds"),
            ("Whole request", "vllm:e2e_request_latency_seconds"),
            ("In the queue", "vllm:request_queue_time_seconds"),
            ("Prefill", "vllm:request_prefill_time_seconds"),
            ("Decode", "vllm:request_decode_time_seconds"),
        )
    ],
    "KV cache": [
        Panel(
            "In use",
            {"{{instance}} {{engine}}": last("vllm:kv_cache_usage_perc")},
            unit="percentunit",
        ),
        Panel(
            "Prefix cache hits",
            {
                "share of tokens": rate("vllm:prefix_cache_hits_total")
                + " / "
                + rate("vllm:prefix_cache_queries_total")
            },
            unit="percentunit",
        ),
        Panel(
            "Preemptions",
            {
                "{{instance}} {{engine}}": rate(
                    "vllm:num_preemptions_total", "instance, engine"
                )
            },
            unit="cps",
        ),
    ],
}


def dashboard() -> dict[str, Any]:
    """The JSON model that Grafana imports."""
    panels: list[dict[str, Any]] = []
    y = 0
    for row, contents in ROWS.items():
        position = {"x": 0, "y": y, "w": WIDTH, "h": 1}
        panels.append({"type": "row", "title": row, "gridPos": position, "panels": []})
        y, x = y + 1, 0
        for panel in contents:
            if x + panel.width > WIDTH:
                x, y = 0, y + HEIGHT
            panels.append(_panel(panel, x, y))
            x += panel.width
        y += HEIGHT
    for number, entry in enumerate(panels, 1):
        entry["id"] = number
    return {
        "uid": "vllm-lowbit",
        "title": "vLLM with lowbit",
        "tags": ["vllm", "lowbit"],
        "schemaVersion": 39,
        "editable": True,
        "refresh": "15s",
        "time": {"from": "now-1h", "to": "now"},
        "templating": {
            "list": [
                {"name": "datasource", "type": "datasource", "query": "prometheus"},
                _variable("model", "model_name", "vllm:num_requests_running"),
                _variable(
                    "instance",
                    "instance",
                    'vllm:num_requests_running{model_name=~"$model"}',
                ),
            ]
        },
        "panels": panels,
    }


def _variable(name: str, label: str, metric: str) -> dict[str, Any]:
    query = f"label_values({metric}, {label})"
    return {
        "name": name,
        "type": "query",
        "datasource": DATASOURCE,
        "definition": query,
        "query": {"query": query, "refId": name},
        "refresh": 2,
        "multi": True,
        "includeAll": True,
        "current": {"text": ["All"], "value": ["$__all"]},
    }


def _panel(panel: Panel, x: int, y: int) -> dict[str, Any]:
    table = panel.kind == "table"
    targets = [
        {
            "refId": chr(ord("A") + number),
            "datasource": DATASOURCE,
            "expr": query,
            "legendFormat": legend,
            **({"instant": True, "format": "table"} if table else {}),
        }
        for number, (legend, query) in enumerate(panel.queries.items())
    ]
    hidden = dict.fromkeys(("Time", "Value", "__name__", "job"), True)
    organize = {"id": "organize", "options": {"excludeByName": hidden}}
    return {
        "type": panel.kind,
        "title": panel.title,
        "description": panel.description,
        "datasource": DATASOURCE,
        "gridPos": {"x": x, "y": y, "w": panel.width, "h": HEIGHT},
        "fieldConfig": {"defaults": {"unit": panel.unit, "min": 0}, "overrides": []},
        "options": {},
        "targets": targets,
        "transformations": [organize] if table else [],
    }


def main() -> None:
    FILE.write_text(json.dumps(dashboard(), indent=1) + "\n")


if __name__ == "__main__":
    main()
