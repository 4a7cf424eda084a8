# SPDX-License-Identifier: Apache-2.0
"""Multiple choice by likelihood: what is scored, what counts, and bad input."""

import json
import math
import statistics
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from vllm_lowbit import cli
from vllm_lowbit.calibrate.choices import (
    ChoiceEvaluation,
    Item,
    evaluate_choices,
    read_tasks,
    score_tasks,
    tokenize_tasks,
)
from vllm_lowbit.calibrate.perplexity import Scored, batches
from vllm_lowbit.calibrate.reference_model import ReferenceModel, load_time_config
from vllm_lowbit.calibrate.scoring import Scorer, Target
from vllm_lowbit.calibrate.text import token_ids
from vllm_lowbit.errors import ConfigError, LowbitError
from vllm_lowbit.schema import scheme_from_name

BLIMP = Path(__file__).parents[2] / "benchmarks" / "data" / "blimp"
GOOD = '{"ctx": "The", "choices": ["cat", "dogs"], "gold": 1}'


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, tiny_model: Any) -> str:
    """A random model of 256 positions, with a tokenizer."""
    return str(tiny_model(tmp_path_factory.mktemp("model"), tokenizer=True))


def write(directory: Path, *lines: str, name: str = "task.jsonl") -> Path:
    path = directory / name
    path.write_text("".join(f"{line}\n" for line in lines))
    return path


def run(*arguments: object, code: int = 0) -> tuple[str, str]:
    """stdout and stderr of the command."""
    result = CliRunner().invoke(cli.app, ["evaluate", *map(str, arguments)])
    assert result.exit_code == code, result.output
    return result.stdout, result.stderr


def given(losses: list[float]) -> Scorer:
    """A model that finds these losses."""

    def replay(sequences: Iterable[Scored]) -> Iterator[float]:
        return (loss for loss, _ in zip(losses, sequences, strict=True))

    target: Any = Target("model", None, 256, None, None)  # type: ignore[arg-type]
    return Scorer(target, "reference", "float32", replay)


class TestRead:
    def test_lines(self, tmp_path: Path) -> None:
        """Other keys are left alone, and so is a line separator within a string."""
        pair = '{"sentence_good": "a\u2028b", "sentence_bad": "c", "UID": "x"}'
        [task] = read_tasks([write(tmp_path, GOOD, pair)])
        assert task.name == "task"
        assert task.items == (
            Item(ctx="The", choices=["cat", "dogs"], gold=1),
            Item(ctx="", choices=["a\u2028b", "c"], gold=0),
        )

    def test_directory_and_limit(self, tmp_path: Path) -> None:
        write(tmp_path, GOOD, GOOD, GOOD, name="b.jsonl")
        write(tmp_path, GOOD, name="a.jsonl")
        write(tmp_path, "not a task", name="SOURCE.txt")
        tasks = read_tasks([tmp_path], limit=2)
        assert [(task.name, len(task.items)) for task in tasks] == [("a", 1), ("b", 2)]

    def test_blimp(self) -> None:
        tasks = read_tasks([BLIMP])
        assert len(tasks) == 67
        assert {len(task.items) for task in tasks} == {50}

    @pytest.mark.parametrize(
        ("line", "message"),
        [
            ("", "is not JSON: Expecting value"),
            ('{"ctx": "a"', "is not JSON: Expecting"),
            ("[" * 100_000, "is not JSON: "),
            ("[1]", r"must be an object, got \[1\]"),
            ("{}", "key ctx: Field required"),
            ('{"ctx": "a", "choices": ["b", "c"]}', "key gold: Field required"),
            ('{"sentence_good": "a"}', "key sentence_bad: Field required"),
            ('{"ctx": 1, "choices": ["b", "c"], "gold": 0}', "key ctx: .*got 1"),
            ('{"ctx": "", "choices": ["b"], "gold": 0}', "at least 2 items"),
            ('{"ctx": "", "choices": ["b", 2], "gold": 0}', r"key choices\.1: .*got 2"),
            ('{"ctx": "", "choices": ["b", "c"], "gold": 2}', "gold 2 is none of 2 ch"),
            ('{"ctx": "", "choices": ["b", "c"], "gold": -1}', "gold -1 is none of 2"),
            (
                '{"ctx": "", "choices": ["b", "c"], "gold": true}',
                "key gold: .*got True",
            ),
            ('{"ctx": "", "choices": ["b", " "], "gold": 0}', "a choice is empty"),
            (
                '{"ctx": "", "choices": ["b", "b"], "gold": 0}',
                "two choices are the sam",
            ),
        ],
    )
    def test_line(self, tmp_path: Path, line: str, message: str) -> None:
        path = write(tmp_path, GOOD, line, GOOD)
        with pytest.raises(ConfigError, match=rf"^{path}:2: .*{message}"):
            read_tasks([path])
        assert len(read_tasks([path], limit=1)[0].items) == 1

    def test_files(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match="has no .jsonl file"):
            read_tasks([tmp_path])
        with pytest.raises(ConfigError, match="cannot be read: No such file"):
            read_tasks([tmp_path / "none.jsonl"])
        with pytest.raises(ConfigError, match="is empty"):
            read_tasks([write(tmp_path)])
        with pytest.raises(ConfigError, match="limit must be at least 1, got 0"):
            read_tasks([BLIMP], 0)


