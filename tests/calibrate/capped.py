# SPDX-License-Identifier: Apache-2.0
"""A calibration in a process of its own that dies when it takes too much memory.

    python capped.py MODEL OUTPUT RECIPE SCRATCH|- CAP_BYTES

Memory is that which is not backed by files, beyond what was there before the start.
Prints the peak in bytes and the estimate; ends with status 3 above the cap.
"""

import os
import sys
import threading
import time
from pathlib import Path

OVER = 3


def anonymous() -> int:
    """Bytes of this process that are not backed by files."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) << 10
    raise OSError("no RssAnon in /proc/self/status")


def main(model: str, output: str, recipe: str, scratch: str, cap: int) -> None:
    from vllm_lowbit.calibrate.estimate import Estimate
    from vllm_lowbit.calibrate.pipeline import calibrate
    from vllm_lowbit.calibrate.recipe import load_recipe
    from vllm_lowbit.calibrate.text import default_text

    before = peak = anonymous()

    def watch() -> None:
        nonlocal peak
        while True:
            peak = max(peak, anonymous())
            if peak - before > cap:
                os._exit(OVER)
            time.sleep(0.002)

    estimates: list[Estimate] = []
    threading.Thread(target=watch, daemon=True).start()
    calibrate(
        model,
        Path(output),
        load_recipe(recipe).override(samples=16, seq_len=128),
        default_text(),
        "cpu",
        scratch=None if scratch == "-" else Path(scratch),
        announce=estimates.append,
    )
    print(peak - before, estimates[0].memory)


if __name__ == "__main__":
    main(*sys.argv[1:5], int(sys.argv[5]))
