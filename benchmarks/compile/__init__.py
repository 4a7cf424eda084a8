# SPDX-License-Identifier: Apache-2.0
"""Offline compilation of every committed kernel configuration, and what it must meet.

A module of cases has ``cases() -> Iterator[Case]`` and is listed in SOURCES.
"""

from . import activations, kv4, linears, served

SOURCES = (activations, served, linears, kv4)
