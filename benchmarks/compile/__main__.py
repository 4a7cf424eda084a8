# SPDX-License-Identifier: Apache-2.0
"""Compile every committed kernel configuration for every chip, without a device.

    python -m benchmarks.compile [--target sm_90] [--operator linear_w4a4] [--quick]
                                 [--check]

Asks of each: no spills, shared memory within the chip's limit, the expected matrix
instruction, and no more instructions than its ceiling in the main loop. Writes the
sections of the operators in results/compile.json and results/compile.md, unless --check
is given or chips or cases are left out; exits with 1 when a case does not meet its
demands. All operators take about an hour on two cores.
"""

import argparse
import json
import os
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

if os.environ.get("TRITON_INTERPRET") == "1":
    sys.exit("error: TRITON_INTERPRET=1 is set: nothing would be compiled")

from ..environment import as_line, describe
from . import SOURCES
from .assembly import compile_case, faults
from .case import TARGETS, Case

RESULTS = Path(__file__).parents[1] / "results"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compile")
    parser.add_argument("--target", choices=TARGETS)
    parser.add_argument("--operator")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args()
    chosen = [
        case
        for source in SOURCES
        for case in source.cases()
        if options.target in (None, case.target)
        and options.operator in (None, case.operator)
        and (case.quick or not options.quick)
    ]
    if not chosen:
        sys.exit(f"error: no case of operator {options.operator!r} for these options")
    rows = [_row(case) for case in chosen]
    failed = [row for row in rows if row["faults"]]
    if not (options.target or options.quick or options.check):
        _write(rows)
    print(f"{len(rows) - len(failed)} of {len(rows)} cases meet their demands")
    sys.exit(1 if failed else 0)


def _row(case: Case) -> dict[str, Any]:
    head = {"operator": case.operator, "target": case.target, "name": case.name}
    try:
        report = compile_case(case)
    except Exception as error:  # Whatever the compiler raises is this case's fault.
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        last = str(cause).strip().rpartition("\n")[2]
        row = {**head, "faults": [f"{type(cause).__name__}: {last}"]}
    else:
        row = {
            **head,
            **asdict(report),
            "ceiling": case.ceiling,
            "options": case.options,
            "faults": faults(case, report),
        }
    print(_line(row), flush=True)
    return row


def _line(row: dict[str, Any]) -> str:
    """A row of the table."""
    matrix = ", ".join(
        f"{count} {name}" for name, count in row.get("matrix", {}).items()
    )
    cells = (
        row["operator"],
        row["target"],
        row["name"],
        row.get("registers", ""),
        row.get("shared", ""),
        matrix or "none",
        f"{row.get('instructions', '')} / {row.get('ceiling') or 'any'}",
        "; ".join(row["faults"]) or "ok",
    )
    return "| " + " | ".join(map(str, cells)) + " |"


def _write(rows: list[dict[str, Any]]) -> None:
    """Replace the sections of the operators that were compiled."""
    path, environment = RESULTS / "compile.json", describe()
    sections = json.loads(path.read_text()) if path.is_file() else {}
    for operator in dict.fromkeys(row["operator"] for row in rows):
        cases = [row for row in rows if row["operator"] == operator]
        sections[operator] = {"environment": environment, "cases": cases}
    path.write_text(json.dumps(sections, indent=1) + "\n")
    (RESULTS / "compile.md").write_text("\n".join(_report(sections)) + "\n")


def _report(sections: dict[str, Any]) -> Iterator[str]:
    yield (
        "# Compiled code of the Triton kernels\n\n"
        "Every committed configuration, compiled without a device. No case may spill "
        "or exceed\nthe shared memory of its chip; matrix instructions and instruction "
        "counts are of the\nmain loop (of the kernel where there is none), against "
        "the ceiling.\n"
    )
    for operator, section in sections.items():
        yield f"## {operator}\n"
        command = f"python -m benchmarks.compile --operator {operator}"
        yield f"`{command}`: {as_line(section['environment'])}\n"
        yield (
            "| operator | chip | case | registers | shared | matrix instructions "
            "| instructions / ceiling | |\n|---|---|---|---|---|---|---|---|"
        )
        yield from map(_line, section["cases"])
        yield ""


if __name__ == "__main__":
    main()
