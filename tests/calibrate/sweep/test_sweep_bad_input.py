# SPDX-License-Identifier: Apache-2.0
"""`vllm-lowbit sweep` refuses before anything is written or started."""

import math
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from vllm_lowbit.calibrate.pipeline import calibrate, configure
from vllm_lowbit.calibrate.recipe import load_recipe
from vllm_lowbit.calibrate.scoring import reference_memory
from vllm_lowbit.calibrate.sweep import plan, run
from vllm_lowbit.calibrate.text import default_text
from vllm_lowbit.errors import ConfigError

from .commands import MEASURED, SMALL, TASK, settings_of, sweep


class TestRefused:
    """Before anything is written or started."""

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (("--recipe", "rtm"), "recipe 'rtm' does not exist; did you mean rtn?"),
            (("--scheme", "w5a5"), "scheme 'w5a5' does not exist"),
            (("--scheme", "w4a16-g48"), "group_size"),
            (("--recipe", "rtn"), "--recipe rtn is given twice"),
            (("--seed", 1, "--seed", 1), "--seed 1 is given twice"),
            (("--seed", -1), "seed"),
            (("--scheme", "w4a4", "--scheme", "w4a4"), "--scheme w4a4 is given twice"),
            (("--calibration-data", "/no/text"), "/no/text: cannot be read: No such"),
            (("--data", "/no/text"), "/no/text: cannot be read: No such"),
            (("--tasks", "/no/tasks"), "/no/tasks: cannot be read: No such"),
            (("--tasks", TASK, "--tasks", TASK), "two files are called adjunct_island"),
            (("--samples", 60_000), "60032 windows of 32 need"),
            (("--seq-len", 257), "max_position_embeddings 256"),
            (("--max-tokens", 1), "max_tokens must be at least 2, got 1"),
            (("--scratch", "/no/place"), "scratch /no/place: not a directory"),
            (("--workers", 0), "--workers must be at least 1, got 0"),
            (("--workers", 1, "--ray", "auto"), "pass one of them"),
        ],
    )
    def test_options(
        self,
        model: Path,
        tmp_path: Path,
        started: list[str],
        options: tuple[object, ...],
        message: str,
    ) -> None:
        words = ("-o", tmp_path / "out", "--recipe", "rtn", *SMALL, *MEASURED)
        stdout, stderr = sweep(model, *words, *options, code=1)
        assert stderr.startswith("error: ") and message in stderr, stderr
        assert stdout == "" and not started and not list(tmp_path.iterdir())

    def test_nothing_to_measure(self, model: Path, tmp_path: Path) -> None:
        words = (model, "-o", tmp_path / "out", "--recipe", "rtn")
        _, stderr = sweep(*words, code=1)
        assert stderr == "error: pass --data, --tasks or both\n"

    def test_of_what_is_not_measured(self, model: Path, tmp_path: Path) -> None:
        words = (model, "-o", tmp_path / "out", "--recipe", "rtn", "--tasks", TASK)
        _, stderr = sweep(*words, "--max-tokens", 64, code=1)
        assert stderr == "error: --max-tokens has no effect without --data, remove it\n"

    def test_two_recipes_of_one_name(self, model: Path, tmp_path: Path) -> None:
        recipe = tmp_path / "a.yaml"
        recipe.write_text("name: rtn\n")
        words = (model, "-o", tmp_path / "out", *MEASURED)
        recipes = ("--recipe", "rtn", "--recipe", recipe)
        _, stderr = sweep(*words, *recipes, code=1)
        assert f"recipes rtn and {recipe} are both called rtn; their key" in stderr

    def test_no_ray(
        self, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setitem(sys.modules, "ray", None)
        words = (model, "-o", tmp_path / "out", "--recipe", "rtn", *MEASURED)
        _, stderr = sweep(*words, "--ray", "auto", code=1)
        assert stderr == (
            "error: the package ray is not installed; this command needs it: "
            "pip install 'vllm-lowbit[ray]'\n"
        )

    def test_no_model(self, tmp_path: Path) -> None:
        words = ("-o", tmp_path / "out", "--recipe", "rtn", *MEASURED)
        _, stderr = sweep("/no/model", *words, code=1)
        assert stderr == "error: model /no/model: not a directory\n"

    def test_memory(
        self,
        model: Path,
        tmp_path: Path,
        started: list[str],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        """Of all that would run at a time, to calibrate or to measure it."""
        monkeypatch.setattr(plan, "available_memory", lambda: 1000)
        words = (model, "-o", tmp_path / "out", "--recipe", "rtn", *SMALL, *MEASURED)
        _, stderr = sweep(*words, "--workers", 2, code=1)
        assert "2 runs at a time take about" in stderr
        assert not started and not list(tmp_path.iterdir())
        made = plan.make_plan(settings_of(model))
        large, small = replace(made.runs[1], measuring=700), made.runs[0]
        monkeypatch.setattr(plan.Plan, "calibrating", lambda *_: 300)
        small = replace(small, measuring=200)
        made.check_memory([small, small, large], 2)
        with pytest.raises(ConfigError, match=r"3 runs at a time .*; --workers 2 fits"):
            made.check_memory([small, small, large], 3)
        large = replace(large, measuring=1001)
        with pytest.raises(ConfigError, match=f"measuring {large.name} by the refer"):
            made.check_memory([small, large], 1)
        monkeypatch.setattr(plan.Plan, "calibrating", lambda *_: 1001)
        with pytest.raises(ConfigError, match="use --scratch DIR, or fewer or short"):
            made.check_memory([small], 1)

    def test_memory_of_measuring(self, model: Path) -> None:
        """All weights at once, unlike calibrating."""
        made = plan.make_plan(settings_of(model, recipes=["rtn"], vocab_bits=16))
        floats, quantized = made.runs
        shape = replace(made.source.shape, num_layers=100)
        assert quantized.recipe is not None
        config = configure(made.source, quantized.recipe, "model")
        weights = sum(map(math.prod, shape.tensors().values()))
        of_float = reference_memory(shape, None, 0, 64)
        assert 4 * weights < of_float < 4 * weights + floats.measuring
        of_quantized = reference_memory(shape, config, weights // 2, 64)
        assert weights < of_quantized < of_float
        assert reference_memory(shape, None, 0, 65536) > of_float + 8 * 65536**2


class TestDirectory:
    """One that is not this sweep's is refused as it is."""

    @pytest.fixture
    def words(self, model: Path, tmp_path: Path) -> list[object]:
        out = tmp_path / "out"
        return [model, "-o", out, "--recipe", "rtn", *SMALL, *MEASURED]

    def refused(self, words: list[object], message: str) -> None:
        out = Path(str(words[2]))
        before = sorted(out.rglob("*")) if out.is_dir() else None
        _, stderr = sweep(*words, code=1)
        assert message in stderr
        assert before is None or sorted(out.rglob("*")) == before

    def test_something_else(self, words: list[object], tmp_path: Path) -> None:
        out = tmp_path / "out"
        out.write_text("a file")
        self.refused(words, f"output {out} exists and is not a directory")
        out.unlink()
        out.mkdir()
        (out / "notes.txt").write_text("mine")
        self.refused(words, f"{out} holds something else than a sweep, as sweep.json")
        (out / "sweep.json").write_text("{")
        self.refused(words, f"{out}/sweep.json: is not JSON")
        (out / "sweep.json").write_text('{"model": "x", "runs": {"a": {"b": 1}}}')
        self.refused(words, f"{out}/sweep.json: key runs.a.scheme: Field required")
        (out / "sweep.json").write_text('{"model": "another"}')
        self.refused(words, f"{out} holds a sweep of another, not of ")

    def test_no_parent(self, words: list[object], tmp_path: Path) -> None:
        words[2] = tmp_path / "a" / "b"
        self.refused(words, f"{tmp_path / 'a'} is not a directory")

    def test_checkpoints(
        self, words: list[object], model: Path, tmp_path: Path, started: list[str]
    ) -> None:
        """That lie where one of ours would."""
        sweep(*words)
        out = tmp_path / "out"
        mine = out / "rtn-w4a4kv4-seed0"
        other = out / "rtn-w4a4-seed0"
        calibrate(
            str(model),
            other,
            load_recipe("rtn").override("w4a4", 4, 32),
            default_text(),
            "cpu",
        )
        words += ["--scheme", "w4a4", "--workers", 1]
        self.refused(words, f"{other} is there, and not of this sweep")
        shutil.rmtree(mine)
        other.rename(mine)
        words = [*words[:-4], "--limit", 2, "--tasks", TASK]
        self.refused(words, f"{mine}: is not what the sweep made by its recipe")

    def test_another_sweep_at_work(
        self, words: list[object], tmp_path: Path, started: list[str]
    ) -> None:
        with run.locked(tmp_path / "out"):
            self.refused(words, "another sweep is at work")
        sweep(*words)
