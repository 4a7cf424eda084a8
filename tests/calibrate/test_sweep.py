# SPDX-License-Identifier: Apache-2.0
"""`vllm-lowbit sweep`: what is run, what is not run again, and what it writes."""

import contextlib
import dataclasses
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from typer.testing import CliRunner

from vllm_lowbit import cli
from vllm_lowbit.calibrate import text as texts
from vllm_lowbit.calibrate.choices import evaluate_choices
from vllm_lowbit.calibrate.evaluate import evaluate
from vllm_lowbit.calibrate.learn.snapshot import snapshot_path
from vllm_lowbit.calibrate.pipeline import calibrate
from vllm_lowbit.calibrate.processes import Ended
from vllm_lowbit.calibrate.recipe import Recipe, load_recipe
from vllm_lowbit.calibrate.sweep import one, plan, run
from vllm_lowbit.errors import CalibrationError, LowbitError

DATA = Path(__file__).parents[2] / "benchmarks" / "data"
TEXT = DATA / "wikitext-2" / "test.txt"
TASK = DATA / "blimp" / "adjunct_island.jsonl"
SMALL = ("--samples", 4, "--calibration-seq-len", 32)
MEASURED = ("--data", TEXT, "--seq-len", 64, "--max-tokens", 200)
LEARNED: dict[str, Any] = {
    "name": "learned",
    "transforms": {"residual": "learned", "scales": "learned", "equalize": True},
    "learn": {"steps": 200, "tokens_per_step": 64},
    "data": {"samples": 4, "seq_len": 32},
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, tiny_model: Any) -> Path:
    return tiny_model(tmp_path_factory.mktemp("model"), tokenizer=True)


