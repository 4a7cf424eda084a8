# SPDX-License-Identifier: Apache-2.0
"""Numbers too small to matter, which a CPU would spend its time on."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def flushed_denormals() -> Iterator[None]:
    """Below 2^-126 results are zero in this thread and in those it starts.

    Attention makes them by the million, of probabilities of tokens far down, and a CPU
    takes far longer for each than for any other number.
    """
    if _flushes():
        yield
        return
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(False)


def _flushes() -> bool:
    return not float(torch.tensor(1e-30) * 1e-10)
