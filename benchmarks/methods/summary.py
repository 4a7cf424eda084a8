# SPDX-License-Identifier: Apache-2.0
"""Figures of methods.json put together over seeds."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from .cells import FLOAT, SEEDS
from .protocol import MAIN_TEXT, TEXTS
from .store import Record, Store


@dataclass(frozen=True)
class Spread:
    """Values of one figure by seed; one seed at least."""

    by_seed: dict[int, float]

    @property
    def mean(self) -> float:
        return math.fsum(self.by_seed.values()) / len(self.by_seed)

    @property
    def least(self) -> float:
        return min(self.by_seed.values())

    @property
    def most(self) -> float:
        return max(self.by_seed.values())


@dataclass(frozen=True)
class Row:
    """A method on a model and scheme.

    Attributes:
        method: its name.
        perplexity: by the name of the text.
        gap: log perplexity over that of the float model, by the name of the text.
        accuracy: on BLiMP, the mean over paradigms; None for an ablation.
        stderr: of the first seed's accuracy.
        seconds: of calibration, None for a method without.
        served: vLLM's perplexity of the first text, first seed; None if not measured.
        apart: its log over the reference's.
        apart_float32: the same in float32, where vLLM's own dtype is too far apart.
    """

    method: str
    perplexity: dict[str, Spread]
    gap: dict[str, Spread]
    accuracy: Spread | None
    stderr: float | None
    seconds: Spread | None
    served: float | None
    apart: float | None
    apart_float32: float | None

    @property
    def mean_gap(self) -> Spread:
        """Over the texts, which weigh alike.

        Rounding also moves a model from one text towards the other, by more than two
        methods differ; the mean hardly feels it.
        """
        seeds = next(iter(self.gap.values())).by_seed
        texts = self.gap.values()
        return Spread(
            {s: math.fsum(t.by_seed[s] for t in texts) / len(texts) for s in seeds}
        )


def row(store: Store, model: str, scheme: str, method: str) -> Row | None:
    """The row of a method, over the seeds that were measured; None without any."""
    records = _records(store, model, scheme, method)
    base = store.result(f"{model}/{FLOAT}/{FLOAT}/{SEEDS[0]}")
    if not records or base is None:
        return None
    perplexity = {
        text: Spread({seed: r["perplexity"][text] for seed, r in records.items()})
        for text in TEXTS
    }
    first = next(iter(records.values()))
    seconds = {
        seed: record["calibration_seconds"]
        for seed, record in records.items()
        if "calibration_seconds" in record
    }
    return Row(
        method=method,
        perplexity=perplexity,
        gap={
            text: _gaps(spread, base["perplexity"][text])
            for text, spread in perplexity.items()
        },
        accuracy=_accuracy(records),
        stderr=first["blimp"]["stderr"] if "blimp" in first else None,
        seconds=Spread(seconds) if seconds else None,
        served=first.get("served"),
        apart=_apart(first, "served"),
        apart_float32=_apart(first, "served_float32"),
    )


def rows(store: Store, model: str, scheme: str, methods: Sequence[str]) -> list[Row]:
    """Those of the methods that were measured."""
    found = (row(store, model, scheme, method) for method in methods)
    return [each for each in found if each is not None]


def _records(store: Store, model: str, scheme: str, method: str) -> dict[int, Record]:
    keys = {seed: f"{model}/{scheme}/{method}/{seed}" for seed in SEEDS}
    found = {seed: store.result(key) for seed, key in keys.items()}
    return {seed: record for seed, record in found.items() if record is not None}


def _accuracy(records: dict[int, Record]) -> Spread | None:
    if not all("blimp" in record for record in records.values()):
        return None
    return Spread({s: r["blimp"]["accuracy"] for s, r in records.items()})


def _gaps(perplexities: Spread, base: float) -> Spread:
    pairs = perplexities.by_seed.items()
    return Spread({seed: math.log(value / base) for seed, value in pairs})


def _apart(record: Record, served: str) -> float | None:
    if served not in record:
        return None
    return math.log(record[served] / record["perplexity"][MAIN_TEXT])
