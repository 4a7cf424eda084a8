# SPDX-License-Identifier: Apache-2.0
"""vllm-lowbit: 4-bit weights, activations and KV cache in stock vLLM.

vLLM calls :func:`register` through the entry point ``vllm.general_plugins``, in
every process and possibly several times. Importing this package imports neither
torch, Triton nor vLLM.
"""

__version__ = "0.1.0"


def register() -> None:
    """Register the quantization method ``lowbit`` with vLLM.

    Raises:
        UnsupportedError: when the installed vLLM is not one this version supports.
    """
    from .plugin import register_with_vllm

    register_with_vllm()
