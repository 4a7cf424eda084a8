# SPDX-License-Identifier: Apache-2.0
"""Cells: each measured in a process of its own and kept in cpu.json at once."""

import contextlib
import datetime
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from .machine import describe_machine
from .options import Options

ERROR_CHARACTERS = 2000
# The longest cell, bf16 in the engine, takes a sixth of it on a quiet machine.
TIMEOUT_SECONDS = 3600
TIMED_OUT = 124


class Store:
    """The contents of cpu.json.

    Args:
        options: of this run.
    """

    def __init__(self, options: Options) -> None:
        self.path = options.results / "cpu.json"
        self.data: dict[str, Any] = {"parts": {}}
        if self.path.is_file():
            self.data = json.loads(self.path.read_text())

    def begin(self, options: Options) -> None:
        """Note where the next cells are measured.

        Raises:
            SystemExit: when what is there was measured elsewhere, or with other
                versions: the figures could not be compared.
        """
        here = describe_machine(options.threads)
        there = self.data.get("environment", here)
        other = [key for key in here if key != "date" and here[key] != there.get(key)]
        if other and self.data["parts"]:
            raise SystemExit(
                f"{self.path} was measured with another {', '.join(other)}; remove it "
                "or pass --results"
            )
        self.data["environment"] = here

    def done(self, part: str, cell: str) -> bool:
        """Whether a cell was measured, without an error."""
        record = self.data["parts"].get(part, {}).get(cell)
        return record is not None and "error" not in record

    def result(self, part: str, cell: str) -> dict[str, Any] | None:
        """What a cell measured, None when it was not."""
        if not self.done(part, cell):
            return None
        return self.data["parts"][part][cell]["result"]

    def results(self, part: str) -> dict[str, dict[str, Any]]:
        """Every result of a part, by cell."""
        cells = self.data["parts"].get(part, {})
        return {c: r["result"] for c, r in cells.items() if "error" not in r}

    def errors(self) -> dict[str, str]:
        """Last words of every cell that failed."""
        return {
            f"{part}: {cell}": record["error"]
            for part, cells in self.data["parts"].items()
            for cell, record in cells.items()
            if "error" in record
        }

    def write(self, part: str, cell: str, record: dict[str, Any]) -> None:
        """Keep a cell, and write the file so that it is never half there."""
        self.data["parts"].setdefault(part, {})[cell] = record
        self.path.parent.mkdir(parents=True, exist_ok=True)
        staging = self.path.with_suffix(".json.new")
        staging.write_text(json.dumps(self.data, indent=1) + "\n")
        os.replace(staging, self.path)


def run_cell(
    part: str, cell: str, options: Options, environment: dict[str, str]
) -> dict[str, Any]:
    """Measure one cell in a new process; its output goes to a log in the cache folder.

    Args:
        part: of the benchmark.
        cell: of the part.
        options: of this run.
        environment: of that process.

    Returns:
        what cpu.json keeps: ``result``, or ``error``; when it was measured, for how
        many seconds, the load of the machine before, and the share of time that
        the host gave to others meanwhile.
    """
    record: dict[str, Any] = {
        "date": datetime.datetime.now().isoformat(timespec="seconds"),
        "load_average_before": round(os.getloadavg()[0], 2),
    }
    before, started = _cpu_times(), time.monotonic()
    with tempfile.TemporaryDirectory() as directory:
        output = Path(directory) / "result.json"
        command = [sys.executable, "-m", "benchmarks.cpu", part]
        command += ["--one", cell, "--output", str(output), *options.arguments()]
        name = re.sub("[^a-z0-9]+", "-", f"{part} {cell}".lower())
        log = options.cache / "logs" / f"{name}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("w") as file:
            code = _wait(command, environment, file)
        if code == 0 and output.is_file():
            record["result"] = json.loads(output.read_text())
        else:
            tail = log.read_text(errors="replace")[-ERROR_CHARACTERS:]
            record["error"] = f"exit code {code}\n{tail}"
    record["seconds"] = round(time.monotonic() - started, 1)
    steal, total = (now - then for now, then in zip(_cpu_times(), before, strict=True))
    record["steal_percent"] = round(100 * steal / max(1, total), 2)
    return record


def _wait(command: list[str], environment: dict[str, str], log: Any) -> int:
    root = Path(__file__).parents[2]
    process = subprocess.Popen(
        command,
        cwd=root,
        env=environment,
        stdout=log,
        stderr=subprocess.STDOUT,
        process_group=0,
    )
    try:
        return process.wait(TIMEOUT_SECONDS)
    except subprocess.TimeoutExpired:
        return TIMED_OUT
    finally:
        # An engine that outlived its cell would run beside the next one.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _cpu_times() -> tuple[int, int]:
    """Ticks stolen by the host, and all ticks."""
    fields = Path("/proc/stat").read_text().splitlines()[0].split()[1:]
    ticks = [int(field) for field in fields]
    return ticks[7], sum(ticks[:8])
