# SPDX-License-Identifier: Apache-2.0
"""Rotations and scales learned by gradients of the model's loss."""
