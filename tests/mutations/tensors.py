# SPDX-License-Identifier: Apache-2.0
"""Mutations of tensors: present, named, shaped, typed and valued otherwise."""

import re
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from math import inf, nan
from typing import Any

import torch

from .edits import copy, drop, duplicate, flip, poke, rename, replace, swap
from .mutation import (
    DOWN,
    EMBEDDING,
    FINAL_NORM,
    GATE,
    HEAD,
    HEAD_SCALE,
    NORM,
    O_PROJ,
    POST_NORM,
    UP,
    VARIANTS,
    K,
    Mutation,
    Q,
    V,
)

Rows = Callable[[Iterable[tuple[Any, ...]]], Iterator[tuple[Any, ...]]]
BOTH = (False, True)
# Variant and tensor.
EVERY = [(variant, name) for variant, v in VARIANTS.items() for name in v.tensors]
# Variant, name, name it gets.
RENAMED = [
    ("rotated", NORM, "model.layers.0.input_norm.weight"),
    ("rotated", f"{Q}.weight_packed", f"{Q}.qweight"),
    ("rotated", f"{HEAD}.weight", f"model.{HEAD}.weight"),
    ("grouped", f"{GATE}.weight_zero_point", f"{GATE}.zero_point"),
    ("tied", HEAD_SCALE, "lm_head.scale"),
]
EXTRA = [
    ("rotated", f"{Q}.weight_scale", f"{Q}.weight_zero_point"),
    ("rotated", f"{EMBEDDING}.weight", "model.embed_positions.weight"),
    ("rotated", FINAL_NORM, "model.layers.9.input_layernorm.weight"),
    ("rotated", FINAL_NORM, HEAD_SCALE),
    ("rotated", FINAL_NORM, f"{DOWN}.bias"),
    ("rotated", FINAL_NORM, "rotary_emb.inv_freq"),
    ("grouped", f"{Q}.bias", f"{Q}.weight_shape"),
    ("tied", f"{EMBEDDING}.weight_packed", f"{HEAD}.weight_packed"),
]
DUPLICATED = [
    ("sharded", POST_NORM),
    ("sharded", f"{O_PROJ}.weight_packed"),
    ("sharded", f"{HEAD}.weight"),
]
SHAPES = {
    "row less": lambda t: t[:-1],
    "row more": lambda t: torch.cat((t, t[:1])),
    "flat": lambda t: t.flatten(),
    "leading 1": lambda t: t.unsqueeze(0),
    "empty": lambda t: t[:0],
}
RESHAPED = [
    ("rotated", f"{Q}.weight_packed"),
    ("rotated", f"{DOWN}.weight_scale"),
    ("rotated", f"{HEAD}.weight"),
]
TRANSPOSED = [
    ("rotated", f"{EMBEDDING}.weight"),
    ("rotated", f"{HEAD}.weight"),
    ("rotated", f"{GATE}.weight_packed"),
    ("rotated", f"{K}.weight_scale"),
    ("grouped", f"{DOWN}.weight_zero_point"),
]
DTYPES = [
    ("rotated", NORM, torch.float64),
    ("rotated", f"{EMBEDDING}.weight", torch.int8),
    ("rotated", f"{HEAD}.weight", torch.float8_e4m3fn),
    ("rotated", f"{Q}.weight_packed", torch.int64),
    ("rotated", f"{Q}.weight_packed", torch.float32),
    ("rotated", f"{DOWN}.weight_scale", torch.bfloat16),
    ("rotated", f"{DOWN}.weight_scale", torch.float64),
    ("grouped", f"{GATE}.weight_zero_point", torch.uint8),
    ("grouped", f"{GATE}.weight_zero_point", torch.float32),
    ("grouped", f"{Q}.bias", torch.int32),
    ("tied", HEAD_SCALE, torch.float16),
]
SWAPPED = [
    ("rotated", f"{GATE}.weight_packed", f"{UP}.weight_packed"),
    ("rotated", f"{K}.weight_scale", f"{V}.weight_scale"),
    ("rotated", f"{HEAD}.weight", f"{EMBEDDING}.weight"),
    ("grouped", f"{HEAD}.weight_packed", f"{EMBEDDING}.weight_packed"),
    ("grouped", f"{GATE}.weight_zero_point", f"{UP}.weight_zero_point"),
    ("sharded", f"{Q}.weight_packed", "model.layers.1.self_attn.q_proj.weight_packed"),
]
BAD_SCALES = (nan, inf, -inf, 0.0, -0.5, 1e-40)
SCALES = [
    ("rotated", f"{Q}.weight_scale"),
    ("grouped", f"{V}.weight_scale"),
    ("grouped", f"{EMBEDDING}.weight_scale"),
]
# A row of words of zeros: its codes are -2^(b-1), which symmetric grids lack.
CODES = [
    ("rotated", f"{Q}.weight_packed"),
    ("rotated", f"{DOWN}.weight_packed"),
    ("tied", f"{UP}.weight_packed"),
    ("tied", f"{EMBEDDING}.weight_packed"),
    ("grouped", f"{HEAD}.weight_packed"),
    ("sharded", f"{O_PROJ}.weight_packed"),
]
NOT_FINITE = [
    ("rotated", NORM),
    ("rotated", FINAL_NORM),
    ("rotated", POST_NORM),
    ("rotated", f"{EMBEDDING}.weight"),
    ("rotated", f"{HEAD}.weight"),
    ("grouped", f"{Q}.bias"),
    ("grouped", f"{DOWN}.bias"),
    ("tied", HEAD_SCALE),
]


