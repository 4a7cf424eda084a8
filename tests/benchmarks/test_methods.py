# SPDX-License-Identifier: Apache-2.0
"""The table of methods: its cells, when they run, and what follows from them."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

from vllm_lowbit.calibrate.recipe import built_in_recipes, load_recipe
from vllm_lowbit.errors import ConfigError

TEXTS = ("WikiText-2", "novel")


@pytest.fixture
def store(methods: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """An empty one; its verdicts do not read the texts, which takes seconds."""
    monkeypatch.setattr(methods("verdicts"), "overlaps", lambda: {"novel": 0})
    return methods("store").Store(tmp_path / "methods.json")


def record(perplexity: float, **more: Any) -> dict[str, Any]:
    """What a cell measures, the same on both texts."""
    blimp = {"items": 10, "accuracy": 0.6, "stderr": 0.01}
    blimp |= {"accuracy_norm": 0.5, "stderr_norm": 0.01}
    return {
        "threads": 1,
        "peak_mib": 900,
        "perplexity": dict.fromkeys(TEXTS, perplexity),
        "blimp": blimp,
        "date": "2026-11-24T10:00:00",
        "seconds": 60.0,
        "load_average_before": 1.0,
        "environment": 0,
        "fingerprint": "x",
        **more,
    }


def fill(methods: Any, store: Any, gaps: dict[str, list[float]], scheme: str) -> None:
    """Cells of both models whose gaps are these, seed by seed."""
    store.environments = [{"cpu": "test"}]
    for model in methods("cells").MODELS:
        store.cells[f"{model}/float/float/0"] = record(36.0, served=36.0)
        for method, by_seed in gaps.items():
            for seed, gap in enumerate(by_seed):
                perplexity = 36 * math.exp(gap)
                more: dict[str, Any] = {"calibration_seconds": 60.0}
                if seed == 0:
                    more["served"] = perplexity * 1.001
                key = f"{model}/{scheme}/{method}/{seed}"
                store.cells[key] = record(perplexity, **more)
                if ", " in method:
                    # An ablation.
                    del store.cells[key]["blimp"]


def by_line(methods: Any, store: Any) -> dict[str, Any]:
    return {each.line: each for each in methods("verdicts").verdicts(store)}


class TestCells:
    def test_keys_are_unique_and_the_first_seed_comes_first(self, methods: Any) -> None:
        cells = methods("cells").all_cells()
        assert len({cell.key for cell in cells}) == len(cells)
        seeds = [cell.seed for cell in cells]
        assert seeds == sorted(seeds) and set(seeds) == {0, 1, 2}

    def test_every_method_has_all_seeds_on_the_main_scheme(self, methods: Any) -> None:
        module = methods("cells")
        found: dict[tuple[str, str], set[int]] = {}
        for cell in module.select("*/w4a4kv4/*"):
            found.setdefault((cell.model, cell.method), set()).add(cell.seed)
        for (_, method), seeds in found.items():
            one = method in module.SEEDLESS or method not in module.METHODS
            assert seeds == ({0} if one else {0, 1, 2})
        assert {method for _, method in found} >= set(module.METHODS)

    def test_patterns(self, methods: Any) -> None:
        keys = [cell.key for cell in methods("cells").select("ref-7m/*/gptq/0")]
        assert "ref-7m/w4a16/gptq/0" in keys
        assert all(key.startswith("ref-7m/") for key in keys)

    def test_recipes_that_are_not_there_are_skipped(self, methods: Any) -> None:
        for cell in methods("cells").all_cells():
            names = {cell.recipe, f"{cell.recipe}-{cell.scheme}"}
            known = cell.recipe is None or names & set(built_in_recipes())
            assert cell.skipped() == (
                None if known else f"recipe {cell.recipe} does not exist"
            )

    def test_recipe(self, methods: Any) -> None:
        cell = methods("cells").Cell("ref-7m", "w2a16-g64", "gptq", 2, "gptq")
        expected = load_recipe("gptq").override("w2a16-g64", seed=2)
        assert cell.resolve() == expected

    def test_recipe_of_a_scheme_comes_first(
        self, methods: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        module = methods("cells")
        names = ("gptq", "gptq-w2a16-g64")
        monkeypatch.setattr(module, "built_in_recipes", lambda: names)
        asked = []

        def load(name: str) -> Any:
            asked.append(name)
            return load_recipe("gptq")

        monkeypatch.setattr(module, "load_recipe", load)
        for scheme in ("w2a16-g64", "w4a16"):
            module.Cell("ref-7m", scheme, "gptq", 0, "gptq").resolve()
        assert asked == ["gptq-w2a16-g64", "gptq"]

    def test_overrides(self, methods: Any) -> None:
        """A section is replaced as a whole; None removes a key."""

        def resolve(**overrides: Any) -> Any:
            keys = {key.replace("__", "."): value for key, value in overrides.items()}
            cell = methods("cells").Cell("m", "w4a4kv4", "x", 1, "quarot-gptq", keys)
            return cell.resolve()

        base = load_recipe("quarot-gptq").override(seed=1)
        assert resolve(weights={"method": "rtn"}).weights.method == "rtn"
        found = resolve(transforms__value="none", weights__damping=None)
        assert found.transforms.value == "none"
        assert found.transforms.residual == base.transforms.residual
        assert found.seed == 1
        with pytest.raises(ConfigError, match="key transforms.valu does not exist"):
            resolve(transforms__valu="none")

    def test_ablations_are_of_recipes_that_exist(self, methods: Any) -> None:
        """And each differs from what it is an ablation of, and from the others."""
        module = methods("cells")
        for recipe, parts in module.ABLATIONS.items():
            cells = module.select(f"ref-7m/w4a4kv4/{recipe}/0")
            cells += module.select(f"ref-7m/w4a4kv4/{recipe},*/0")
            hashes = [cell.resolve().sha256() for cell in cells]
            assert len(set(hashes)) == len(hashes) == 1 + len(parts)

    def test_clips(self, methods: Any) -> None:
        module = methods("cells")
        parts = ("inputs not clipped", "input clips learned")
        grids = [
            module.select(f"ref-7m/w4a4kv4/lowbit-best, {part}/0")[0]
            .resolve()
            .activations
            for part in parts
        ]
        assert [(grid.clip, grid.clip_ratio) for grid in grids] == [
            ("fixed", 1.0),
            ("learned", 0.9),
        ]

    def test_fingerprint(self, methods: Any) -> None:
        """Follows recipe, seed and what is shared; nothing else."""
        cell = methods("cells").Cell
        first = cell("ref-7m", "w4a16", "gptq", 0, "gptq")
        assert first.fingerprint({"a": 1}) == first.fingerprint({"a": 1})
        others = [
            first.fingerprint({"a": 2}),
            cell("ref-7m", "w4a16", "gptq", 1, "gptq").fingerprint({"a": 1}),
            cell("ref-7m", "w4a16", "gptq", 0, "quarot").fingerprint({"a": 1}),
        ]
        assert len({first.fingerprint({"a": 1}), *others}) == 4


class TestStore:
    def test_kept_at_once(self, methods: Any, store: Any) -> None:
        cell = methods("cells").all_cells()[0]
        assert not store.done(cell, "x")
        store.write(cell, record(36.0, environment={"cpu": "test"}))
        again = methods("store").Store(store.path)
        assert again.done(cell, "x") and not again.done(cell, "y")
        assert again.result(cell.key)["perplexity"]["novel"] == 36.0
        assert again.environments == [{"cpu": "test"}]
        assert again.result(cell.key)["environment"] == 0
        assert not list(store.path.parent.glob("*.new"))

    def test_errors_are_tried_again(self, methods: Any, store: Any) -> None:
        cell = methods("cells").all_cells()[0]
        error = "exit code 1\nTrace\nBad: y\n"
        store.write(cell, {"fingerprint": "x", "error": error, "environment": {}})
        assert not store.done(cell, "x")
        assert store.result(cell.key) is None
        assert store.errors() == {cell.key: "Bad: y"}

    def test_only_what_would_be_measured_again_is_reported(
        self, methods: Any, store: Any
    ) -> None:
        first, second, third = methods("cells").all_cells()[:3]
        for cell in (first, second, third):
            store.write(cell, record(36.0, environment={}))
        store.set_aside({first.key: "x", second.key: "of a changed recipe"})
        assert store.cells.keys() == {first.key}
        assert store.stale.keys() == {second.key, third.key}
        # Nothing is lost by what is measured next.
        changed = {**record(35.0, environment={}), "fingerprint": "of a changed recipe"}
        store.write(second, changed)
        again = methods("store").Store(store.path)
        assert again.cells.keys() == {first.key, second.key, third.key}
        assert store.stale.keys() == {third.key}
        assert again.result(second.key)["perplexity"]["novel"] == 35.0

    def test_time_limit_and_order(
        self, methods: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        module = methods("run")
        cells = [(cell, "x") for cell in methods("cells").all_cells()[:4]]
        shares: list[list[int]] = []

        def run(cell: Any, fingerprint: str, share: list[int], *rest: Any) -> Any:
            shares.append(share)
            return {"key": cell.key}

        monkeypatch.setattr(module, "measure", run)
        seen: list[str] = []
        keep = lambda cell, record: seen.append(record["key"])
        assert module.run_here(cells, 1, None, tmp_path, keep) == 0
        assert seen == [cell.key for cell, _ in cells]
        assert module.run_here(cells, 2, -1.0, tmp_path, keep) == 4
        assert len(seen) == 4

    def test_a_cell_that_fails(self, methods: Any, tmp_path: Path) -> None:
        """Its last words are kept, and the others go on."""
        cells = methods("cells")
        broken = cells.Cell("ref-7m", "w4a16", "no such method")
        kept: list[Any] = []
        methods("run").run_here(
            [(broken, "x")], 1, None, tmp_path, lambda cell, record: kept.append(record)
        )
        assert kept[0]["error"].startswith("exit code 1\n")
        assert "no cell is named" in kept[0]["error"]

    def test_no_workers(
        self,
        methods: Any,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        monkeypatch.setattr("sys.argv", ["methods", "--workers", "0"])
        with pytest.raises(SystemExit):
            methods("__main__").main()
        assert "argument --workers: at least 1, got 0" in capsys.readouterr().err

    def test_on_a_cluster(self, methods: Any, tmp_path: Path) -> None:
        """Each cell in a process of its own on a node, its words and record here."""
        pytest.importorskip("ray", reason="extra `ray`")
        cells = methods("cells")
        broken = [
            (cells.Cell("ref-7m", "w4a16", f"no such method {n}"), f"{n}")
            for n in range(3)
        ]
        kept: dict[str, Any] = {}
        run = methods("run").run_on_cluster
        keep = lambda cell, record: kept.update({cell.method: record})
        assert run(broken, "local", None, tmp_path, keep) == 0
        for number in range(3):
            record = kept[f"no such method {number}"]
            assert record["error"].startswith("exit code 1\n")
            assert (
                f"no cell is named 'ref-7m/w4a16/no such method {number}/0'"
                in (record["error"])
            )
            assert record["fingerprint"] == str(number)
            assert "cpu" in record["environment"]
        assert run(broken, "local", -1.0, tmp_path, keep) == 3


class TestFigures:
    def test_gaps(self, methods: Any, store: Any) -> None:
        fill(methods, store, {"gptq": [0.1, 0.2, 0.6]}, "w4a4kv4")
        row = methods("summary").row(store, "ref-7m", "w4a4kv4", "gptq")
        gap = row.gap["novel"]
        assert gap.mean == pytest.approx(0.3)
        assert (gap.least, gap.most) == pytest.approx((0.1, 0.6))
        assert row.apart == pytest.approx(math.log(1.001))
        assert row.seconds.mean == 60 and row.apart_float32 is None

    def test_mean_of_texts(self, methods: Any, store: Any) -> None:
        fill(methods, store, {"gptq": [0.1, 0.2, 0.6]}, "w4a4kv4")
        texts = store.cells["ref-7m/w4a4kv4/gptq/1"]["perplexity"]
        texts["novel"] *= math.exp(0.3)
        gap = methods("summary").row(store, "ref-7m", "w4a4kv4", "gptq").mean_gap
        assert gap.by_seed == pytest.approx({0: 0.1, 1: 0.35, 2: 0.6})

    def test_not_measured(self, methods: Any, store: Any) -> None:
        assert methods("summary").row(store, "ref-7m", "w4a4kv4", "gptq") is None

    def test_verdicts(self, methods: Any, store: Any) -> None:
        gaps = {
            "quarot-gptq": [0.10, 0.12, 0.11],
            "spinquant": [0.10, 0.10, 0.10],
            "ostquant": [0.08, 0.09, 0.101],
            "lowbit-best": [0.05, 0.05, 0.05],
        }
        fill(methods, store, gaps, "w4a4kv4")
        found = by_line(methods, store)
        start = "w4a4kv4: gap of "
        for line, holds, value in (
            ("ostquant over that of quarot-gptq, worst seed", True, 0.101 / 0.11),
            ("ostquant over that of quarot-gptq, means", True, 0.271 / 0.33),
            ("ostquant over that of spinquant, worst seed", False, 1.01),
            ("ostquant over that of spinquant, means", False, 0.271 / 0.3),
            ("lowbit-best over that of ostquant, means", True, 0.15 / 0.271),
            ("lowbit-best over that of quarot-gptq, means", True, 0.15 / 0.33),
        ):
            verdict = found[start + line]
            assert verdict.holds is holds, line
            assert verdict.values["ref-7m"] == pytest.approx(value), line
        assert found[start + "lowbit-best over that of quarot-gptq, means"].aim
        assert found["w2a16-g64: gap of omniquant over that of rtn"].holds is None
        quick = found["w4a4kv4: calibrating ref-7m by ostquant, 2 threads at most"]
        assert quick.holds and quick.values == {"ref-7m": 1.0}

    def test_a_seed_that_is_missing_decides_nothing(
        self, methods: Any, store: Any
    ) -> None:
        gaps = {"quarot-gptq": [0.1, 0.1, 0.1], "ostquant": [0.05, 0.05]}
        fill(methods, store, gaps, "w4a4kv4")
        found = by_line(methods, store)
        line = "w4a4kv4: gap of ostquant over that of quarot-gptq, worst seed"
        assert found[line].holds is None

    def test_served_apart(self, methods: Any, store: Any) -> None:
        fill(methods, store, {"rtn": [0.3]}, "w4a16")
        line = (
            "served perplexity apart from the calibrator's, worst method; in float32, "
            "as the calibrator, where in bfloat16 it is further"
        )
        verdict = by_line(methods, store)[line]
        assert verdict.holds is None
        assert verdict.values["ref-7m, w4a16"] == pytest.approx(0.1, rel=1e-2)
        cell = store.cells["ref-7m/w4a16/rtn/0"]
        cell["served"] *= 1.01
        assert by_line(methods, store)[line].holds is False
        cell["served_float32"] = cell["perplexity"]["WikiText-2"] * 1.002
        again = by_line(methods, store)[line]
        assert again.values["ref-7m, w4a16"] == pytest.approx(0.2, rel=1e-2)


class TestOverlap:
    def test_evaluation_texts_were_not_calibrated_on(self, methods: Any) -> None:
        """Of no text 13 words in a row, of no sentence of BLiMP all five in a row."""
        assert methods("protocol").overlaps() == {
            "WikiText-2": 0,
            "novel": 0,
            "BLiMP": 0,
        }

    def test_it_would_be_found(
        self, methods: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        protocol = methods("protocol")
        lines = protocol.calibration_text().read_text("utf-8").splitlines()
        words = max(lines, key=len).split()[20:50]
        stolen = tmp_path / "novel.txt"
        stolen.write_text("Something else, then: " + " ".join(words).upper())
        pair = {"sentence_good": " ".join(words[:8]) + ".", "sentence_bad": "A b c d e"}
        (tmp_path / "a.jsonl").write_text(json.dumps(pair) + "\n")
        monkeypatch.setattr(protocol, "TEXTS", {"novel": (stolen, None)})
        monkeypatch.setattr(protocol, "BLIMP", tmp_path)
        assert protocol.overlaps() == {
            "novel": len(_alphanumeric(words)) - 12,
            "BLiMP": 1,
        }

    def test_ngrams(self, methods: Any) -> None:
        ngrams = methods("protocol").ngrams
        found = ngrams("The cat , it 's here\nand Gone", 3)
        assert found == {("the", "cat", "it"), ("cat", "it", "s"), ("it", "s", "here")}
        assert ngrams("<unk> <unk> a <unk> b c", 3) == {
            ("a", "unk", "b"),
            ("unk", "b", "c"),
        }


def _alphanumeric(words: list[str]) -> list[str]:
    return [word for word in words if any(map(str.isalnum, word))]


def test_report(methods: Any, store: Any) -> None:
    gaps = {
        "rtn": [0.5],
        "quarot-gptq": [0.10, 0.12, 0.11],
        "ostquant": [0.08, 0.09, 0.1],
        "ostquant, without scales": [0.09],
    }
    fill(methods, store, gaps, "w4a4kv4")
    fill(methods, store, {"gptq": [-0.001]}, "w4a16")
    store.cells["ref-7m/w4a16/rtn/0"] = record(1.0, error="exit code 1\nBad: z")
    directory = store.path.parent
    text = methods("report").write_report(store, directory)
    assert (directory / "methods.md").read_text() == text
    gap = "0.1100 (0.1000 to 0.1200)"
    assert f"| quarot-gptq | {gap} | 40.19 (39.79 to 40.59) | {gap} |" in text
    row = " | ".join(["0.0900"] * 6)  # of two models: the mean, both texts
    assert f"| without scales | {row} |\n" in text
    assert "ref-7m 0.0800 to 0.1000, ref-7m-outliers 0.0800 to 0.1000." in text
    assert "failed: ref-7m/w4a16/rtn/0: Bad: z" in text
    tables = [part.splitlines() for part in text.split("\n\n") if part.startswith("| ")]
    assert len(tables) >= 5
    for table in tables:
        assert len({line.count("|") for line in table}) == 1, table[0]
    for name in ("methods.png", "methods-other.png"):
        assert f"]({name})" in text
        assert (directory / name).read_bytes().startswith(b"\x89PNG")
