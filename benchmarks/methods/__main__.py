# SPDX-License-Identifier: Apache-2.0
"""Accuracy of every method, by the reference and by vLLM itself.

    python -m benchmarks.methods
    python -m benchmarks.methods --cells 'ref-7m/w4a4kv4/*' --time-limit 60
    python -m benchmarks.methods --report

A cell is MODEL/SCHEME/METHOD/SEED. Each is calibrated and measured in a process of its
own and written to results/methods.json at once; one that is there is not measured
again, unless its recipe, the model or a text changed, or --again is given. Every run
ends by writing methods.md and the plots anew, from what is still measured as it would
be now; the rest stays in methods.json until it is measured again. Needs the extra
`bench`; with --ray the extra `ray` too, and on every node this repository at the same
path.
"""

import argparse
import json
import os
import signal
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parents[1] / "results"


def main() -> None:
    parser = _parser()
    arguments = parser.parse_args()
    if arguments.workers < 1:
        parser.error(f"argument --workers: at least 1, got {arguments.workers}")
    # Imports that take seconds come after --help.
    from .cells import all_cells, select
    from .store import Store

    if arguments.one is not None:
        from .measure import measure

        cell = {cell.key: cell for cell in all_cells()}.get(arguments.one)
        if cell is None:
            raise SystemExit(f"no cell is named {arguments.one!r}")
        arguments.output.write_text(json.dumps(measure(cell)))
        return
    # Lets the cells that run be ended as well.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    store = Store(arguments.results / "methods.json")
    fingerprints, skipped = _fingerprints()
    store.set_aside(fingerprints)
    chosen = select(arguments.cells)
    if not chosen:
        raise SystemExit(f"no cell matches {arguments.cells!r}; --list prints them")
    if arguments.list:
        print("\n".join(cell.key for cell in chosen))
        return
    if store.stale:
        print(
            f"not reported, {len(store.stale)} cells of another recipe, model or text "
            f"than now: {', '.join(store.stale)}",
            flush=True,
        )
    if not arguments.report:
        _run(store, chosen, fingerprints, skipped, arguments)
    from .report import write_report

    print(write_report(store, arguments.results))


def _fingerprints() -> tuple[dict[str, str], dict[str, str]]:
    """Of every cell that can be measured, and why not of any other, by key."""
    from vllm_lowbit.errors import ConfigError

    from .cells import all_cells
    from .protocol import inputs

    found: dict[str, str] = {}
    skipped: dict[str, str] = {}
    for cell in all_cells():
        reason = cell.skipped()
        if reason is not None:
            skipped[cell.key] = reason
            continue
        try:
            found[cell.key] = cell.fingerprint(inputs(cell.model))
        except ConfigError as error:
            skipped[cell.key] = str(error)
    return found, skipped


def _run(
    store: Any,
    chosen: list[Any],
    fingerprints: dict[str, str],
    skipped: dict[str, str],
    arguments: argparse.Namespace,
) -> None:
    from .run import run_here, run_on_cluster

    waiting = [
        (cell, fingerprints[cell.key])
        for cell in chosen
        if cell.key in fingerprints
        and (arguments.again or not store.done(cell, fingerprints[cell.key]))
    ]
    reasons = Counter(skipped[cell.key] for cell in chosen if cell.key in skipped)
    for reason, count in reasons.items():
        print(f"skipped, {count} cells: {reason}", flush=True)
    print(f"{len(waiting)} of {len(chosen)} cells to measure", flush=True)

    done = 0

    def keep(cell: Any, record: dict[str, Any]) -> None:
        nonlocal done
        store.write(cell, record)
        done += 1
        error = record.get("error", "").strip().splitlines()[-1:]
        text = [f"{record['seconds']:.0f} s", *error]
        print(f"{done}/{len(waiting)} {cell.key}: {', '.join(text)}", flush=True)

    minutes, logs = arguments.time_limit, arguments.logs
    if arguments.ray is None:
        left = run_here(waiting, arguments.workers, minutes, logs, keep)
    else:
        left = run_on_cluster(waiting, arguments.ray, minutes, logs, keep)
    if left:
        print(f"time limit: {left} cells not started", flush=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.methods",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add: Any = parser.add_argument
    add("--cells", default="*", help="only those of this shell pattern")
    add("--again", action="store_true", help="measure what is there as well")
    workers = len(os.sched_getaffinity(0))
    add("--workers", type=int, default=workers, help="cells at a time; %(default)s")
    add("--ray", metavar="ADDRESS", help="on a Ray cluster, a core for each; auto")
    add("--time-limit", type=float, metavar="MINUTES", help="then start no other cell")
    add("--list", action="store_true", help="print the cells and end")
    add("--report", action="store_true", help="measure nothing, write the report")
    add("--results", type=Path, default=RESULTS, help="default %(default)s")
    logs = Path(tempfile.gettempdir()) / "lowbit-methods"
    add("--logs", type=Path, default=logs, help="default %(default)s")
    add("--one", help=argparse.SUPPRESS)
    add("--output", type=Path, help=argparse.SUPPRESS)
    return parser


if __name__ == "__main__":
    main()
