# SPDX-License-Identifier: Apache-2.0
"""Many calibrations of a model, each measured: side by side, or on a cluster."""
