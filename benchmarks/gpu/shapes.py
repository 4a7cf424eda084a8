# SPDX-License-Identifier: Apache-2.0
"""Linears of well-known models, as they are served, and how many tokens they see."""

from dataclasses import dataclass

TOKENS = (1, 16, 64, 256, 2048, 8192)


@dataclass(frozen=True)
class Layer:
    """A linear, and the transform of its input where a plain checkpoint is served.

    Attributes:
        n, k: rows and columns of the weight.
        order, stride: of the transform (see ``vllm_lowbit/placement.py``).
        scaled: whether the input is multiplied by a scale first.
    """

    n: int
    k: int
    order: int
    stride: int = 1
    scaled: bool = True


# Most important first. Qwen3 8B has the other linears of Llama 3 8B.
MODELS = {
    "Llama-3-8B": {
        "down": Layer(4096, 14336, 1792),
        "gate_up": Layer(28672, 4096, 4096),
        "qkv": Layer(6144, 4096, 4096),
        "o": Layer(4096, 4096, 4, 128, False),
    },
    "Qwen3-8B": {
        "down": Layer(4096, 12288, 1536),
        "gate_up": Layer(24576, 4096, 4096),
    },
    "Llama-3-70B": {
        "down": Layer(8192, 28672, 3584),
        "gate_up": Layer(57344, 8192, 8192),
        "qkv": Layer(10240, 8192, 8192),
        "o": Layer(8192, 8192, 8, 128, False),
    },
}
# The aims for speed are on models of 8 billion parameters.
AIMED = ("Llama-3-8B", "Qwen3-8B")
# Whole rows, as recipes have them, and other forms of a served row.
OTHER_ROWS = {
    "all of Llama 3 8B's down": Layer(0, 14336, 14336),
    "all of Llama 3 70B's down": Layer(0, 28672, 28672),
    "Qwen2.5 7B's down": Layer(0, 18944, 2368),
}
# Experts, of them per token, and one's linears.
EXPERTS = {
    "Qwen3-30B-A3B": (
        128,
        8,
        {"gate_up": Layer(1536, 2048, 2048), "down": Layer(2048, 768, 96)},
    ),
    "Mixtral-8x7B": (
        8,
        2,
        {"gate_up": Layer(28672, 4096, 4096), "down": Layer(4096, 14336, 1792)},
    ),
}
