# SPDX-License-Identifier: Apache-2.0
"""Accuracy of every method on every scheme: one process per cell, kept at once."""
