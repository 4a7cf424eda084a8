# SPDX-License-Identifier: Apache-2.0
"""Correctness, then speed, of the Triton operators on the GPU at hand.

Needs torch and Triton alone: from a checkout that is not installed, its folders serve
as the package. A module of an operator has ``checks(device)`` and ``rows(device)`` and
is listed in SOURCES.
"""

import importlib.util
from pathlib import Path

import vllm_lowbit

if importlib.util.find_spec("vllm_lowbit.kernels") is None:
    vllm_lowbit.__path__.append(str(Path(__file__).parents[2]))

from . import activations, experts, kv4, linears

# Rows are timed in turn from these, those with aims first.
SOURCES = (activations, linears, kv4, experts)
