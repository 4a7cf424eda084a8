# SPDX-License-Identifier: Apache-2.0
"""Time and memory of `vllm-lowbit calibrate` with the built-in recipes.

    python -m benchmarks.calibration

runs the command as a user would, on models/ref-7m, and writes results/calibration.json
and results/calibration.md.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path

from .environment import as_line, describe

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results"
MODEL = ROOT / "models" / "ref-7m"
RECIPES = ("rtn", "quarot", "gptq", "quarot-gptq", "lowbit")
COMMAND = Path(sys.executable).parent / "vllm-lowbit"


def measure(recipe: str) -> dict[str, float]:
    """Wall seconds and peak resident MiB of one calibration."""
    with tempfile.TemporaryDirectory() as directory:
        output = str(Path(directory) / "out")
        words = [str(COMMAND), "calibrate", str(MODEL), "-o", output, "--recipe"]
        started = time.monotonic()
        process = os.posix_spawn(COMMAND, [*words, recipe], os.environ)
        _, status, usage = os.wait4(process, 0)
        seconds = time.monotonic() - started
    if status:
        raise RuntimeError(f"calibrate --recipe {recipe} ended with status {status}")
    return {"seconds": round(seconds, 1), "peak_mib": round(usage.ru_maxrss / 1024)}


def main() -> None:
    argparse.ArgumentParser(description=__doc__).parse_args()
    measured = {recipe: measure(recipe) for recipe in RECIPES}
    environment = describe()
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "calibration.json").write_text(
        json.dumps({"environment": environment, "recipes": measured}, indent=2) + "\n"
    )
    lines = [
        "# Time and memory of calibrating ref-7m",
        "",
        "`vllm-lowbit calibrate models/ref-7m -o OUT --recipe NAME`, all of it:",
        "imports, tokenizing, 128 windows of 512 tokens to calibrate on and 32 to",
        "measure on, in float and quantized.",
        "",
        f"`python -m benchmarks.calibration`: {as_line(environment)}",
        "",
        "| recipe | seconds | peak resident MiB |",
        "|---|---|---|",
        *(
            f"| {recipe} | {row['seconds']:.0f} | {row['peak_mib']:.0f} |"
            for recipe, row in measured.items()
        ),
    ]
    (RESULTS / "calibration.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
