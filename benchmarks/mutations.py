# SPDX-License-Identifier: Apache-2.0
"""What becomes of a wrong checkpoint: stock vLLM with W8A8, and this plugin.

    python -m benchmarks.mutations

The catalogue of tests/mutations, as far as it applies to both, is applied to ref-7m as
compressed-tensors' ``int-quantized`` (int8 weights and inputs) for stock vLLM, without
any plugin, and to a lowbit checkpoint of the same scheme for ours. W8A8 because stock
vLLM's W4A16 kernel for CPUs needs AVX-512. Each is really loaded, and generates where
it loads. The manifest stays as it was: the file was damaged, not written anew. Writes
results/mutations.json and results/mutations.md; about ten minutes on two idle cores.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

from rich.progress import Progress

from .environment import as_line, describe
from .mutation_arms import ARMS, applicable, write_checkpoint

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results"
OUTCOMES = (
    "refused by name",
    "refused, no name",
    "first request fails",
    "serves NaN",
    "serves other tokens",
    "serves the same tokens",
    "crashes or hangs",
)
NOTES = """\
Refused by name: the error contains the tensor (or the fused layer it goes into, or the
other one of two that were exchanged), the file or the key. Served tokens are compared
with those of the sound checkpoint: 16 greedy tokens on each of 4 prompts. "The same" is
still another model, changed by so little that these tokens do not show it, or a tensor
or key too many that was ignored.
What only a record of the original can tell (bit flips, exchanged data, another
rope_theta) the compressed-tensors format has no record of: a server that loads such a
file follows its format. Mutations of what only one of the formats has, such as the
manifest, are left out."""
Row = dict[str, str]


def main() -> None:
    argparse.ArgumentParser(description=__doc__).parse_args()
    with tempfile.TemporaryDirectory() as directory:
        rows = [row for arm in ARMS for row in _run(arm, Path(directory) / arm)]
    _write(rows)


def _run(arm: str, directory: Path) -> list[Row]:
    """Outcome of every mutation of one arm."""
    write_checkpoint(arm, ROOT / "models" / "ref-7m", directory)
    mutations = applicable(arm)
    with Progress() as bar:
        task = bar.add_task(arm, total=len(mutations))
        rows: list[Row] = []
        while len(rows) < len(mutations):
            for line in _worker(arm, directory, len(rows)):
                rows.append(json.loads(line))
                bar.advance(task)
            if len(rows) < len(mutations):
                # It died over the one after the last line.
                dead = mutations[len(rows)]
                row = {"kind": dead.kind, "name": dead.name, "message": ""}
                rows.append({**row, "outcome": OUTCOMES[-1]})
                bar.advance(task)
    return [{"arm": arm, **row} for row in rows]


def _worker(arm: str, directory: Path, first: int) -> Any:
    """Lines of a process that goes through the mutations until the end, or its own."""
    command = [sys.executable, "-m", "benchmarks.mutation_arms", arm, str(directory)]
    cores = sorted(os.sched_getaffinity(0))
    environment = {
        **os.environ,
        "VLLM_PLUGINS": ARMS[arm].plugins,
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_OMP_THREADS_BIND": f"{cores[0]}-{cores[-1]}",
        "VLLM_LOGGING_LEVEL": "ERROR",
        "TQDM_DISABLE": "1",
    }
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(
            [*command, str(first)],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
        )
        assert process.stdout is not None
        yielded = False
        for line in process.stdout:
            # Others print there too.
            if line.startswith('{"kind"'):
                yielded = True
                yield line
        if process.wait() and not yielded and first == 0:
            log.seek(0)
            raise RuntimeError(f"{arm} did not start:\n{log.read()[-4000:]}")


def _write(rows: list[Row]) -> None:
    environment = describe()
    RESULTS.mkdir(exist_ok=True)
    counts = {
        arm: {
            kind: Counter(row["outcome"] for row in rows if _is(row, arm, kind))
            for kind in dict.fromkeys(row["kind"] for row in rows)
        }
        for arm in ARMS
    }
    result = {"environment": environment, "counts": counts, "mutations": rows}
    (RESULTS / "mutations.json").write_text(json.dumps(result, indent=1) + "\n")
    lines = [
        "# What becomes of a wrong checkpoint",
        "",
        *NOTES.splitlines(),
        "",
        f"`python -m benchmarks.mutations`: {as_line(environment)}",
    ]
    for arm, kinds in counts.items():
        total = sum(kinds.values(), Counter[str]())
        shown = [outcome for outcome in OUTCOMES if total[outcome]]
        lines += ["", f"## {ARMS[arm].title}", ""]
        lines.append("| mutation | " + " | ".join(shown) + " |")
        lines.append("|---|" + "---|" * len(shown))
        for kind, found in [*kinds.items(), ("all", total)]:
            cells = (str(found[outcome] or "") for outcome in shown)
            lines.append(f"| {kind} | " + " | ".join(cells) + " |")
    (RESULTS / "mutations.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


def _is(row: Row, arm: str, kind: str) -> bool:
    return row["arm"] == arm and row["kind"] == kind


if __name__ == "__main__":
    main()
