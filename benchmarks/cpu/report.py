# SPDX-License-Identifier: Apache-2.0
"""cpu.md: every figure of cpu.json beside those it is compared with."""

from collections.abc import Iterator
from typing import Any

from . import attention, linear, serve
from .arms import ARMS, BF16
from .linear_arms import LINEAR_ARMS
from .options import Options
from .plots import write_plots
from .store import Store
from .verdicts import (
    against_llama_cpp,
    attention_rows,
    ceiling,
    linear_rows,
    memory_rows,
    speedups,
    verdicts,
)

MIB = 1 << 20


def write_report(store: Store, options: Options) -> str:
    """Write cpu.md and the plots.

    Returns:
        the text of cpu.md.
    """
    plots = write_plots(store, options.results)
    sections = (_head, _must_hold, _serve, _linear, _attention, _memory, _llama_cpp)
    lines = [line for section in sections for line in section(store)]
    lines += [f"![{name.removesuffix('.png')}]({name})" for name in plots]
    lines += _conditions(store)
    text = "\n".join(lines).rstrip() + "\n"
    options.results.mkdir(parents=True, exist_ok=True)
    (options.results / "cpu.md").write_text(text)
    return text


def _head(store: Store) -> Iterator[str]:
    yield "# Speed and memory on a CPU"
    yield ""
    yield "Llama-3.2-1B's shape, random weights; medians. Commands: `python -m"
    yield "benchmarks.cpu`, whose modules say how each figure is measured."
    yield ""
    environment = store.data["environment"]
    yield ", ".join(f"{key} {value}" for key, value in environment.items())
    yield ""


def _table(head: list[str], rows: list[list[str]]) -> Iterator[str]:
    if rows:
        yield "| " + " | ".join(head) + " |"
        yield "|---" * len(head) + "|"
        for row in rows:
            yield "| " + " | ".join(row) + " |"
        yield ""


def _number(value: float | None) -> str:
    """Three significant digits, and no exponent."""
    if value is None:
        return "-"
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def _must_hold(store: Store) -> Iterator[str]:
    rows = [
        [
            verdict.line,
            ("at most " if verdict.at_most else "") + _number(verdict.needed),
            _number(verdict.measured),
            verdict.worst,
            "holds" if verdict.holds else "**fails**",
        ]
        for verdict in verdicts(store)
    ]
    if rows:
        yield "## What must hold"
        yield ""
    yield from _table(["", "needed", "measured, worst", "where", ""], rows)


def _serve(store: Store) -> Iterator[str]:
    engines: dict[str, Any] = {}
    for arm in ARMS:
        result = store.result(serve.NAME, f"{serve.ENGINE}: {arm}")
        if result is not None:
            engines[arm] = result
    if not engines:
        return
    yield "## End to end"
    yield ""
    yield "Batch x input/output tokens. Step: one token for every sequence, with the"
    yield "10th and 90th percentile. Where a prompt is marked `*`, the sequences of the"
    yield "batch share all of it but a token."
    yield ""
    names = list(dict.fromkeys(n for r in engines.values() for n in r["workloads"]))
    for title, cell in (
        ("milliseconds per decode step", _decode),
        ("prefill, tokens per second", _prefill),
        ("tokens generated per second, prefill included", _whole),
    ):
        rows = [
            [_mark(name, engines)]
            + [cell(result["workloads"].get(name)) for result in engines.values()]
            for name in names
        ]
        yield from _table([title, *engines], rows)
    rows = []
    for arm, result in engines.items():
        limit = ceiling(store, arm)
        gain = speedups(store, arm, BF16).get("decode 1 x 128/128")
        share = None if limit is None or gain is None else gain / limit
        size = _number(result["weight_bytes"] / MIB)
        start = _number(result["start_seconds"])
        rows.append([arm, size, _number(limit), _number(gain), _number(share), start])
    head = ["", "MiB of weights per token", "ceiling: bf16 bytes / its bytes"]
    head += ["decode 1 x 128/128, times bf16", "share of the ceiling", "start, s"]
    yield from _table(head, rows)
    yield from _commands(store)


def _mark(name: str, engines: dict[str, Any]) -> str:
    rows = (r["workloads"].get(name) for r in engines.values())
    return name + " *" * any(row is not None and row["shared"] for row in rows)


def _decode(row: dict[str, Any] | None) -> str:
    if row is None:
        return "-"
    spread = f"{_number(row['decode_ms_p10'])}-{_number(row['decode_ms_p90'])}"
    return f"{_number(row['decode_ms'])} ({spread})"


def _prefill(row: dict[str, Any] | None) -> str:
    return "-" if row is None else _number(row["prefill_tokens_per_s"])


def _whole(row: dict[str, Any] | None) -> str:
    if row is None:
        return "-"
    return _number(row["batch"] * row["output_len"] / row["seconds"])


