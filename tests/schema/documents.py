# SPDX-License-Identifier: Apache-2.0
"""Valid documents of the schema, and changes to them."""

import copy
from typing import Any

from vllm_lowbit.schema import LoadTimeOptions, LowbitConfig, Manifest

SHA = "0" * 64


def config() -> dict[str, Any]:
    """A complete, valid quantization_config."""
    online = {"apply": "online", "order": 64, "block": 128, "scaled": True}
    return {
        "quant_method": "lowbit",
        "format_version": 1,
        "scheme": {
            "weights": {"bits": 4, "symmetric": True, "group_size": 128},
            "activations": {"bits": 4, "symmetric": False, "clip_ratio": 0.9},
            "kv_cache": {"bits": 4},
            "vocab_bits": 8,
        },
        "rotations": {
            "residual": {
                "apply": "folded",
                "kind": "orthogonal",
                "order": 576,
                "block": 576,
                "sign_seed": 7,
            },
            "attn_input": online,
            "k": online,
            "v": {"apply": "folded", "order": 64, "block": 64},
            "o_input": online,
            "mlp_input": None,
            "down_input": online,
            "max_tensor_parallel_size": 8,
        },
        "provenance": {
            "base_model": "org/model",
            "base_revision": "abc",
            "recipe": "name",
            "recipe_sha256": SHA,
        },
    }


def manifest() -> dict[str, Any]:
    """A valid manifest of two tensors."""
    return {
        "format_version": 1,
        "tensors": {
            "model.norm.weight": {
                "file": "model.safetensors",
                "dtype": "BF16",
                "shape": [64],
                "sha256": SHA,
            },
            "scalar": {
                "file": "model-00001-of-00002.safetensors",
                "dtype": "I64",
                "shape": [],
                "sha256": "f" * 64,
            },
        },
        "config": {"hidden_size": 64, "quantization_config": {"format_version": 1}},
    }


def options() -> dict[str, Any]:
    """Load-time options that are all different from their defaults."""
    return {"scheme": "w4a4", "activations_symmetric": True}


PARSERS = {
    "config": (LowbitConfig, config),
    "manifest": (Manifest, manifest),
    "options": (LoadTimeOptions, options),
}


def put(data: Any, path: str, value: Any) -> Any:
    """A copy of nested dicts and lists with one value set; ``DROP`` removes it."""
    data = copy.deepcopy(data)
    *parents, last = path.split("/")
    inner = data
    for key in parents:
        inner = inner[key]
    last = int(last) if isinstance(inner, list) else last
    if value is DROP:
        del inner[last]
    else:
        inner[last] = value
    return data


DROP = object()
