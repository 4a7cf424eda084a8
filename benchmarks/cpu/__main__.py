# SPDX-License-Identifier: Apache-2.0
"""Speed and memory on a CPU, side by side with stock vLLM and llama.cpp.

    python -m benchmarks.cpu [serve|linear|attention|memory|llama-cpp|report ...]

Without a name all parts run. Every cell (one arm of one part) is measured in a process
of its own and written to results/cpu.json at once; a cell that is there is not measured
again, unless ``--again`` is given. ``report`` only writes cpu.md and the plots anew.

Needs the extra ``bench`` (matplotlib for plots, gguf for llama.cpp's model).
``llama-cpp`` needs ``--llama-bench``, see
``benchmarks/cpu/llama_cpp.py``. Models with random weights are written to ``--cache``,
about 8 GB, once.
"""

import argparse
import fnmatch
import importlib
import json
import signal
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from .options import CACHE, RESULTS, Options

PARTS = {
    "linear": "linear",
    "attention": "attention",
    "memory": "memory",
    "llama-cpp": "llama_cpp",
    "serve": "serve",
}
REPORT = "report"
NAMES = (*PARTS, REPORT)
# Those whose operators run in the process of the cell.
KERNELS = ("linear", "attention", "llama-cpp")


def main() -> None:
    arguments = _parser().parse_args()
    options = Options(
        cache=arguments.cache.expanduser().absolute(),
        results=arguments.results.absolute(),
        threads=arguments.threads,
        llama_bench=arguments.llama_bench,
        full=arguments.full,
        quick=arguments.quick,
    )
    if arguments.one is not None:
        (part,) = arguments.parts
        result = _part(part).measure(arguments.one, options)
        arguments.output.write_text(json.dumps(result))
        return
    # Lets the cell that runs be ended as well.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    for part in arguments.parts or PARTS:
        if part != REPORT:
            _run(part, options, arguments.cells, arguments.again)
    from .report import write_report
    from .store import Store

    print(write_report(Store(options), options))


def _run(part: str, options: Options, pattern: str, again: bool) -> None:
    from .arms import ARMS
    from .store import Store, run_cell

    module, store = _part(part), Store(options)
    store.begin(options)
    reason = module.skipped(options) if hasattr(module, "skipped") else None
    if reason is not None:
        print(f"{part}: skipped, {reason}", flush=True)
    for cell in module.cells(options):
        if not fnmatch.fnmatch(cell, pattern) or (store.done(part, cell) and not again):
            continue
        print(f"{part}: {cell} ...", end=" ", flush=True)
        environment = options.environment(part in KERNELS)
        arm = ARMS.get(cell.partition(": ")[2] or cell)
        environment |= {} if arm is None else arm.environment()
        record = run_cell(part, cell, options, environment)
        store.write(part, cell, record)
        error = record.get("error", "").splitlines()
        print(f"{record['seconds']} s", *error[:1], flush=True)


def _part(name: str) -> ModuleType:
    return importlib.import_module(f".{PARTS[name]}", __package__)


def _part_name(name: str) -> str:
    if name not in NAMES:
        known = ", ".join(NAMES)
        raise argparse.ArgumentTypeError(f"{name} is no part; parts are {known}")
    return name


def _parser() -> argparse.ArgumentParser:
    parser: Any = argparse.ArgumentParser(
        prog="python -m benchmarks.cpu",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    # Without choices: argparse of Python 3.11 refuses an empty list by them.
    parts = ", ".join(NAMES)
    add("parts", nargs="*", type=_part_name, metavar="part", help=parts)
    add("--cells", default="*", help="only those of this shell pattern")
    add("--again", action="store_true", help="measure what is in cpu.json as well")
    add("--cache", type=Path, default=CACHE, help="of the models; default %(default)s")
    add("--results", type=Path, default=RESULTS, help="default %(default)s")
    add("--threads", type=int, default=2, help="CPUs, from 0 on; default %(default)s")
    add("--llama-bench", type=Path, help="of a build of llama.cpp")
    add("--full", action="store_true", help="no shortcuts in serve: hours")
    add("--quick", action="store_true", help="tiny sizes, to try this out")
    add("--one", help=argparse.SUPPRESS)
    add("--output", type=Path, help=argparse.SUPPRESS)
    return parser


if __name__ == "__main__":
    main()