def _commands(store: Store) -> Iterator[str]:
    rows, shown = [], []
    for arm in ARMS:
        latency = store.result(serve.NAME, f"latency: {arm}")
        throughput = store.result(serve.NAME, f"throughput: {arm}")
        if latency or throughput:
            seconds = latency["seconds"] if latency else []
            rate = throughput["tokens_per_s"] if throughput else None
            median = sorted(seconds)[len(seconds) // 2] if seconds else None
            rows.append([arm, _number(median), _number(rate)])
        shown += [r["command"] for r in (latency, throughput) if r]
    head = ["", "vllm bench latency, s", "vllm bench throughput, tokens/s"]
    yield from _table(head, rows)
    if shown:
        yield from ("```", *shown, "```", "")


def _linear(store: Store) -> Iterator[str]:
    rows = linear_rows(store)
    bandwidth = store.result(linear.NAME, linear.BANDWIDTH)
    if not rows and bandwidth is None:
        return
    yield "## Linears"
    yield ""
    if bandwidth is not None:
        copy, read = bandwidth["copy"] / 2e9, bandwidth["read"] / 1e9
        yield f"Memory: {_number(copy)} GB/s are copied, each byte read and written;"
        yield f"{_number(read)} GB/s are read where nothing is written. Each call reads"
        yield "another copy of the weights."
        yield ""
    arms = [arm for arm in LINEAR_ARMS if any(arm in row for row in rows.values())]
    for count in linear.ROWS:
        table = []
        for name, by_arm in rows.items():
            any_row = next(iter(by_arm.values()))
            cells = [f"{name} {any_row['n']} x {any_row['k']}"]
            for arm in arms:
                row = by_arm.get(arm)
                cells.append("-" if row is None else _linear_cell(row, count))
            table.append(cells)
        unit = "GB/s of packed bytes" if count == 1 else "GFLOP/s"
        plural = "row" if count == 1 else "rows"
        yield from _table([f"{count} {plural}: ms, {unit}", *arms], table)
    for cell, result in store.results(linear.NAME).items():
        if "unavailable" in result:
            yield f"- {cell}: {result['unavailable']}"
    yield ""


def _linear_cell(row: dict[str, Any], count: int) -> str:
    seconds = row["seconds"][str(count)]["median"]
    amount = row["weight_bytes"] if count == 1 else 2 * count * row["n"] * row["k"]
    return f"{_number(seconds * 1e3)}, {_number(amount / seconds / 1e9)}"


def _attention(store: Store) -> Iterator[str]:
    kinds = (attention.STOCK_BF16, attention.STOCK_FP8, attention.OURS)
    table = []
    for name, by_kind in attention_rows(store).items():
        cells = [name]
        for kind in kinds:
            row = by_kind.get(kind)
            cells.append("-" if row is None else _attention_cell(row))
        base, ours = (by_kind.get(kind) for kind in (kinds[0], kinds[2]))
        gain = base["median"] / ours["median"] if base and ours else None
        table.append([*cells, _number(gain)])
    if table:
        yield "## Decode attention"
        yield ""
        yield f"{attention.NUM_HEADS} heads, {attention.NUM_KV_HEADS} KV heads,"
        yield "context x batch; milliseconds and GB/s of the cache."
        yield ""
    yield from _table(["", *kinds, "ours, times bf16"], table)


def _attention_cell(row: dict[str, Any]) -> str:
    rate = _number(row["cache_bytes"] / row["median"] / 1e9)
    return f"{_number(row['median'] * 1e3)}, {rate}"


def _memory(store: Store) -> Iterator[str]:
    rows = memory_rows(store)
    if BF16 in rows:
        whole = rows[BF16]["checkpoint_bytes"]
        table = [
            [
                arm,
                _number(row["held"] / MIB),
                f"{100 * row['held'] / whole:.1f}%",
                _number(row["tensor_bytes"] / MIB),
                _number(row["weight_bytes"] / MIB),
                _number(row["load_seconds"]),
            ]
            for arm, row in rows.items()
        ]
        yield "## Memory of the weights in a server"
        yield ""
        yield f"The bf16 weights are {whole / MIB:.0f} MiB. Anonymous memory of the"
        yield "worker, less that of one with a model of next to none."
        yield ""
        head = ["", "MiB in the worker", "of the bf16 weights"]
        head += ["MiB of parameters and buffers", "MiB read per token", "load, s"]
        yield from _table(head, table)


def _llama_cpp(store: Store) -> Iterator[str]:
    rows = against_llama_cpp(store)
    if rows:
        arms = list(dict.fromkeys(arm for row in rows.values() for arm in row))
        table = [
            [name, *(_number(row.get(arm)) for arm in arms)]
            for name, row in rows.items()
        ]
        yield "## llama.cpp"
        yield ""
        yield "Tokens per second at batch 1, by llama-bench and as above."
        yield ""
        yield from _table(["", *arms], table)


def _conditions(store: Store) -> Iterator[str]:
    rows = []
    for part, cells in store.data["parts"].items():
        records = list(cells.values())
        dates = sorted(record["date"] for record in records)
        load = max(record["load_average_before"] for record in records)
        steal = max(record["steal_percent"] for record in records)
        seconds = sum(record["seconds"] for record in records)
        row = [part, f"{dates[0]} to {dates[-1]}", f"{seconds / 60:.0f}"]
        rows.append([*row, _number(load), _number(steal)])
    yield ""
    yield "## Conditions"
    yield ""
    head = ["", "measured", "minutes", "highest load before a cell"]
    yield from _table([*head, "highest % of time taken by the host"], rows)
    for cell, error in store.errors().items():
        yield f"- failed: {cell}: {error.splitlines()[0]}"
