# SPDX-License-Identifier: Apache-2.0
"""What must hold, and whether it does."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from . import attention, linear, llama_cpp, memory, serve
from .arms import ARMS, BF16, LOWBIT, OURS, OURS_16, OURS_W4A16, STOCK, STOCK_W4A16
from .linear_arms import LINEAR_ARMS
from .store import Store

Rows = dict[str, dict[str, Any]]

DECODE_OF_CEILING = 0.8
DECODE_BATCH_32 = 1.5
PREFILL = 1.5
NOT_SLOWER = 0.95
# Of the bytes that a second copies, each read once and written once, and of those that
# it reads where nothing is written, which is what a linear at one row does.
LINEAR_OF_MEMORY = 0.7
LINEAR_GEMM = 1.6
ATTENTION = 1.5
MEMORY = {OURS: 0.35, OURS_16: 0.45}
LOAD_SECONDS = 120.0


@dataclass(frozen=True)
class Verdict:
    """One line.

    Attributes:
        line: what must hold.
        needed: bound on the figure.
        measured: the figure, the worst of several.
        worst: where it was measured.
        at_most: whether the bound is an upper one.
    """

    line: str
    needed: float
    measured: float
    worst: str
    at_most: bool = False

    @property
    def holds(self) -> bool:
        if self.at_most:
            return self.measured <= self.needed
        return self.measured >= self.needed


def verdicts(store: Store) -> list[Verdict]:
    """Every line whose cells were measured."""
    parts = (_serve, _linear, _attention, _memory)
    return [verdict for part in parts for verdict in part(store)]


def speedups(store: Store, arm: str, base: str) -> dict[str, float]:
    """How many times as fast an arm is as another, by ``decode`` or ``prefill`` and
    workload."""
    ours, other = _workloads(store, arm), _workloads(store, base)
    found = {}
    for name in ours:
        if name in other:
            decode = other[name]["decode_ms"] / ours[name]["decode_ms"]
            rate = "prefill_tokens_per_s"
            found[f"decode {name}"] = decode
            found[f"prefill {name}"] = ours[name][rate] / other[name][rate]
    return found


def ceiling(store: Store, arm: str) -> float | None:
    """Bytes of weights that bf16 reads per token, over those that an arm reads."""
    cells = [store.result(serve.NAME, f"{serve.ENGINE}: {a}") for a in (BF16, arm)]
    base, ours = cells
    return None if not base or not ours else base["weight_bytes"] / ours["weight_bytes"]


def _workloads(store: Store, arm: str) -> Rows:
    result = store.result(serve.NAME, f"{serve.ENGINE}: {arm}")
    return {} if result is None else result["workloads"]


def _lowest(found: dict[str, float]) -> tuple[float, str]:
    name = min(found, key=lambda key: found[key])
    return found[name], name


def _serve(store: Store) -> Iterator[Verdict]:
    for arm in (OURS, OURS_16):
        found = speedups(store, arm, BF16)
        if not found:
            continue
        limit = ceiling(store, arm) or 1.0

        def line(
            text: str,
            needed: float,
            keep: Callable[[str], bool],
            scale: float = 1.0,
            arm: str = arm,
            found: dict[str, float] = found,
        ) -> Iterator[Verdict]:
            kept = {name: x / scale for name, x in found.items() if keep(name)}
            if kept:
                yield Verdict(f"{arm}: {text}", needed, *_lowest(kept))

        yield from line(
            f"decode at batch 1, share of the ceiling {limit:.2f} x bf16",
            DECODE_OF_CEILING,
            lambda name: name.startswith("decode 1 x"),
            limit,
        )
        yield from line(
            "decode at batch 32, times bf16",
            DECODE_BATCH_32,
            lambda name: name.startswith("decode 32 x"),
        )
        yield from line(
            "prefill, times bf16", PREFILL, lambda name: name.startswith("prefill")
        )
        yield from _against_stock(store, arm)
    yield from _against_w4a16(store, OURS_W4A16)


def _against_stock(store: Store, arm: str) -> Iterator[Verdict]:
    against = {
        f"{name} against {stock}": value
        for stock in STOCK
        for name, value in speedups(store, arm, stock).items()
    }
    text = f"{arm}: times the best stock arm, anywhere"
    yield Verdict(text, NOT_SLOWER, *_lowest(against))
    yield from _against_w4a16(store, arm)


def _against_w4a16(store: Store, arm: str) -> Iterator[Verdict]:
    found = speedups(store, arm, STOCK_W4A16)
    if found:
        yield Verdict(f"{arm}: times stock W4A16, anywhere", 1.0, *_lowest(found))


def linear_rows(store: Store) -> dict[str, Rows]:
    """By linear (``1B qkv``) and arm, what was measured; arms that ran only."""
    rows: dict[str, Rows] = {}
    for cell, result in store.results(linear.NAME).items():
        arm, _, model = cell.rpartition(", ")
        if cell != linear.BANDWIDTH and "unavailable" not in result:
            for name, row in result.items():
                rows.setdefault(f"{model} {name}", {})[arm] = row
    return rows


def _linear(store: Store) -> Iterator[Verdict]:
    rows, bandwidth = linear_rows(store), store.result(linear.NAME, linear.BANDWIDTH)
    for arm in (name for name, arm in LINEAR_ARMS.items() if arm.ours):
        rates, gains = {}, {}
        for name, by_arm in rows.items():
            if arm not in by_arm:
                continue
            row = by_arm[arm]
            rates[name] = row["weight_bytes"] / row["seconds"]["1"]["median"]
            stock = [
                other["seconds"]["256"]["median"]
                for key, other in by_arm.items()
                if LINEAR_ARMS[key].stock_bf16
            ]
            if stock:
                gains[name] = min(stock) / row["seconds"]["256"]["median"]
        if rates and bandwidth is not None:
            slowest, where = _lowest(rates)
            text = f"{arm}, 1 row: packed bytes per second, share of"
            for what, rate in (
                ("bytes copied", bandwidth["copy"] / 2),
                ("bytes read alone", bandwidth["read"]),
            ):
                yield Verdict(f"{text} {what}", LINEAR_OF_MEMORY, slowest / rate, where)
        if gains:
            text = f"{arm}, 256 rows: times the fastest stock bf16 GEMM"
            yield Verdict(text, LINEAR_GEMM, *_lowest(gains))


def attention_rows(store: Store) -> dict[str, Rows]:
    """By case (``head size 64, 8192 x 1``) and kind of cache, what was measured."""
    rows: dict[str, Rows] = {}
    for cell, result in store.results(attention.NAME).items():
        kind, _, size = cell.partition(", ")
        for name, row in result.items():
            rows.setdefault(f"{size}, {name}", {})[kind] = row
    return rows


def _attention(store: Store) -> Iterator[Verdict]:
    found = {
        name: row[attention.STOCK_BF16]["median"] / row[attention.OURS]["median"]
        for name, row in attention_rows(store).items()
        if attention.STOCK_BF16 in row and attention.OURS in row
    }
    if found:
        text = "KV4 decode attention, times vLLM's bf16"
        yield Verdict(text, ATTENTION, *_lowest(found))


def memory_rows(store: Store) -> Rows:
    """By arm: what its worker holds beyond the baseline's, in bytes."""
    results = store.results(memory.NAME)
    base = results.get(memory.BASELINE)
    if base is None:
        return {}
    return {
        arm: row | {"held": row["trimmed_bytes"] - base["trimmed_bytes"]}
        for arm, row in results.items()
        if arm in ARMS
    }


