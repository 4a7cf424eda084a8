# SPDX-License-Identifier: Apache-2.0
"""What a config may say of RoPE: kinds, keys and values that are computed.

Checks yield the keys that ask for something else, their values, and what is supported.
"""

import math
from collections.abc import Iterator, Mapping

from .schema import shorten

Refused = Iterator[tuple[str, object, str]]
FULL, SLIDING = "full_attention", "sliding_attention"
LAYER_TYPES = (FULL, SLIDING)
_COMMON_ROPE_KEYS = ("rope_type", "type", "rope_theta", "partial_rotary_factor")
# RoPE types that vLLM and transformers compute alike, with the keys they must and may
# have. "dynamic" is not: beyond max_position_embeddings only transformers scales.
_ROPE_KEYS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "default": ((), ()),
    "linear": (("factor",), ()),
    "llama3": (
        ("factor", "low_freq_factor", "high_freq_factor"),
        ("original_max_position_embeddings",),
    ),
    "yarn": (
        ("factor",),
        (
            "original_max_position_embeddings",
            "attention_factor",
            "beta_fast",
            "beta_slow",
            "mscale",
            "mscale_all_dim",
            "truncate",
        ),
    ),
}


def refused_ropes(ropes: object, types: tuple[str, ...]) -> Refused:
    """Of ``rope_parameters`` by type of layer; kinds as for :func:`refused_rope`."""
    key, known = "rope_parameters", " and ".join(LAYER_TYPES)
    if ropes is None:
        return
    if not isinstance(ropes, Mapping):
        yield key, ropes, f"an object with {known}, or null"
        return
    for name, rope in ropes.items():
        if name not in LAYER_TYPES:
            yield f"{key}.{shorten(name)}", rope, known
        yield from refused_rope(f"{key}.{name}", rope, types)


def refused_rope(key: str, rope: object, types: tuple[str, ...]) -> Refused:
    """Of one set of parameters.

    Args:
        key: of the config, for what is yielded.
        rope: its value.
        types: kinds that the architecture may have.
    """
    if rope is None:
        return
    if not isinstance(rope, Mapping):
        yield key, rope, "an object, or null"
        return
    names = [rope[name] for name in ("rope_type", "type") if rope.get(name) is not None]
    kind = names[0] if names else "default"
    if not isinstance(kind, str) or kind not in types:
        yield f"{key}.rope_type", kind, ", ".join(types)
        return
    if names[1:] not in ([], [kind]):
        yield f"{key}.type", names[1], f"{kind!r}, as rope_type has it"
    required, optional = _ROPE_KEYS[kind]
    known = (*_COMMON_ROPE_KEYS, *required, *optional)
    for name, value in rope.items():
        if name not in known:
            yield f"{key}.{shorten(name)}", value, ", ".join(known)
    factor = rope.get("partial_rotary_factor")
    if factor is not None and not same(factor, 1.0):
        yield f"{key}.partial_rotary_factor", factor, "1.0 or null"
    for name in required:
        if rope.get(name) is None:
            yield f"{key}.{name}", None, "a number above 0"
    for name in ("rope_theta", *required, *optional):
        value = rope.get(name)
        if name != "truncate":
            yield from not_positive(f"{key}.{name}", value)
        elif value is not None and type(value) is not bool:
            yield f"{key}.{name}", value, "true or false"
    if kind == "linear" and type(rope.get("factor")) is int:
        yield (
            f"{key}.factor",
            rope["factor"],
            "a fraction such as 2.0, which vLLM needs",
        )


def not_positive(key: str, value: object) -> Refused:
    if value is None:
        return
    number = type(value) in (int, float) and math.isfinite(value)  # type: ignore[arg-type]
    if not number or value <= 0:  # type: ignore[operator]
        yield key, value, "a number above 0"


def same(value: object, other: object) -> bool:
    """Equal, and a boolean only to a boolean."""
    return value == other and isinstance(value, bool) == isinstance(other, bool)
