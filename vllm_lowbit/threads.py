# SPDX-License-Identifier: Apache-2.0
"""How long idle OpenMP threads of a CPU worker spin."""

import logging
import os

logger = logging.getLogger(__name__)

SPIN_COUNT = "GOMP_SPINCOUNT"
# Some 0.3 to 1 ms: longer than the serial parts of a layer, shorter than a step.
TURNS = "20000"
# Whoever set one of these has chosen; libiomp and libomp do not read the first.
CHOICES = (SPIN_COUNT, "OMP_WAIT_POLICY")


def let_idle_threads_sleep() -> None:
    """Have workers that start later put idle threads of libgomp to sleep within a step.

    By default such a thread spins for 10 ms and more after its work. Between steps
    that keeps vLLM's scheduler and front end from the core that they share with it
    (VLLM_CPU_OMP_THREADS_BIND over all cores), for a time that is small beside a step
    with 16-bit weights and is not beside one with 4-bit weights. Read by libgomp when
    a process loads it: workers are spawned and inherit it.
    """
    if any(name in os.environ for name in CHOICES):
        return
    os.environ[SPIN_COUNT] = TURNS
    logger.info(
        "idle OpenMP threads of workers sleep after %s turns; %s or OMP_WAIT_POLICY "
        "in the environment chooses otherwise",
        TURNS,
        SPIN_COUNT,
    )
