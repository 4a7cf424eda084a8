# SPDX-License-Identifier: Apache-2.0
"""`vllm-lowbit sweep`: what is run, what is not run again, and what it writes."""

import dataclasses
import errno
import math
import shutil
from pathlib import Path
from typing import Any

import pytest

from vllm_lowbit.calibrate import source
from vllm_lowbit.calibrate.choices import evaluate_choices
from vllm_lowbit.calibrate.evaluate import evaluate
from vllm_lowbit.calibrate.learn.snapshot import snapshot_path
from vllm_lowbit.calibrate.pipeline import calibrate
from vllm_lowbit.calibrate.processes import Ended
from vllm_lowbit.calibrate.recipe import Recipe, load_recipe
from vllm_lowbit.calibrate.sweep import one, plan, run
from vllm_lowbit.calibrate.text import default_text
from vllm_lowbit.errors import CalibrationError

from .commands import MEASURED, SMALL, TASK, TEXT, records, settings_of, sweep


class TestSweep:
    def test_figures_are_those_of_calibrate_and_evaluate(
        self, model: Path, tmp_path: Path, started: list[str]
    ) -> None:
        out = tmp_path / "out"
        recipes = ("--recipe", "rtn", "--recipe", "quarot")
        seeds = ("--seed", 0, "--seed", 3)
        tasks = ("--tasks", TASK, "--limit", 4, "--workers", 1)
        stdout, stderr = sweep(
            *(model, "-o", out, *recipes, *seeds, "--scheme", "w4a4"),
            *(*SMALL, *MEASURED, *tasks),
        )
        assert started == [
            "float",
            *("rtn-w4a4-seed0", "quarot-w4a4-seed0"),
            *("rtn-w4a4-seed3", "quarot-w4a4-seed3"),
        ]
        found = records(out)
        assert sorted(found) == sorted(started)
        alone = tmp_path / "alone"
        recipe = load_recipe("quarot").override("w4a4", 4, 32, 3)
        calibrate(str(model), alone, recipe, default_text(), "cpu")
        for directory, name in ((model, "float"), (alone, "quarot-w4a4-seed3")):
            text = evaluate(str(directory), TEXT, 64, 200)
            answers = evaluate_choices(str(directory), [TASK], 4)
            record = found[name]
            assert record["perplexity"] == text.perplexity
            assert record["tokens"] == text.tokens
            assert record["mean"]["accuracy"] == answers.mean.accuracy
            assert record["tasks"]["adjunct_island"]["items"] == 4
        weights = "model.safetensors"
        kept = out / "quarot-w4a4-seed3"
        assert (kept / weights).read_bytes() == (alone / weights).read_bytes()
        base = found["float"]["perplexity"]
        gaps = [
            math.log(found[f"quarot-w4a4-seed{seed}"]["perplexity"] / base)
            for seed in (0, 3)
        ]
        assert found["quarot-w4a4-seed3"]["gap"] == pytest.approx(gaps[1], abs=1e-12)
        shown = "{:.4f} ({:.4f} to {:.4f})".format(sum(gaps) / 2, *sorted(gaps))
        assert shown in stdout
        markdown = (out / "sweep.md").read_text()
        assert "| quarot | w4a4 | 0, 3 | " in markdown and f" | {shown} | " in markdown
        assert "5/5 quarot-w4a4-seed3: perplexity" in stderr
        assert not list(out.glob("*.new")) and not list(out.glob(".*.new"))

    def test_order(self, model: Path) -> None:
        """Seed by seed; a recipe keeps its scheme and seed where none is given."""
        settings = settings_of(
            model,
            recipes=["rtn", "gptq"],
            schemes=["w4a4", "w4a16-g64"],
            seeds=[3, 0],
            vocab_bits=8,
        )
        runs = plan.make_plan(settings).runs
        assert [each.name for each in runs] == [
            "float",
            *("rtn-w4a4-seed3", "rtn-w4a16-g64-seed3"),
            *("gptq-w4a4-seed3", "gptq-w4a16-g64-seed3"),
            *("rtn-w4a4-seed0", "rtn-w4a16-g64-seed0"),
            *("gptq-w4a4-seed0", "gptq-w4a16-g64-seed0"),
        ]
        first = load_recipe("rtn").override("w4a4", 4, 32, 3, 8)
        assert runs[1].recipe == first
        own = dataclasses.replace(settings, schemes=[], seeds=[], vocab_bits=None)
        assert [each.recipe for each in plan.make_plan(own).runs] == [
            None,
            load_recipe("rtn").override(samples=4, seq_len=32),
            load_recipe("gptq").override(samples=4, seq_len=32),
        ]

    def test_memory_is_what_calibrate_says(self, model: Path, tmp_path: Path) -> None:
        """At least: what is written is counted in the widest types."""
        made = plan.make_plan(settings_of(model, recipes=["lowbit"]))
        lowbit, said = made.runs[1], []
        assert lowbit.recipe is not None
        arguments = str(model), tmp_path / "out", lowbit.recipe, default_text()
        calibrate(*arguments, "cpu", announce=said.append)
        (estimate,) = said
        more = made.calibrating(lowbit) - estimate.memory
        assert 0 <= more <= estimate.output

    def test_done_is_done(
        self, model: Path, tmp_path: Path, started: list[str]
    ) -> None:
        """What changes is run again, as far as it must, and what is new is added."""
        out, text = tmp_path / "out", tmp_path / "text"
        text.write_text(default_text().read_text()[:20_000])
        recipe = tmp_path / "mine.yaml"
        recipe.write_text("name: mine\nscheme: w4a16\n")
        words = (model, "-o", out, "--recipe", recipe, *SMALL, "--workers", 1)
        words += ("--calibration-data", text)

        def again(*options: object) -> list[str]:
            started.clear()
            sweep(*words, *options)
            return started[:]

        mine = "mine-w4a16-seed0"
        assert again(*MEASURED) == ["float", mine]
        weights = out / mine / "model.safetensors"
        made = weights.stat().st_mtime_ns
        first = records(out)
        assert again(*MEASURED) == [] and records(out) == first
        # A copy of the text at another path is the same text.
        copy = shutil.copy(TEXT, tmp_path / "copy")
        assert again("--data", copy, *MEASURED[2:]) == []
        fewer = (*MEASURED[:-1], 100)
        assert again(*fewer) == ["float", mine]
        assert weights.stat().st_mtime_ns == made
        seconds = records(out)[mine]["calibration_seconds"]
        assert seconds == first[mine]["calibration_seconds"]
        assert again(*fewer, "--recipe", "rtn", "--scheme", "w4a16") == [
            "rtn-w4a16-seed0"
        ]
        recipe.write_text("name: mine\nscheme: w4a16\nweights: {method: rtn}\n")
        before = records(out)
        _, stderr = sweep(*words, *fewer, code=1)
        assert f"error: {out / mine}: made from another recipe, model or" in stderr
        assert weights.stat().st_mtime_ns == made and records(out) == before
        shutil.rmtree(out / mine)
        text.write_text(default_text().read_text()[20_000:40_000])
        assert again(*fewer) == [mine]
        # The other one was measured before the text changed, but stays on record.
        assert "rtn-w4a16-seed0" in records(out)
        assert "rtn" not in (out / "sweep.md").read_text()

    def test_checkpoints_can_go(
        self, model: Path, tmp_path: Path, started: list[str]
    ) -> None:
        out = tmp_path / "out"
        words = (model, "-o", out, "--recipe", "rtn", *SMALL, *MEASURED)
        sweep(*words, "--remove-checkpoints")
        assert len(started) == 2
        names = {path.name for path in out.iterdir()}
        assert names == {"sweep.json", "sweep.md", ".sweep.lock"}
        sweep(*words)
        assert len(started) == 2

    def test_a_run_that_fails(
        self,
        model: Path,
        tmp_path: Path,
        started: list[str],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        """The others go on; it is tried again by the same command."""
        out, recipes = tmp_path / "out", ("--recipe", "gptq", "--recipe", "rtn")
        words = (model, "-o", out, *recipes, *SMALL, *MEASURED, "--workers", 1)

        def broken(model: str, output: Path, recipe: Recipe, *rest: Any) -> None:
            if recipe.name == "gptq":
                raise CalibrationError("layer 1: not finite")
            calibrate(model, output, recipe, *rest)

        with monkeypatch.context() as patch:
            patch.setattr(one, "calibrate", broken)
            _, stderr = sweep(*words, code=1)
        name, other = "gptq-w4a4kv4-seed0", "rtn-w4a4kv4-seed0"
        assert started == ["float", name, other]
        failed = f"failed: {name}: error: layer 1: not finite"
        assert stderr.splitlines()[-1] == failed
        assert "some words" not in stderr
        error = "some words\nerror: layer 1: not finite"
        assert records(out)[name]["error"] == error
        assert failed in (out / "sweep.md").read_text()
        assert records(out)[other]["gap"] is not None
        started.clear()
        sweep(*words)
        assert started == [name]
        assert "error" not in records(out)[name]
        assert "failed" not in (out / "sweep.md").read_text()

    def test_threads_are_kept_for_learning_that_goes_on(
        self, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """All else takes those of the command that runs it."""
        out, seen = tmp_path / "out", {}

        def work(job: run.Job, cores: list[int], running: Any) -> Ended:
            seen[job.run.name] = job.threads
            return Ended(1, None, "not now\n", 0.5)

        monkeypatch.setattr(run, "work", work)
        recipes = ("--recipe", "gptq", "--recipe", "ostquant")
        words = (model, "-o", out, *recipes, *SMALL, *MEASURED)
        names = ("float", "gptq-w4a4kv4-seed0", "ostquant-w4a4kv4-seed0")
        monkeypatch.setenv("OMP_NUM_THREADS", "3")
        sweep(*words, code=1)
        assert seen == dict.fromkeys(names, 3)
        snapshot_path(out / names[2]).touch()
        monkeypatch.setenv("OMP_NUM_THREADS", "5")
        sweep(*words, code=1)
        assert seen == {names[0]: 5, names[1]: 5, names[2]: 3}
        assert snapshot_path(out / names[2]).exists()
        _, stderr = sweep(*words, "--samples", 5, code=1)
        assert not snapshot_path(out / names[2]).exists()
        assert f"{names[2]}: its recipe, model or text is another one than" in stderr
        assert seen == dict.fromkeys(names, 5)

    def test_share_of_the_cores(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """By default of what is left to do, not of all runs."""
        monkeypatch.setattr(run.os, "sched_getaffinity", lambda pid: set(range(8)))
        monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
        shares = [
            (where.workers_for(left), where.threads_for(left))
            for where in (run.Where(), run.Where(4), run.Where(ray="auto"))
            for left in (1, 3, 20)
        ]
        assert shares[:6] == [(1, 8), (3, 2), (8, 1), (4, 2), (4, 2), (4, 2)]
        assert {threads for _, threads in shares[6:]} == {1}

    def test_one_revision_of_the_hub(
        self, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """That of the start; every run takes it from its directory, by its name."""
        snapshot = tmp_path / "models--org--name" / "snapshots" / "0123abc"
        shutil.copytree(model, snapshot)
        found = iter([str(snapshot)])
        monkeypatch.setattr(
            source, "snapshot_download", lambda *words, **options: next(found)
        )
        made = plan.make_plan(settings_of(Path("org/name")))
        opened = source.Source.open(str(snapshot))
        for one_source in (made.source, opened):
            assert (one_source.name, one_source.revision) == ("org/name", "0123abc")
        whole = run.Sweep(made, tmp_path / "out", run.Where(), True, print)
        whole._expect(made.runs[1], 1)
        task = whole._job(made.runs[1]).task
        assert task.calibration is not None
        assert task.calibration.model == task.model == str(snapshot)

    def test_a_full_disk_ends_it(
        self,
        model: Path,
        tmp_path: Path,
        started: list[str],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        """By name of the file, whose old contents stay."""
        out = tmp_path / "out"
        words = (model, "-o", out, "--recipe", "rtn", *SMALL, *MEASURED)
        write = Path.write_text

        def write_text(path: Path, text: str, **options: Any) -> int:
            written = write(path, text, **options)
            if path == out / ".sweep.json.new" and '"perplexity"' in text:
                raise OSError(errno.ENOSPC, "No space left on device")
            return written

        with monkeypatch.context() as patch:
            patch.setattr(Path, "write_text", write_text)
            _, stderr = sweep(*words, "--workers", 1, code=1)
        reason = f"error: {out}/sweep.json cannot be written: No space left on device"
        assert stderr.splitlines()[-1] == reason
        assert "perplexity" not in records(out)["float"]
        assert not list(out.glob(".*.new"))
        started.clear()
        sweep(*words, "--workers", 1)
        assert started == ["float", "rtn-w4a4kv4-seed0"]

    def test_tasks_alone(self, model: Path, tmp_path: Path, started: list[str]) -> None:
        out = tmp_path / "out"
        words = (model, "-o", out, "--recipe", "rtn", *SMALL)
        stdout, _ = sweep(*words, "--tasks", TASK, "--limit", 2)
        assert "accuracy" in stdout and "gap" not in stdout
        assert "perplexity" not in records(out)["float"]

    def test_what_ended_a_process(self) -> None:
        for ended, expected in (
            (Ended(1, None, "Trace\nValueError: x\n", 1.0), "ValueError: x"),
            (Ended(0, None, "", 1.0), "exit code 0, nothing printed"),
            (
                Ended(-9, None, "measuring\n", 1.0),
                "ended by SIGKILL, perhaps for want of memory, after: measuring",
            ),
            (Ended(-11, None, "", 1.0), "ended by SIGSEGV"),
        ):
            assert run.last_line(run._error(ended)) == expected
