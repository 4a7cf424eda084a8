# SPDX-License-Identifier: Apache-2.0
"""Prometheus rules and the Grafana dashboard."""
