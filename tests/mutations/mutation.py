# SPDX-License-Identifier: Apache-2.0
"""What a mutation is, and the sound checkpoints they are applied to."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .edits import Edit

EMBEDDING, HEAD, FINAL_NORM = "model.embed_tokens", "lm_head", "model.norm.weight"
Q, K, V = (f"model.layers.0.self_attn.{role}_proj" for role in "qkv")
O_PROJ = "model.layers.1.self_attn.o_proj"
GATE, UP = "model.layers.1.mlp.gate_proj", "model.layers.1.mlp.up_proj"
DOWN = "model.layers.1.mlp.down_proj"
NORM = "model.layers.0.input_layernorm.weight"
POST_NORM = "model.layers.1.post_attention_layernorm.weight"
HEAD_SCALE = "lm_head.input_scale"

ONE = "model.safetensors"
FIRST, SECOND = (f"model-0000{n}-of-00002.safetensors" for n in (1, 2))
INDEX = "model.safetensors.index.json"
MANIFEST = "lowbit_manifest.json"
CONFIG = "config.json"


@dataclass(frozen=True)
class Variant:
    """A sound checkpoint.

    Attributes:
        model: arguments of the fixture ``tiny_model``.
        checkpoint: arguments of the fixture ``published_checkpoint``.
        tensors: one of each kind that it has; all of them can be told apart.
    """

    model: dict[str, Any]
    checkpoint: dict[str, Any]
    tensors: tuple[str, ...]


_FOLDED_HEAD = {"apply": "folded", "order": 64, "block": 64}
_ONLINE_128 = {"apply": "online", "order": 128, "block": 128}
VARIANTS = {
    # Everything a recipe may do to a model with a head of its own.
    "rotated": Variant(
        {},
        {
            "scheme": "w4a4kv4",
            "residual": {**_ONLINE_128, "apply": "folded", "sign_seed": 3},
            "attn_input": {"apply": "online", "order": 64, "block": 128},
            "k": {**_FOLDED_HEAD, "apply": "online"},
            "v": _FOLDED_HEAD,
            "o_input": {"apply": "online", "order": 4, "block": 256},
            "mlp_input": _ONLINE_128,
            "down_input": {"apply": "online", "order": 256, "block": 256},
        },
        (
            f"{EMBEDDING}.weight",
            f"{HEAD}.weight",
            FINAL_NORM,
            NORM,
            POST_NORM,
            f"{Q}.weight_packed",
            f"{DOWN}.weight_scale",
        ),
    ),
    "grouped": Variant(
        {"attention_bias": True, "mlp_bias": True},
        {"scheme": "w2a16-g64", "vocab_bits": 8},
        (
            f"{EMBEDDING}.weight_packed",
            f"{EMBEDDING}.weight_scale",
            f"{HEAD}.weight_packed",
            f"{HEAD}.weight_scale",
            NORM,
            f"{K}.weight_packed",
            f"{V}.weight_scale",
            f"{GATE}.weight_zero_point",
            f"{Q}.bias",
            f"{DOWN}.bias",
        ),
    ),
    "tied": Variant(
        {"tie_word_embeddings": True},
        {
            "scheme": "w6a6",
            "vocab_bits": 8,
            "residual": {**_ONLINE_128, "sign_seed": 5},
        },
        (
            f"{EMBEDDING}.weight_packed",
            f"{EMBEDDING}.weight_scale",
            HEAD_SCALE,
            FINAL_NORM,
            f"{UP}.weight_packed",
            f"{O_PROJ}.weight_scale",
        ),
    ),
    "sharded": Variant(
        {},
        {"scheme": "w4a16", "shards": 2},
        (
            f"{EMBEDDING}.weight",
            f"{HEAD}.weight",
            POST_NORM,
            f"{O_PROJ}.weight_packed",
            f"{K}.weight_scale",
        ),
    ),
}


@dataclass(frozen=True)
class Mutation:
    """One way to make a checkpoint wrong.

    Attributes:
        kind: what was done, a row of the benchmark's table.
        variant: key of VARIANTS.
        edit: does it.
        named: what the refusal has to contain: the tensor, file or key.
        detail: tells it from others of its kind.
        agree: the manifest is then written anew, as a tool with a bug would.
        arguments: of the engine.
    """

    kind: str
    variant: str
    edit: Edit
    named: str
    detail: str = ""
    agree: bool = False
    arguments: tuple[tuple[str, str], ...] = ()

    @property
    def name(self) -> str:
        """Unique in the catalogue."""
        manifest = "manifest agrees" if self.agree else ""
        parts = (self.kind, self.variant, self.named, self.detail, manifest)
        return "; ".join(filter(None, parts))

    def is_named(self, message: str) -> bool:
        """Whether a message contains the tensor, file or key as a whole word."""
        return re.search(rf"(?<!\w){re.escape(self.named)}(?!\w)", message) is not None


def prepare(directory: Path, mutation: Mutation, write_manifest: Any) -> None:
    """Apply a mutation to a copy of its variant."""
    mutation.edit(directory)
    if mutation.agree:
        write_manifest(directory)
