# SPDX-License-Identifier: Apache-2.0
"""A calibration or a measurement, in a process that dies when it takes too much memory.

    python capped.py CAP_BYTES calibrate MODEL OUTPUT RECIPE SCRATCH|-
    python capped.py CAP_BYTES measure MODEL SEQ_LEN

Memory is that which is not backed by files, beyond what was there before the start.
Prints the peak in bytes and the estimate; ends with status 3 above the cap.
"""

import json
import os
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

OVER = 3


def anonymous() -> int:
    """Bytes of this process that are not backed by files."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) << 10
    raise OSError("no RssAnon in /proc/self/status")


def watch(cap: int) -> Callable[[], int]:
    """From now on: gives the peak until then, in bytes beyond what was there."""
    before = peak = anonymous()

    def keep() -> None:
        nonlocal peak
        while True:
            peak = max(peak, anonymous())
            if peak - before > cap:
                os._exit(OVER)
            time.sleep(0.002)

    threading.Thread(target=keep, daemon=True).start()
    return lambda: peak - before


def run(cap: int, model: str, output: str, recipe: str, scratch: str) -> None:
    from vllm_lowbit.calibrate.estimate import Estimate
    from vllm_lowbit.calibrate.pipeline import calibrate
    from vllm_lowbit.calibrate.recipe import load_recipe
    from vllm_lowbit.calibrate.text import default_text

    peak = watch(cap)
    estimates: list[Estimate] = []
    calibrate(
        model,
        Path(output),
        load_recipe(recipe).override(samples=16, seq_len=128),
        default_text(),
        "cpu",
        scratch=None if scratch == "-" else Path(scratch),
        announce=estimates.append,
    )
    print(peak(), estimates[0].memory)


def measure(cap: int, model: str, seq_len: str) -> None:
    from vllm_lowbit.architecture import ModelShape
    from vllm_lowbit.calibrate.estimate import LIBRARIES
    from vllm_lowbit.calibrate.evaluate import evaluate
    from vllm_lowbit.calibrate.scoring import reference_memory
    from vllm_lowbit.calibrate.text import default_text
    from vllm_lowbit.inspection import read_checkpoint

    peak, length = watch(cap), int(seq_len)
    config = json.loads((Path(model) / "config.json").read_text())
    shape, stored = ModelShape.from_config(config, model), None
    if "quantization_config" in config:
        shape, stored = read_checkpoint(Path(model))
    files = sum(file.stat().st_size for file in Path(model).glob("*.safetensors"))
    evaluate(model, default_text(), length, 4 * length)
    print(peak(), LIBRARIES + reference_memory(shape, stored, files, length))


if __name__ == "__main__":
    {"calibrate": run, "measure": measure}[sys.argv[2]](int(sys.argv[1]), *sys.argv[3:])
