# SPDX-License-Identifier: Apache-2.0
"""Offline calibration and evaluation; runs without vLLM."""