class TestTokens:
    def scored(self, model: str, directory: Path, *items: Any) -> list[Scored]:
        keys = ("ctx", "choices", "gold")
        lines = [json.dumps(dict(zip(keys, item, strict=True))) for item in items]
        tasks = read_tasks([write(directory, *lines)])
        return tokenize_tasks(Target.open(model), tasks)[0]

    def test_choices_follow_the_context(self, model: str, tmp_path: Path) -> None:
        choices = ["cat sat", " dog"]
        for context in ("The old", "The old "):
            found = self.scored(model, tmp_path, (context, choices, 0))
            before = token_ids(model, "The old")
            for scored, text in zip(found, ("The old cat sat", "The old"), strict=True):
                whole = token_ids(model, text)
                assert scored.token_ids.tolist()[: len(whole)] == whole
                assert scored.start == len(before)

    def test_no_context(self, model: str, tmp_path: Path) -> None:
        """The token for the begin of a text, 0 here, predicts the first."""
        found = self.scored(model, tmp_path, ("", ["A cat", "Dogs"], 0))
        for scored, text in zip(found, ("A cat", "Dogs"), strict=True):
            assert scored.token_ids.tolist() == [0, *token_ids(model, text)]
            assert scored.start == 1

    def test_too_long(self, model: str, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match=r"task\.jsonl:1: .* is 256$"):
            self.scored(model, tmp_path, ("word " * 300, ["a", "b"], 0))

    def test_more_tokens_than_the_model_has(
        self, tmp_path: Path, tiny_model: Any
    ) -> None:
        small = tiny_model(tmp_path / "small", tokenizer=True, vocab_size=64)
        with pytest.raises(ConfigError, match="the model's vocab_size is 64"):
            self.scored(str(small), tmp_path, ("The", ["cat", "dog"], 0))


class TestScore:
    def test_by_hand(self, tmp_path: Path) -> None:
        first = '{"ctx": "", "choices": ["aa", "bbbb"], "gold": 0}'
        second = '{"ctx": "", "choices": ["a", "bb", "\u00e9\u00e9"], "gold": 2}'
        tasks = read_tasks([write(tmp_path, first, first, second)])
        tasks += read_tasks([write(tmp_path, first, name="other.jsonl")])
        # Right, but not per byte; a tie; right per byte only; wrong both ways.
        losses = [2.0, 3.0, 1.0, 1.0, 1.5, 2.0, 1.9, 9.0, 1.0]
        scored = [[Scored(torch.tensor([0, 1]))] * n for n in (7, 2)]
        found = score_tasks(given(losses), tasks, scored)
        one, other = found.tasks
        assert (one.task, one.items, other.task, other.items) == ("task", 3, "other", 1)
        assert one.accuracy == 1 / 3 and other.accuracy == 0
        assert one.accuracy_norm == 1 / 3 and other.accuracy_norm == 0
        assert found.mean.task == "mean" and found.mean.items == 4
        assert found.mean.accuracy == pytest.approx(1 / 6)

    def test_standard_errors(self, tmp_path: Path) -> None:
        """Those of a mean of zeros and ones; of the mean of tasks by their squares."""
        line = '{"ctx": "", "choices": ["aa", "bb"], "gold": 0}'
        right = [True, True, False, True, False, True, True]
        tasks = read_tasks([write(tmp_path, *[line] * 7)]) * 2
        losses = [x for good in right for x in ((1.0, 2.0) if good else (2.0, 1.0))]
        scored = [[Scored(torch.tensor([0, 1]))] * 14] * 2
        found = score_tasks(given(losses * 2), tasks, scored)
        expected = statistics.stdev(map(float, right)) / math.sqrt(7)
        assert found.tasks[0].stderr == pytest.approx(expected)
        assert found.tasks[0].stderr_norm == pytest.approx(expected)
        assert found.mean.stderr == pytest.approx(expected / math.sqrt(2))

    @pytest.mark.parametrize("loss", [math.nan, math.inf])
    def test_not_finite(self, tmp_path: Path, loss: float) -> None:
        tasks = read_tasks([write(tmp_path, GOOD)])
        scored = [[Scored(torch.tensor([0, 1]))] * 2]
        with pytest.raises(LowbitError, match=f"the loss of a choice is {loss}"):
            score_tasks(given([1.0, loss]), tasks, scored)


