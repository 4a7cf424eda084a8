# SPDX-License-Identifier: Apache-2.0
"""Linears of well-known models and how many tokens they see at once."""

TOKENS = (1, 16, 64, 256, 2048, 8192)
# (n, k): what each model's layers have, most important first.
MODELS = {
    "Llama-3-8B": {
        "qkv": (6144, 4096),
        "o": (4096, 4096),
        "gate_up": (28672, 4096),
        "down": (4096, 14336),
    },
    "Qwen3-8B": {
        "gate_up": (24576, 4096),
        "down": (4096, 12288),
    },
    "Llama-3-70B": {
        "qkv": (10240, 8192),
        "o": (8192, 8192),
        "gate_up": (57344, 8192),
        "down": (8192, 28672),
    },
}
WIDTHS = (4096, 8192, 12288, 14336, 28672)
# Experts, of them per token, and (n, k) of one.
EXPERTS = {
    "Qwen3-30B-A3B": (128, 8, {"gate_up": (1536, 2048), "down": (2048, 768)}),
    "Mixtral-8x7B": (8, 2, {"gate_up": (28672, 4096), "down": (4096, 14336)}),
}
