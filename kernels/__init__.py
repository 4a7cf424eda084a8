# SPDX-License-Identifier: Apache-2.0
"""Operators of vllm-lowbit: one folder each, with the reference that defines it.

Needs torch alone. ``kernels.ops`` registers every operator with
``torch.library``; ``kernels.dispatch`` says which backend runs it where.
"""
