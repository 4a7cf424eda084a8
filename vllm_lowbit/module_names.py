# SPDX-License-Identifier: Apache-2.0
"""Names of modules and tensors, where files and vLLM's model have others than Llama's.

Everywhere else in this package they are called as in a Llama.
"""

from dataclasses import dataclass

# Linears as vLLM fuses them, and the parts whose output rows they stack.
FUSED = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
    "up_proj": ("up_proj",),
    "o_proj": ("o_proj",),
    "down_proj": ("down_proj",),
}
# What each of them reads, as rotations and clip ratios are named.
INPUTS = {
    "qkv_proj": "attn_input",
    "gate_up_proj": "mlp_input",
    "up_proj": "mlp_input",
    "o_proj": "o_input",
    "down_proj": "down_input",
}
# Every part, once.
ROLES = tuple(dict.fromkeys(part for parts in FUSED.values() for part in parts))


@dataclass(frozen=True)
class ModuleNames:
    """Names here, and in files and vLLM's model.

    Attributes:
        pairs: parts of names here and there; taken one after the other, and the other
            way round from the last to the first.
        left_out: what names begin with there, and may do without in plain checkpoints.
    """

    pairs: tuple[tuple[str, str], ...] = ()
    left_out: str = ""

    def stored(self, name: str) -> str:
        """Name there of a tensor, or of a module if it ends in a dot."""
        for here, there in self.pairs:
            name = name.replace(here, there)
        return name

    def here(self, stored: str) -> str:
        """What :meth:`stored` is the other way round of."""
        for here, there in reversed(self.pairs):
            stored = stored.replace(there, here)
        return stored

    def module(self, prefix: str) -> str:
        """Name here of a module that vLLM gave a prefix."""
        return self.here(f"{prefix}.")[:-1]

    def whole(self, name: str) -> str:
        """Name of a tensor in a plain checkpoint, with what it may have left out."""
        whole = name.startswith(("lm_head.", self.left_out))
        return name if whole else self.left_out + name
