# SPDX-License-Identifier: Apache-2.0
"""The command itself: quick help, and errors without tracebacks."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from vllm_lowbit import __version__, cli, inspection
from vllm_lowbit.errors import LowbitError

COMMANDS = ("calibrate", "env", "evaluate", "export", "inspect", "report", "sweep")
HEAVY = {"torch", "numpy", "safetensors", "transformers", "vllm"}
# Runs the command with packages hidden, and prints what it imported last.
SCRIPT = """
import json, sys
hidden = json.loads(sys.argv.pop(1))
for name in hidden:
    sys.modules[name] = None
from vllm_lowbit import cli
try:
    cli.app()
finally:
    print(json.dumps(sorted(set(sys.modules) - set(hidden))), file=sys.stderr)
"""
INTERRUPTED = """
import os, signal, sys, time
from vllm_lowbit import cli, inspection
# A shell starts background jobs with interrupts ignored.
signal.signal(signal.SIGINT, signal.default_int_handler)
def inspect(out):
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(60)
inspection.inspect = inspect
cli.app()
"""


def console(*words: object, **environment: str) -> subprocess.CompletedProcess[str]:
    """The installed command, from outside of the checkout."""
    command = Path(sys.executable).with_name("vllm-lowbit")
    return subprocess.run(
        [str(command), *map(str, words)],
        capture_output=True,
        text=True,
        timeout=120,
        cwd="/",
        env={**os.environ, "COLUMNS": "100", **environment},
    )


def script(code: str, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code, *words],
        capture_output=True,
        text=True,
        timeout=120,
        cwd="/",
    )


def test_version() -> None:
    done = console("--version")
    assert done.returncode == 0
    assert done.stdout == f"vllm-lowbit {__version__}\n"


@pytest.mark.parametrize(
    "words", [["--help"], *([name, "--help"] for name in COMMANDS)]
)
def test_help_imports_nothing_heavy(words: list[str]) -> None:
    done = script(SCRIPT, "[]", *words)
    assert done.returncode == 0
    assert "Usage: " in done.stdout
    assert not HEAVY & set(json.loads(done.stderr.splitlines()[-1]))


def test_every_command_is_listed() -> None:
    help_text = console("--help").stdout
    for name in COMMANDS:
        assert f"│ {name} " in help_text


@pytest.mark.parametrize("words", [["serve"], ["inspect"], ["inspect", "a", "--fast"]])
def test_usage_errors(words: list[str]) -> None:
    done = console(*words)
    assert done.returncode == 2
    assert "Usage: " in done.stderr
    assert done.stdout == ""


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["inspect", "/no/such"], "/no/such does not exist; a lowbit checkpoint is a"),
        (["inspect", __file__, "--verify"], f"{__file__} is not a directory; a lowbit"),
        (
            ["evaluate", "/no/such", "--data", __file__],
            "model /no/such does not exist; a local checkpoint is evaluated",
        ),
    ],
)
def test_bad_input(words: list[str], message: str) -> None:
    done = console(*words)
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.startswith(f"error: {message}")
    assert done.stderr.count("\n") == 1


def test_interrupt() -> None:
    done = script(INTERRUPTED, "inspect", "anything")
    assert done.returncode == 130
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("hidden", "extra"), [("transformers", "calibrate"), ("vllm", "serve")]
)
def test_missing_package(
    hidden: str, extra: str, tiny_model: Any, tmp_path: Path
) -> None:
    model = tiny_model(tmp_path / "model", tokenizer=True)
    (tmp_path / "text").write_text("The old house stood at the end of the lane.")
    words = ["evaluate", str(model), "--data", str(tmp_path / "text"), "--seq-len", "8"]
    done = script(SCRIPT, json.dumps([hidden]), *words, "--backend", "vllm")
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.splitlines()[0] == (
        f"error: the package {hidden} is not installed; this command needs it: "
        f"pip install 'vllm-lowbit[{extra}]'"
    )


class TestErrors:
    """What a command raises, in process."""

    @pytest.fixture
    def raising(self, monkeypatch: pytest.MonkeyPatch) -> Any:
        def run(error: BaseException) -> Any:
            def inspect(out: Path) -> None:
                raise error

            monkeypatch.setattr(inspection, "inspect", inspect)
            return CliRunner().invoke(cli.app, ["inspect", "anything"])

        return run

    def test_ours_are_one_message(self, raising: Any) -> None:
        result = raising(LowbitError("a.safetensors: tensor [b] is\nbad"))
        assert result.exit_code == 1
        assert result.stderr == "error: a.safetensors: tensor [b] is\nbad\n"
        assert result.stdout == ""

    @pytest.mark.parametrize(
        "error",
        [
            ValueError("a bug"),
            ModuleNotFoundError("No module named 'vllm.gone'", name="vllm.gone"),
            ModuleNotFoundError("No module named 'numpy'", name="numpy"),
        ],
    )
    def test_bugs_are_not_hidden(self, raising: Any, error: Exception) -> None:
        assert raising(error).exception is error
