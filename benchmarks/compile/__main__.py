# SPDX-License-Identifier: Apache-2.0
"""Compile the committed kernel configurations for every chip, without a device.

    python -m benchmarks.compile [--target sm_90] [--operator linear_w4a4] [--quick]
                                 [--check | --missing]

Asks of each: no spills, shared and tensor memory within the chip's limits and within
what a launch takes it to need, the expected matrix instruction, and no more
instructions than its ceiling in the main loop. Modules of cases say which are chosen.
Writes the sections of the operators in results/compile.json and results/compile.md,
unless --check is given or chips or cases are left out; exits with 1 when a case does
not meet its demands. --missing holds the results against the demands of today,
compiles what is not in them, has another launch or does not meet those, whatever is
left out, and writes it in sections of its own; rows of cases that are no more go. It
does not see that a kernel or the compiler changed. All operators take about two hours
on a core.
"""

import argparse
import json
import os
import sys
from collections.abc import Iterator
from dataclasses import asdict, fields
from itertools import count
from pathlib import Path
from typing import Any

if os.environ.get("TRITON_INTERPRET") == "1":
    sys.exit("error: TRITON_INTERPRET=1 is set: nothing would be compiled")

from ..environment import as_line, describe
from . import SOURCES
from .assembly import Report, compile_case, faults
from .case import TARGETS, Case

RESULTS = Path(__file__).parents[1] / "results"
HEADING = """\
# Compiled code of the Triton kernels

Every row of the tables of launch configurations, compiled without a device for a
selection of what is served with it. No case may exceed the shared or tensor memory of
its chip or what a launch takes it to need (kernels/gpu/limits.py), lack its matrix
instruction, or spill. Matrix instructions and instruction counts are of the main loop
(of the kernel where there is none), against the ceiling.

* hadamard_quantize: rows of well-known models in one tile, symmetric and unscaled in
  bfloat16; as served by default, asymmetric and with an input scale, in float16; so too
  rows in blocks, in bfloat16.
* Linears: all widths per channel and 4 bits in groups of 128, bfloat16, symmetric
  weights, as many parts of split-K as the row has. Then with every option (float16,
  zero points, bias, K ragged, one part): all widths per channel and in groups of 128,
  4 bits in groups of 32, 64, 128 and 256, the last row all widths in all of them. sm_89
  has the tables of sm_86, sm_103 the weight-only table of sm_100: there only 4 bits of
  the former.
* Linears of integers, weights in groups: again with scales and zero points of tokens
  in the same groups.
* hadamard_quantize in groups: of all sizes in float32, as served after a transform;
  groups of 128 of 16-bit inputs, scaled, alone and after RMSNorm or SwiGLU.
* Experts: 4 bits at every row, other widths at the last.
* Attention: four query heads a KV head, pages of 64 tokens; a window, a cap or pages of
  16, one at a time, for the fewest and the most query rows.
* Other combinations, groups above 256 and other page sizes have not been compiled.
"""


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compile")
    parser.add_argument("--target", choices=TARGETS)
    parser.add_argument("--operator")
    parser.add_argument("--quick", action="store_true")
    writing = parser.add_mutually_exclusive_group()
    writing.add_argument("--check", action="store_true")
    writing.add_argument("--missing", action="store_true")
    options = parser.parse_args()
    every = [case for source in SOURCES for case in source.cases()]
    sections = _judged(every) if options.missing else {}
    known = {_case_of(row) for row in _rows_of(sections) if not row["faults"]}
    chosen = [
        case
        for case in every
        if options.target in (None, case.target)
        and options.operator in (None, case.operator)
        and (case.quick or not options.quick)
        and _case_of(vars(case)) not in known
    ]
    if not (chosen or options.missing):
        sys.exit(f"error: no case of operator {options.operator!r} for these options")
    rows = [_row(case) for case in chosen]
    failed = [row for row in rows if row["faults"]]
    if options.missing:
        _add(sections, rows)
    elif not (options.target or options.quick or options.check):
        _replace(rows)
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
        row.get("tensor", ""),
        matrix or "none",
        f"{row.get('instructions', '')} / {row.get('ceiling') or 'any'}",
        "; ".join(row["faults"]) or "ok",
    )
    return "| " + " | ".join(map(str, cells)) + " |"


def _sections() -> dict[str, Any]:
    """Of an operator, and of what was added to it: ``linear_w4a4, part 2``."""
    path = RESULTS / "compile.json"
    return json.loads(path.read_text()) if path.is_file() else {}


def _judged(every: list[Case]) -> dict[str, Any]:
    """The results that are of a case and its launch, against what is asked now."""
    cases = {_case_of(vars(case)): case for case in every}
    sections = _sections()
    for section in sections.values():
        kept = []
        for row in section["cases"]:
            case = cases.get(_case_of(row))
            if case is not None and case.options == row.get("options"):
                report = Report(**{f.name: row[f.name] for f in fields(Report)})
                row |= {"ceiling": case.ceiling, "faults": faults(case, report)}
                kept.append(row)
        section["cases"] = kept
    return sections


def _rows_of(sections: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for section in sections.values():
        yield from section["cases"]


def _case_of(row: dict[str, Any]) -> tuple[str, str, str]:
    return row["operator"], row["target"], row["name"]


def _replace(rows: list[dict[str, Any]]) -> None:
    """Sections of the operators that were compiled, for all that there were of them."""
    environment, new = describe(), _by_operator(rows)
    sections = {
        name: section
        for name, section in _sections().items()
        if name in new or name.partition(", ")[0] not in new
    }
    for operator, cases in new.items():
        sections[operator] = {"environment": environment, "cases": cases}
    _write(sections)


def _add(sections: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    """Sections of this environment, or more rows in them; older rows of cases go."""
    environment, added = describe(), {_case_of(row) for row in rows}
    for section in sections.values():
        section["cases"] = [r for r in section["cases"] if _case_of(r) not in added]
    for operator, cases in _by_operator(rows).items():
        for part in count(2):
            empty = {"environment": environment, "cases": []}
            section = sections.setdefault(f"{operator}, part {part}", empty)
            if section["environment"] == environment:
                section["cases"] += cases
                break
    _write(sections)


def _by_operator(rows: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    found: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        found.setdefault(row["operator"], []).append(row)
    return found


def _write(sections: dict[str, Any]) -> None:
    sections = {name: found for name, found in sections.items() if found["cases"]}
    text = json.dumps(sections, indent=1) + "\n"
    (RESULTS / "compile.json").write_text(text)
    (RESULTS / "compile.md").write_text("\n".join(_report(sections)) + "\n")


def _report(sections: dict[str, Any]) -> Iterator[str]:
    yield HEADING
    for name, section in sections.items():
        yield f"## {name}\n"
        operator, added, _ = name.partition(", ")
        command = f"python -m benchmarks.compile --operator {operator}"
        command += " --missing" if added else ""
        yield f"`{command}`: {as_line(section['environment'])}\n"
        yield (
            "| operator | chip | case | registers | shared | tensor "
            "| matrix instructions | instructions / ceiling | |\n" + "|---" * 9 + "|"
        )
        yield from map(_line, section["cases"])
        yield ""


if __name__ == "__main__":
    main()
