# SPDX-License-Identifier: Apache-2.0
"""Checkpoints that other tools quantized, run as what they declare.

One module per format: its config, its tensors, and their conversion to our codes and
scales. Pure torch; the vLLM layer method and the reference model share it.
"""
