# SPDX-License-Identifier: Apache-2.0
"""Time of calls on a GPU: in CUDA graphs, over operands that no cache still holds."""

from collections.abc import Callable

import torch

from .case import Prepare

CACHES = 4
SECONDS = 0.06
SAMPLES = 5


def copies(device: torch.device) -> Callable[[int], int]:
    """How many operands of some bytes exceed the L2 cache CACHES times."""
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    return lambda size: max(2, -(-CACHES * cache // max(size, 1))) if size else 1


def seconds(prepare: Prepare, device: torch.device) -> float:
    """Median of ``samples``."""
    return samples(prepare, device)[SAMPLES // 2]


def samples(prepare: Prepare, device: torch.device) -> list[float]:
    """Ascending times of one call, by SAMPLES replays of a graph of all copies."""
    calls = prepare(copies(device))
    side = torch.cuda.Stream(device)
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):
        # Compiles and fills caches of tables: neither may happen in a capture.
        for call in calls[:2]:
            call()
    torch.cuda.current_stream(device).wait_stream(side)
    torch.cuda.synchronize(device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    graph.replay()
    once = _elapsed(graph, 1)
    repeats = max(1, min(200, int(SECONDS / SAMPLES / max(once, 1e-6))))
    taken = sorted(_elapsed(graph, repeats) for _ in range(SAMPLES))
    return [one / repeats / len(calls) for one in taken]


def copy_bandwidth(device: torch.device) -> float:
    """Bytes a second, read and written, of a copy of 512 MiB."""
    source = torch.empty(1 << 29, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return (
        2 * source.numel() / seconds(lambda _: [lambda: target.copy_(source)], device)
    )


def integer_peak(device: torch.device) -> float:
    """Operations a second of ``torch._int_mm`` on 8192 x 8192 x 8192."""
    a = torch.ones(8192, 8192, dtype=torch.int8, device=device)
    b = torch.ones(8192, 8192, dtype=torch.int8, device=device).t()
    return 2 * 8192**3 / seconds(lambda _: [lambda: torch._int_mm(a, b)], device)


def _elapsed(graph: torch.cuda.CUDAGraph, repeats: int) -> float:
    start = torch.cuda.Event(enable_timing=True)
    stop = torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(repeats):
        graph.replay()
    stop.record()
    stop.synchronize()
    return start.elapsed_time(stop) / 1e3