def tensor_mutations(codes: str) -> Iterator[Mutation]:
    """With the manifest as it was, and those that have to be found without it.

    Args:
        codes: what the tensors of codes are called, ``weight_packed`` if they are ours.
    """
    rows = partial(_renamed, codes)
    yield from _names(rows)
    yield from _shapes_and_dtypes(rows)
    yield from _values(rows)


def _renamed(codes: str, table: Iterable[tuple[Any, ...]]) -> Iterator[tuple[Any, ...]]:
    for row in table:
        yield tuple(
            re.sub("weight_packed$", codes, cell) if isinstance(cell, str) else cell
            for cell in row
        )


def _names(rows: Rows) -> Iterator[Mutation]:
    for agree in BOTH:
        for variant, name in rows(EVERY):
            yield Mutation("deleted tensor", variant, drop(name), name, agree=agree)
        for variant, name, to in rows(RENAMED):
            edit = rename(name, to)
            yield Mutation("renamed tensor", variant, edit, name, to, agree)
        for variant, name, to in rows(EXTRA):
            yield Mutation("extra tensor", variant, copy(name, to), to, agree=agree)
        for variant, name in rows(DUPLICATED):
            edit = duplicate(name)
            yield Mutation("tensor in two shards", variant, edit, name, agree=agree)


def _shapes_and_dtypes(rows: Rows) -> Iterator[Mutation]:
    for agree in BOTH:
        for what, by in SHAPES.items():
            for variant, name in rows(RESHAPED):
                edit = replace(name, by)
                yield Mutation("wrong shape", variant, edit, name, what, agree)
        for variant, name in rows(TRANSPOSED):
            edit = replace(name, lambda t: t.t())
            yield Mutation("wrong shape", variant, edit, name, "transposed", agree)
        for variant, name, dtype in rows(DTYPES):
            edit = replace(name, lambda t, dtype=dtype: t.to(dtype))
            yield Mutation("wrong dtype", variant, edit, name, str(dtype), agree)


def _values(rows: Rows) -> Iterator[Mutation]:
    for variant, name in rows(EVERY):
        for bit in (0, 6):
            edit, detail = flip(name, bit), f"bit {bit}"
            yield Mutation("bit flip", variant, edit, name, detail)
    for variant, name, other in rows(SWAPPED):
        yield Mutation("swapped data", variant, swap(name, other), name, other)
    for agree in BOTH:
        for variant, name in rows(SCALES):
            for value in BAD_SCALES:
                edit, detail = poke(name, value), str(value)
                yield Mutation("impossible scale", variant, edit, name, detail, agree)
        for variant, name in rows(CODES):
            edit = replace(name, lambda t: torch.cat((t[:-1], 0 * t[-1:])))
            yield Mutation("impossible code", variant, edit, name, "", agree)
        for value in (2, -3, 127, -128):
            kind, name = "impossible zero point", f"{GATE}.weight_zero_point"
            yield Mutation(kind, "grouped", poke(name, value), name, str(value), agree)
        for variant, name in rows(NOT_FINITE):
            for value in (nan, inf):
                edit, detail = poke(name, value), str(value)
                yield Mutation("not finite", variant, edit, name, detail, agree)
