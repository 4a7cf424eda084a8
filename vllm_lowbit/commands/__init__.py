# SPDX-License-Identifier: Apache-2.0
"""The commands of ``vllm-lowbit``, one module each.

They import torch, vLLM and transformers when they run, so that ``--help`` is quick.
"""
