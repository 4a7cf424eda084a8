# SPDX-License-Identifier: Apache-2.0
"""What the tests of a sweep pass it, and read."""

import json
from pathlib import Path
from typing import Any

from typer.testing import CliRunner

from vllm_lowbit import cli

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
