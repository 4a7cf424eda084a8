# SPDX-License-Identifier: Apache-2.0
"""What the tests of a sweep pass it, and read."""

import dataclasses
import json
from pathlib import Path
from typing import Any

from typer.testing import CliRunner

from vllm_lowbit import cli
from vllm_lowbit.calibrate.sweep import one, plan
from vllm_lowbit.calibrate.text import default_text

DATA = Path(__file__).parents[3] / "benchmarks" / "data"
TEXT = DATA / "wikitext-2" / "test.txt"
TASK = DATA / "blimp" / "adjunct_island.jsonl"
SMALL = ("--samples", 4, "--calibration-seq-len", 32)
MEASURED = ("--data", TEXT, "--seq-len", 64, "--max-tokens", 200)


def sweep(*arguments: object, code: int = 0) -> tuple[str, str]:
    """stdout and stderr of the command."""
    words = ["sweep", *map(str, arguments)]
    result = CliRunner().invoke(cli.app, words, env={"COLUMNS": "200"})
    assert result.exit_code == code, result.output
    return result.stdout, result.stderr


def records(directory: Path) -> dict[str, Any]:
    return json.loads((directory / "sweep.json").read_text())["runs"]


def settings_of(model: Path, **changes: Any) -> plan.Settings:
    """Of a sweep of one recipe, as SMALL and MEASURED say, but for changes."""
    settings = plan.Settings(
        model=str(model),
        recipes=["rtn"],
        schemes=[],
        seeds=[],
        samples=4,
        seq_len=32,
        vocab_bits=None,
        text=default_text(),
        evaluation=one.Evaluation(data=str(TEXT), seq_len=64, max_tokens=200),
        scratch=None,
    )
    return dataclasses.replace(settings, **changes)