class TestReference:
    @pytest.mark.parametrize("scheme", [None, "w4a4kv4"])
    def test_sequences_side_by_side(self, model: str, scheme: str | None) -> None:
        """Each is scored as if it were alone."""
        config = scheme and load_time_config(model, scheme_from_name(scheme))
        reference = ReferenceModel(model, config or None)
        with torch.random.fork_rng():
            torch.manual_seed(1)
            parts = [torch.randint(4096, (n,)) for n in (5, 1, 17, 40)]
        together = reference(torch.cat(parts), [len(part) for part in parts])
        alone = torch.cat([reference(part) for part in parts])
        assert torch.allclose(together, alone, rtol=1e-5, atol=1e-5)

    def test_likelihoods(self, model: str, tmp_path: Path) -> None:
        """The answers are those of the model's own log-probabilities."""
        task = write(
            tmp_path,
            '{"ctx": "It was a dark", "choices": ["night", "house"], "gold": 0}',
            '{"ctx": "", "choices": ["He ran.", "Ran he."], "gold": 1}',
        )
        found = evaluate_choices(model, [task])
        tasks = read_tasks([task])
        [scored] = tokenize_tasks(Target.open(model), tasks)
        reference = ReferenceModel(model)
        losses = []
        for each in scored:
            log_probs = reference(each.token_ids).double().log_softmax(-1)
            ids = each.token_ids.tolist()
            losses.append(
                -sum(
                    float(log_probs[i - 1, ids[i]]) for i in range(each.start, len(ids))
                )
            )
        right = [losses[0] < losses[1], losses[3] < losses[2]]
        assert found.mean.accuracy == sum(right) / 2
        assert (found.scheme, found.backend, found.dtype) == (
            "float",
            "reference",
            "float32",
        )

    def test_progress(self, model: str, tmp_path: Path) -> None:
        seen: list[tuple[int, int]] = []
        task = write(tmp_path, GOOD, GOOD)
        evaluate_choices(model, [task], progress=lambda *n: seen.append(n))
        assert seen == [(done, 4) for done in range(5)]

    def test_a_trained_model_knows_grammar(self) -> None:
        """Better than chance, by far more than its error."""
        ref_7m = str(BLIMP.parents[2] / "models" / "ref-7m")
        easy = [
            BLIMP / f"{name}.jsonl"
            for name in ("wh_vs_that_no_gap", "determiner_noun_agreement_1")
        ]
        found = evaluate_choices(ref_7m, easy, 20)
        assert found.mean.accuracy > 0.5 + 5 * found.mean.stderr

    def test_batches(self) -> None:
        parts = [Scored(torch.zeros(n)) for n in (3, 4, 9, 1, 1)]
        groups = [[len(s.token_ids) for s in group] for group in batches(parts, 7)]
        assert groups == [[3, 4], [9], [1, 1]]
        assert list(batches([], 7)) == []


class TestCommand:
    def test_json(self, model: str) -> None:
        task = BLIMP / "passive_1.jsonl"
        options = ("--tasks", task, "--tasks", task, "--limit", 2)
        stdout, stderr = run(model, *options, "--scheme", "w4a4", "--json")
        assert stderr == ""
        expected = evaluate_choices(model, [task, task], 2, scheme="w4a4")
        assert json.loads(stdout) == json.loads(json.dumps(asdict(expected)))
        assert isinstance(expected, ChoiceEvaluation) and expected.scheme == "w4a4"

    def test_table(self, model: str, tmp_path: Path) -> None:
        for name in ("a-name-of-more-than-thirty-characters", "[bold]"):
            write(tmp_path, GOOD, name=f"{name}.jsonl")
        stdout, _ = run(model, "--tasks", tmp_path)
        shown = "".join(stdout.split())
        for text in ("[bold]", "mean", "accuracy", "+-0.0000", "schemefloat"):
            assert text in shown

    @pytest.mark.parametrize("options", [(), ("--data", "x.txt", "--tasks", "y.jsonl")])
    def test_one_of_both(self, model: str, options: tuple[str, ...]) -> None:
        _, stderr = run(model, *options, code=1)
        assert stderr == "error: pass either --data or --tasks\n"

    @pytest.mark.parametrize(
        ("options", "name"),
        [
            (("--data", "x.txt", "--limit", 2), "--limit"),
            (("--tasks", "y.jsonl", "--max-tokens", 64), "--max-tokens"),
        ],
    )
    def test_of_what_is_not_measured(
        self, model: str, options: tuple[object, ...], name: str
    ) -> None:
        _, stderr = run(model, *options, code=1)
        assert stderr.startswith(f"error: {name} has no effect without --")

    def test_bad_line(self, model: str, tmp_path: Path) -> None:
        task = write(tmp_path, GOOD, "x")
        stdout, stderr = run(model, "--tasks", task, code=1)
        assert stdout == ""
        assert stderr.startswith(f"error: {task}:2: is not JSON: ")