@pytest.fixture(autouse=True)
def short_text(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Is calibrated on in this process: the real one takes seconds to tokenize."""
    path = tmp_path_factory.mktemp("text") / "short.txt"
    path.write_text(texts.default_text().read_text()[:40_000])
    monkeypatch.setattr(texts, "default_text", lambda: path)


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the runs; they are done in this process, which is quicker."""
    names: list[str] = []

    def work(job: run.Job, cores: list[int], running: Any) -> Ended:
        names.append(job.run.name)
        with contextlib.redirect_stdout(None):
            try:
                return Ended(0, json.loads(json.dumps(one.run(job.task))), "", 1.5)
            except LowbitError as error:
                return Ended(1, None, f"some words\nerror: {error}\n", 0.5)

    monkeypatch.setattr(run, "work", work)
    return names


def sweep(*arguments: object, code: int = 0) -> tuple[str, str]:
    """stdout and stderr of the command."""
    words = ["sweep", *map(str, arguments)]
    result = CliRunner().invoke(cli.app, words, env={"COLUMNS": "200"})
    assert result.exit_code == code, result.output
    return result.stdout, result.stderr


def records(directory: Path) -> dict[str, Any]:
    return json.loads((directory / "sweep.json").read_text())["runs"]


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
        calibrate(str(model), alone, recipe, texts.default_text(), "cpu")
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
        settings = plan.Settings(
            model=str(model),
            recipes=["rtn", "gptq"],
            schemes=["w4a4", "w4a16-g64"],
            seeds=[3, 0],
            samples=4,
            seq_len=32,
            vocab_bits=8,
            text=texts.default_text(),
            evaluation=one.Evaluation(data=str(TEXT), seq_len=64, max_tokens=200),
            scratch=None,
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

    def test_done_is_done(
        self, model: Path, tmp_path: Path, started: list[str]
    ) -> None:
        """What changes is run again, as far as it must, and what is new is added."""
        out, text = tmp_path / "out", tmp_path / "text"
        text.write_text(texts.default_text().read_text()[:20_000])
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
        assert again(*MEASURED[:-1], 100) == ["float", mine]
        assert weights.stat().st_mtime_ns == made
        seconds = records(out)[mine]["calibration_seconds"]
        assert seconds == first[mine]["calibration_seconds"]
        assert again(*MEASURED) == ["float", mine]
        assert again(*MEASURED, "--recipe", "rtn", "--scheme", "w4a16") == [
            "rtn-w4a16-seed0"
        ]
        recipe.write_text("name: mine\nscheme: w4a16\nweights: {method: rtn}\n")
        assert again(*MEASURED) == [mine]
        assert weights.stat().st_mtime_ns != made
        text.write_text(texts.default_text().read_text()[20_000:40_000])
        assert again(*MEASURED) == [mine]
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
        """Of all that would run at a time."""
        monkeypatch.setattr(plan, "available_memory", lambda: 600 << 20)
        seeds = [word for seed in range(4) for word in ("--seed", seed)]
        words = (model, "-o", tmp_path / "out", "--recipe", "rtn", *seeds)
        words += (*SMALL, *MEASURED)
        _, stderr = sweep(*words, "--workers", 4, code=1)
        assert "4 calibrations at a time take about" in stderr
        assert "600 MiB are available; --workers 2 fits\n" in stderr
        assert not started and not list(tmp_path.iterdir())
        sweep(*words, "--workers", 2)
        monkeypatch.setattr(plan, "available_memory", lambda: 1)
        _, stderr = sweep(*words, "--samples", 5, "--workers", 4, code=1)
        assert "use --scratch DIR, or fewer or shorter samples" in stderr


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
            texts.default_text(),
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


def command(*arguments: object) -> subprocess.Popen[str]:
    """The installed command, in a process group of its own, as a shell starts it."""
    return subprocess.Popen(
        [str(Path(sys.executable).with_name("vllm-lowbit")), *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd="/",
        process_group=0,
        # But for interrupts, which it has background jobs ignore.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )


def until(holds: Callable[[], object]) -> None:
    for _ in range(1800):
        if holds():
            return
        time.sleep(0.1)
    raise AssertionError("not within three minutes")


@pytest.mark.parametrize("where", [("--workers", 2), ("--ray", "local")])
def test_interrupted_learning_goes_on(
    model: Path, tmp_path: Path, where: tuple[object, ...]
) -> None:
    """By the same command, from its snapshot, to the bytes of one without."""
    if "--ray" in where:
        pytest.importorskip("ray", reason="extra `ray`")
    recipe, out = tmp_path / "learned.yaml", tmp_path / "out"
    recipe.write_text(yaml.safe_dump(LEARNED))
    words = ("sweep", model, "-o", out, "--recipe", recipe, *MEASURED)
    words += ("--calibration-data", texts.default_text())
    name = "learned-w4a4kv4-seed0"
    log, checkpoint = out / "logs" / f"{name}.log", out / name
    running = command(*words, *where)
    until(lambda: log.exists() and "/200 learning" in log.read_text())
    os.killpg(running.pid, signal.SIGINT)
    _, stderr = running.communicate(timeout=120)
    assert running.returncode == 130, stderr
    assert f"interrupted; {out} holds what was done: the same command" in stderr
    assert "Traceback" not in stderr
    snapshot = snapshot_path(checkpoint)
    assert snapshot.exists() and not checkpoint.exists()
    assert not list(out.glob(f".{name}-*"))
    assert "not measured yet: " in (out / "sweep.md").read_text()
    assert "perplexity" not in records(out)[name]

    done = command(*words, "--workers", 2)
    _, stderr = done.communicate(timeout=300)
    assert done.returncode == 0, stderr
    assert not snapshot.exists()
    # Of a part of the calibration nothing is said.
    assert "calibration_seconds" not in records(out)[name]
    alone, threads = tmp_path / "alone", torch.get_num_threads()
    torch.set_num_threads(records(out)[name]["threads"])
    try:
        text = texts.default_text()
        calibrate(str(model), alone, load_recipe(str(recipe)), text, "cpu")
    finally:
        torch.set_num_threads(threads)
    weights = "model.safetensors"
    assert (alone / weights).read_bytes() == (checkpoint / weights).read_bytes()


@pytest.fixture
def ray() -> Iterator[Any]:
    yield pytest.importorskip("ray", reason="extra `ray`")


def test_on_a_cluster(ray: Any, model: Path, tmp_path: Path) -> None:
    """Processes on its nodes give what they give here."""
    out = tmp_path / "out"
    stdout, stderr = sweep(
        *(model, "-o", out, "--recipe", "rtn", *SMALL, *MEASURED, "--ray", "local"),
        "--remove-checkpoints",
    )
    found = records(out)
    assert (
        found["float"]["perplexity"] == evaluate(str(model), TEXT, 64, 200).perplexity
    )
    recipe = load_recipe("rtn").override(samples=4, seq_len=32)
    alone = tmp_path / "alone"
    calibrate(str(model), alone, recipe, texts.default_text(), "cpu")
    expected = evaluate(str(alone), TEXT, 64, 200).perplexity
    assert found["rtn-w4a4kv4-seed0"]["perplexity"] == pytest.approx(expected, rel=1e-3)
    assert "measuring " in (out / "logs" / "rtn-w4a4kv4-seed0.log").read_text()
    assert not (out / "rtn-w4a4kv4-seed0").exists()
    assert not ray.is_initialized()
