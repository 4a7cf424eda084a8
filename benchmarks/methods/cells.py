# SPDX-License-Identifier: Apache-2.0
"""What is measured: models, schemes, methods, ablations and seeds, as data."""

import fnmatch
import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import yaml

from vllm_lowbit.calibrate.recipe import (
    Recipe,
    built_in_recipes,
    load_recipe,
    parse_recipe,
)

MODELS = ("ref-7m", "ref-7m-outliers")
FLOAT = "float"
FLAG = "flag"
MAIN_SCHEME = "w4a4kv4"
# A seed chooses the windows and the random signs: the same for every method.
SEEDS = (0, 1, 2)
# Those that read no text to quantize and draw nothing: one seed is all of them.
SEEDLESS = (FLOAT, FLAG, "rtn")
METHODS = (
    FLAG,
    "rtn",
    "smoothquant",
    "gptq",
    "gptaq",
    "quarot",
    "quarot-gptq",
    "spinquant",
    "omniquant",
    "ostquant",
    "lowbit",
    "lowbit-best",
)
_WEIGHTS = (FLAG, "rtn", "gptq", "omniquant", "lowbit", "lowbit-best")
# Scheme -> its methods and how many of the seeds.
SCHEMES: dict[str, tuple[tuple[str, ...], int]] = {
    MAIN_SCHEME: (METHODS, len(SEEDS)),
    "w4a16": ((*_WEIGHTS, "quarot", "quarot-gptq"), 1),
    "w3a16-g128": (_WEIGHTS, 1),
    "w2a16-g64": (_WEIGHTS, 1),
    "w6a6": (_WEIGHTS, 1),
    "w4a8kv4": ((FLAG, "rtn", "gptq", "quarot", "quarot-gptq", "lowbit"), 1),
}
# By recipe; each leaves out or replaces one ingredient of it, at the first seed, by
# keys: a dotted path, and the value or section that takes its place; None removes a key
# that would have no effect, or gives it its default.
_NO_ROTATION = dict.fromkeys(
    ("learn.start", "learn.optimizer", "learn.rotation_lr"), None
)
_NO_SCALES = {"transforms.scales": "none", "learn.scale_lr": None}
_NO_TOP = {"learn.top_k": None, "learn.renormalise": None}
ABLATIONS: dict[str, dict[str, dict[str, Any]]] = {
    "ostquant": {
        "rotations start as random Hadamards": {"learn.start": "hadamard"},
        "rotations start as the identity": {"learn.start": "identity"},
        "rotations not learned": {
            "transforms.residual": "hadamard",
            "transforms.value": "hadamard",
            **_NO_ROTATION,
        },
        "scales not learned": _NO_SCALES,
        "without scales": {**_NO_SCALES, "transforms.equalize": False},
        "without the value rotation": {"transforms.value": "none"},
        "loss mse": {"learn.loss": "mse", **_NO_TOP},
        "loss cross-entropy": {"learn.loss": "cross_entropy", **_NO_TOP},
        "loss kl-top renormalised": {"learn.renormalise": True},
        "weights in float while learning": {"learn.quantize_weights": False},
        "weights a bit finer while learning": {"learn.extra_weight_bits": 1},
        "without GPTQ": {"weights": {"method": "rtn"}},
    },
    "lowbit-best": {
        "inputs not clipped": {"activations.clip_ratio": None},
        "input clips learned": {"activations.clip": "learned"},
    },
}


@dataclass(frozen=True)
class Cell:
    """One measurement.

    Attributes:
        model: directory under ``models/``.
        scheme: of the checkpoint, ``float`` for the model as it is.
        method: a row of the table.
        seed: of the recipe.
        recipe: name of the recipe, None where there is none.
        overrides: of the recipe, as in :data:`ABLATIONS`.
    """

    model: str
    scheme: str
    method: str
    seed: int = 0
    recipe: str | None = None
    overrides: Mapping[str, Any] = field(default_factory=dict)

    @property
    def key(self) -> str:
        """Its name in methods.json and for ``--cells``."""
        return f"{self.model}/{self.scheme}/{self.method}/{self.seed}"

    @property
    def is_served(self) -> bool:
        """Whether vLLM measures it too: of the first seed, but no ablation."""
        return self.seed == SEEDS[0] and not self.overrides

    def resolve(self) -> Recipe | None:
        """Its recipe with scheme, seed and overrides in place, None where it has none.

        A recipe of the method for this very scheme, ``METHOD-SCHEME``, comes first.

        Raises:
            ConfigError: for an override that the recipe does not have.
        """
        if self.recipe is None:
            return None
        own = f"{self.recipe}-{self.scheme}"
        name = own if own in built_in_recipes() else self.recipe
        recipe = load_recipe(name).override(self.scheme, seed=self.seed)
        if not self.overrides:
            return recipe
        data = yaml.safe_load(recipe.text())
        for path, value in self.overrides.items():
            *sections, key = path.split(".")
            place = data
            for section in sections:
                place = place.setdefault(section, {})
            if value is None:
                place.pop(key, None)
            else:
                place[key] = value
        return parse_recipe(yaml.safe_dump(data).encode(), self.key)

    def skipped(self) -> str | None:
        """Why it cannot be measured now, None when it can."""
        names = {self.recipe, f"{self.recipe}-{self.scheme}"}
        if self.recipe is None or names & set(built_in_recipes()):
            return None
        return f"recipe {self.recipe} does not exist"

    def fingerprint(self, inputs: Mapping[str, Any]) -> str:
        """Hash of everything that the result follows from, but the code.

        Args:
            inputs: what all cells of the model share.
        """
        recipe = self.resolve()
        data = [self.key, None if recipe is None else recipe.sha256(), inputs]
        return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()


def all_cells() -> list[Cell]:
    """Every cell, those of the first seed first: half a run is a whole table."""
    cells = [*_table(), *_ablations()]
    return sorted(cells, key=lambda cell: (cell.seed, bool(cell.overrides)))


def select(pattern: str) -> list[Cell]:
    """The cells whose key a shell pattern matches; ``*`` matches ``/`` too."""
    return [cell for cell in all_cells() if fnmatch.fnmatchcase(cell.key, pattern)]


def _table() -> Iterator[Cell]:
    for model in MODELS:
        yield Cell(model, FLOAT, FLOAT)
    for scheme, (methods, count) in SCHEMES.items():
        for method in methods:
            for model in MODELS:
                for seed in SEEDS[: 1 if method in SEEDLESS else count]:
                    recipe = None if method == FLAG else method
                    yield Cell(model, scheme, method, seed, recipe)


def _ablations() -> Iterator[Cell]:
    for recipe, parts in ABLATIONS.items():
        for name, overrides in parts.items():
            method = f"{recipe}, {name}"
            for model in MODELS:
                yield Cell(model, MAIN_SCHEME, method, SEEDS[0], recipe, overrides)