def _memory(store: Store) -> Iterator[Verdict]:
    rows = memory_rows(store)
    if BF16 not in rows:
        return
    whole = rows[BF16]["checkpoint_bytes"]
    for arm, needed in MEMORY.items():
        if arm in rows:
            # Whichever is larger: neither may hide a copy.
            held = max(rows[arm]["held"], rows[arm]["tensor_bytes"])
            text = f"{arm}: weight memory, share of the bf16 weights"
            yield Verdict(text, needed, held / whole, "server", at_most=True)
    seconds = {arm: rows[arm]["load_seconds"] for arm in LOWBIT if arm in rows}
    if seconds:
        worst = max(seconds, key=lambda arm: seconds[arm])
        text = "quantizing while loading, seconds"
        yield Verdict(text, LOAD_SECONDS, seconds[worst], worst, at_most=True)


def against_llama_cpp(store: Store) -> dict[str, dict[str, float]]:
    """By measurement of llama-bench: its tokens per second and each arm's."""
    result = store.result(llama_cpp.NAME, llama_cpp.CELL)
    if result is None:
        return {}
    places = {"pp128": "1 x 128/128", "pp1024": "1 x 1024/32", "tg128": "1 x 128/128"}
    rows: dict[str, dict[str, float]] = {}
    for name, workload in places.items():
        rows[name] = {"llama.cpp Q4_0": result["tokens_per_s"][name]}
        for arm in ARMS:
            row = _workloads(store, arm).get(workload)
            if row is not None:
                decode = 1e3 / row["decode_ms"]
                rate = row["prefill_tokens_per_s"]
                rows[name][arm] = decode if name.startswith("tg") else rate
    return rows
