# SPDX-License-Identifier: Apache-2.0
"""What is served side by side, and the bytes of weights each reads per token."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_lowbit.threads import SPIN_COUNT, TURNS

from .options import Options

KV_BYTES = 2 << 30
MAX_MODEL_LEN = 1280
MAX_NUM_SEQS = 32
# Tokens of one prefill step: eight prompts of 128, or one of 1024.
CHUNK = 1024


@dataclass(frozen=True)
class Arm:
    """One way to serve the model.

    Attributes:
        weight_bits: of the linears.
        group_size: inputs that share a scale, None for one per output channel.
        scale_bytes: of one scale.
        vocab_bits: of embedding and head.
        stock: scheme of the stock checkpoint, empty for bf16; None for ours.
        scheme: of ours.
        sleeping: idle threads wait as this plugin lets them, in a stock engine.
    """

    weight_bits: int
    group_size: int | None
    scale_bytes: int
    vocab_bits: int
    stock: str | None = None
    scheme: str | None = None
    sleeping: bool = False

    def checkpoint(self, options: Options) -> Path:
        """Directory of the checkpoint that is served, written where missing."""
        from .checkpoints import bf16_checkpoint, stock_checkpoint

        if self.stock:
            return stock_checkpoint(options, self.stock)
        return bf16_checkpoint(options)

    def quantization(self) -> dict[str, Any]:
        """Arguments of ``vllm.LLM`` that choose the arm, beside the model."""
        if self.scheme is None:
            return {}
        choice = {"scheme": self.scheme, "vocab_bits": self.vocab_bits}
        overrides = {"quantization_config_dict_json": json.dumps(choice)}
        return {"quantization": "lowbit", "hf_overrides": overrides}

    def environment(self) -> dict[str, str]:
        """Stock arms run without any plugin."""
        waiting = {SPIN_COUNT: TURNS} if self.sleeping else {}
        return waiting | {"VLLM_PLUGINS": "lowbit" if self.scheme else "none"}

    def weight_bytes(self, model: dict[str, Any]) -> int:
        """Bytes of weights and scales that computing one token reads."""
        hidden, inner = model["hidden_size"], model["intermediate_size"]
        head_dim, heads = model["head_dim"], model["num_attention_heads"]
        kv = model["num_key_value_heads"] * head_dim
        linears = (
            (heads * head_dim + 2 * kv, hidden),
            (hidden, heads * head_dim),
            (2 * inner, hidden),
            (hidden, inner),
        )
        layer = sum(self._linear_bytes(n, k) for n, k in linears) + 2 * 2 * hidden
        head = model["vocab_size"] * hidden * self.vocab_bits // 8
        if self.vocab_bits == 8:
            head += 4 * model["vocab_size"]
        return layer * model["num_hidden_layers"] + head + 2 * hidden

    def _linear_bytes(self, n: int, k: int) -> int:
        codes = n * k * self.weight_bits // 8
        if self.weight_bits == 16:
            return codes
        scales = n * (k // self.group_size if self.group_size else 1)
        # Ours read a factor for each input as well.
        return codes + scales * self.scale_bytes + (4 * k if self.scheme else 0)


BF16 = "bf16"
BF16_SLEEPING = "bf16, idle threads sleep"
STOCK_W4A16 = "stock W4A16"
STOCK_W8A8 = "stock W8A8"
OURS = "w4a4kv4, 8-bit vocabulary"
OURS_16 = "w4a4kv4"
OURS_W4A16 = "w4a16kv4, 8-bit vocabulary"
ARMS: dict[str, Arm] = {
    BF16: Arm(16, None, 0, 16, stock=""),
    BF16_SLEEPING: Arm(16, None, 0, 16, stock="", sleeping=True),
    STOCK_W4A16: Arm(4, 128, 2, 16, stock="w4a16-g128"),
    STOCK_W8A8: Arm(8, None, 4, 16, stock="w8a8"),
    OURS: Arm(4, None, 4, 8, scheme="w4a4kv4"),
    OURS_16: Arm(4, None, 4, 16, scheme="w4a4kv4"),
    OURS_W4A16: Arm(4, None, 4, 8, scheme="w4a16kv4"),
}
STOCK = tuple(
    name for name, arm in ARMS.items() if arm.stock is not None and not arm.sleeping
)
LOWBIT = tuple(name for name, arm in ARMS.items() if arm.scheme is not None)


def engine_arguments() -> dict[str, Any]:
    """Arguments of ``vllm.LLM`` that every arm shares."""
    return {
        "kv_cache_memory_bytes": KV_BYTES,
        "max_model_len": MAX_MODEL_LEN,
        "max_num_seqs": MAX_NUM_SEQS,
        "max_num_batched_tokens": CHUNK,
        "seed": 0,
    }


def as_flags(arguments: dict[str, Any]) -> list[str]:
    """The same as words of a vllm command."""
    words = []
    for name, value in arguments.items():
        text = json.dumps(value) if isinstance(value, dict) else str(value)
        words += ["--" + name.replace("_", "-"), text]
    return words
