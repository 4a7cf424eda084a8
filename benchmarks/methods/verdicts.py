# SPDX-License-Identifier: Apache-2.0
"""What must hold, and whether the measured cells say so."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from .cells import ABLATIONS, FLOAT, MAIN_SCHEME, MODELS, SCHEMES, all_cells
from .measure import SERVED_BOUND
from .protocol import overlaps
from .store import Store
from .summary import Row, row

GROUPED = ("w2a16-g64", "w3a16-g128")
# Minutes of the slowest learned recipe on the small model, on two cores.
MINUTES, THREADS = 15.0, 2


@dataclass(frozen=True)
class Verdict:
    """A line that must hold.

    Attributes:
        line: what is claimed.
        needed: the largest value with which it holds.
        strict: whether that value itself is too large.
        values: what was measured, by place; None where something is missing.
        unit: of the values, ``x`` for a ratio.
        aim: whether it is wished for only.
    """

    line: str
    needed: float
    values: dict[str, float | None]
    strict: bool = False
    unit: str = "x"
    aim: bool = False

    @property
    def holds(self) -> bool | None:
        """None where a place that would decide it was not measured."""
        known = [value for value in self.values.values() if value is not None]
        if any(not self._within(value) for value in known):
            return False
        return True if known and len(known) == len(self.values) else None

    def _within(self, value: float) -> bool:
        return value < self.needed if self.strict else value <= self.needed


def verdicts(store: Store) -> list[Verdict]:
    """Every line, in the order of importance."""
    return [
        *_learned(store),
        *_weight_only(store),
        served_apart(store),
        _quick(store),
        _no_overlap(),
        _complete(store),
    ]


def _learned(store: Store) -> Iterator[Verdict]:
    for other in ("quarot-gptq", "spinquant"):
        yield Verdict(
            f"{MAIN_SCHEME}: gap of ostquant over that of {other}, worst seed",
            1.0,
            _over(store, MAIN_SCHEME, "ostquant", other, _worst),
            strict=True,
        )
        yield Verdict(
            f"{MAIN_SCHEME}: gap of ostquant over that of {other}, means",
            0.9,
            _over(store, MAIN_SCHEME, "ostquant", other, _all_means),
        )
    yield Verdict(
        f"{MAIN_SCHEME}: gap of lowbit-best over that of ostquant, means",
        0.9,
        _over(store, MAIN_SCHEME, "lowbit-best", "ostquant", _all_means),
    )
    yield Verdict(
        f"{MAIN_SCHEME}: gap of lowbit-best over that of quarot-gptq, means",
        0.6,
        _over(store, MAIN_SCHEME, "lowbit-best", "quarot-gptq", _all_means),
        aim=True,
    )


def _weight_only(store: Store) -> Iterator[Verdict]:
    for scheme in GROUPED:
        for other in ("gptq", "rtn"):
            yield Verdict(
                f"{scheme}: gap of omniquant over that of {other}",
                0.9,
                _over(store, scheme, "omniquant", other, _means),
            )
        yield Verdict(
            f"{scheme}: gap of lowbit-best over that of omniquant",
            1.0,
            _over(store, scheme, "lowbit-best", "omniquant", _means),
            strict=True,
        )


def _over(
    store: Store,
    scheme: str,
    method: str,
    other: str,
    ratio: Callable[[Row, Row], float | None],
) -> dict[str, float | None]:
    values: dict[str, float | None] = {}
    for model in MODELS:
        ours, theirs = (row(store, model, scheme, each) for each in (method, other))
        both = ours is not None and theirs is not None
        values[model] = ratio(ours, theirs) if both else None
    return values


def _means(ours: Row, theirs: Row) -> float | None:
    return ours.mean_gap.mean / theirs.mean_gap.mean


def _all_means(ours: Row, theirs: Row) -> float | None:
    """Over all seeds; None unless both have them."""
    return _means(ours, theirs) if _have_all_seeds(ours, theirs) else None


def _worst(ours: Row, theirs: Row) -> float | None:
    """Seed by seed; None unless both have all of them."""
    if not _have_all_seeds(ours, theirs):
        return None
    ratios = ours.mean_gap.by_seed, theirs.mean_gap.by_seed
    return max(ratios[0][seed] / ratios[1][seed] for seed in ratios[0])


def _have_all_seeds(*rows: Row) -> bool:
    seeds = SCHEMES[MAIN_SCHEME][1]
    return all(len(each.mean_gap.by_seed) == seeds for each in rows)


def served_apart(store: Store) -> Verdict:
    """How far vLLM's perplexity is from the calibrator's, for every scheme."""
    values: dict[str, float | None] = {}
    for scheme, (methods, _) in {FLOAT: ((FLOAT,), 1), **SCHEMES}.items():
        for model in MODELS:
            found = [row(store, model, scheme, method) for method in methods]
            apart = [_apart(r) for r in found if r is not None]
            known = [value for value in apart if value is not None]
            values[f"{model}, {scheme}"] = 100 * max(known) if known else None
    line = (
        "served perplexity apart from the calibrator's, worst method; in float32, as "
        "the calibrator, where in bfloat16 it is further"
    )
    return Verdict(line, 100 * SERVED_BOUND, values, unit="%")


def _apart(found: Row) -> float | None:
    apart = found.apart if found.apart_float32 is None else found.apart_float32
    return None if apart is None else abs(apart)


def _quick(store: Store) -> Verdict:
    record = store.result(f"ref-7m/{MAIN_SCHEME}/ostquant/0")
    minutes = None
    if record is not None and record["threads"] <= THREADS:
        minutes = record["calibration_seconds"] / 60
    line = f"{MAIN_SCHEME}: calibrating ref-7m by ostquant, {THREADS} threads at most"
    return Verdict(line, MINUTES, {"ref-7m": minutes}, unit=" min")


def _no_overlap() -> Verdict:
    line = "pieces of the evaluation texts that the calibration text holds"
    return Verdict(line, 0.0, {**overlaps()}, unit="")


def _complete(store: Store) -> Verdict:
    """Cells that are missing; ablations count as the table does."""
    count = sum(map(len, ABLATIONS.values()))
    names = {"table": False, f"{count} ablations": True}
    values: dict[str, float | None] = {
        name: sum(
            store.result(cell.key) is None
            for cell in all_cells()
            if bool(cell.overrides) == ablation
        )
        for name, ablation in names.items()
    }
    return Verdict("cells not measured", 0.0, values, unit="")
