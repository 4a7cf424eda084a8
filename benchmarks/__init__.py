# SPDX-License-Identifier: Apache-2.0
"""Measurements behind every number in this repository; results in results/."""
