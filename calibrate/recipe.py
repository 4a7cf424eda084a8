# SPDX-License-Identifier: Apache-2.0
"""Recipes: how a checkpoint is made, from a YAML file.

The built-in ones are in ``recipes/``. A recipe, the base model, the text and the
versions of the software determine the checkpoint.
"""

import difflib
import hashlib
import math
import os
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import Field, ValidationError, ValidationInfo, field_validator
from pydantic_core import ErrorDetails

from ..architecture import ModelShape
from ..errors import ConfigError
from ..schema import (
    DEFAULT_SCHEME,
    StrictModel,
    dotted,
    scheme_from_name,
    shorten,
    validate,
)
from .files import read_bytes
from .recipe_sections import (
    GPTQ_METHODS,
    MODEL_ONLY,
    ActivationGrid,
    Clip,
    Data,
    Learn,
    OmniQuant,
    Refine,
    Transforms,
    WeightMethod,
)
from .strict_yaml import KeyPath, parse_mapping

RECIPES = Path(__file__).parent / "recipes"
MAX_BYTES = 1 << 16
MAX_SEED = (1 << 63) - 1
# Of the sections in a text, whose hash says what a checkpoint was made by.
_ORDER = (
    "name",
    "scheme",
    "transforms",
    "learn",
    "weights",
    "omniquant",
    "refine",
    "activations",
    "vocab_bits",
    "data",
    "seed",
)
_DECIDE_LEARNING = ("scheme", "transforms", "weights", "activations")


class Recipe(StrictModel):
    """How a checkpoint is made from a model."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")] = "custom"
    """What the checkpoint calls it; :meth:`sha256` identifies it."""
    scheme: str = DEFAULT_SCHEME
    """A name :func:`~vllm_lowbit.schema.scheme_from_name` knows."""
    # What is learned follows from these three; a text has its sections in _ORDER.
    transforms: Transforms = Transforms()
    weights: WeightMethod = WeightMethod()
    activations: ActivationGrid = ActivationGrid()
    learn: Learn = Learn()
    omniquant: OmniQuant = OmniQuant()
    """Of ``weights.method`` omniquant."""
    refine: Refine = Refine()
    vocab_bits: Literal[8, 16] = 16
    data: Data = Data()
    seed: Annotated[int, Field(ge=0, le=MAX_SEED)] = 0
    """Of random signs and of the choice of windows."""

    @field_validator("scheme")
    @classmethod
    def _exists(cls, name: str) -> str:
        scheme_from_name(name)
        return name

    @field_validator("omniquant")
    @classmethod
    def _is_used(cls, value: Any, info: ValidationInfo) -> Any:
        weights = info.data.get("weights")
        if weights is not None and weights.method != "omniquant":
            raise ValueError(
                f"has no effect with weights.method {weights.method}, remove it or use "
                "omniquant"
            )
        grid = info.data.get("activations")
        if (
            grid is not None
            and grid.clip != "learned"
            and "input_clip_rate" in value.model_fields_set
        ):
            raise ValueError(
                f"input_clip_rate has no effect with activations.clip {grid.clip}, "
                "remove it or use learned"
            )
        return value

    @field_validator("weights")
    @classmethod
    def _learns_scales_once(cls, value: WeightMethod, info: ValidationInfo) -> Any:
        transforms = info.data.get("transforms")
        if (
            value.method == "omniquant"
            and transforms is not None
            and transforms.scales_are_learned
        ):
            raise ValueError(
                "method omniquant learns the scales that transforms.scales learns; set "
                "transforms.scales to none"
            )
        return value

    @field_validator("activations")
    @classmethod
    def _clips_as_asked(
        cls, value: ActivationGrid, info: ValidationInfo
    ) -> ActivationGrid:
        transforms, weights = (info.data.get(n) for n in ("transforms", "weights"))
        if transforms is None or weights is None:  # wrong itself
            return value
        if value.clip == "learned" and transforms.smooth is not None:
            raise ValueError(
                "clip learned is not supported with transforms.smooth, whose scales "
                "are not there yet while clip ratios are learned; use clip searched"
            )
        trained = transforms.rotations_are_learned or transforms.scales_are_learned
        if (
            value.clip == "searched"
            and "clip_ratio" in value.model_fields_set
            and not (trained or weights.method == "omniquant")
        ):
            raise ValueError(
                "clip_ratio has no effect with clip searched where nothing is learned, "
                "remove it"
            )
        return value

    @field_validator("learn")
    @classmethod
    def _is_learned(cls, learn: Learn, info: ValidationInfo) -> Learn:
        known: list[Any] = [info.data.get(name) for name in _DECIDE_LEARNING]
        if None in known:  # wrong itself
            return learn
        transforms = known[1]
        if not _learns(*known):
            raise ValueError(
                "has no effect without a transform that is learned, remove it or set "
                "transforms.residual, value or scales to learned, or activations.clip "
                "for quantized inputs and any method but omniquant"
            )
        clips = _learns_clips(known[0], *known[2:])
        unused = sorted(
            Learn.without_effect(transforms, clips) & learn.model_fields_set
        )
        if unused:
            whats = {"scale_lr": "scale", "clip_lr": "clip ratio"}
            what = whats.get(unused[0], "rotation")
            raise ValueError(
                f"{', '.join(unused)} has no effect where no {what} is learned, "
                "remove it"
            )
        return learn

    @property
    def learns(self) -> bool:
        """Whether any transform or clip ratio is learned end to end."""
        return _learns(*(getattr(self, name) for name in _DECIDE_LEARNING))

    @property
    def learns_clips(self) -> bool:
        """Whether clip ratios are among that; method omniquant learns its own."""
        return _learns_clips(self.scheme, self.weights, self.activations)

    @property
    def clip(self) -> Clip:
        """How clip ratios of inputs are found; fixed where inputs are not quantized."""
        if scheme_from_name(self.scheme).activations.bits == 16:
            return "fixed"
        return self.activations.clip

    def sized(self, shape: ModelShape) -> Self:
        """This recipe with steps and tokens per step of learning filled in.

        At 7 billion parameters and above the published 100 steps of 32 x 2048 tokens;
        below, tokens by the square root of the size, at least 2048, and more steps, at
        most 200: a small model can afford them.
        """
        if not self.learns:
            return self
        size = sum(math.prod(size) for size in shape.tensors().values()) / 7e9
        tokens = 2.0 ** round(math.log2(65536 * math.sqrt(size)))
        learn = self.learn
        filled = learn.model_copy(
            update={
                "steps": learn.steps or min(200, max(100, round(100 * size**-0.2))),
                "tokens_per_step": learn.tokens_per_step
                or int(min(65536, max(2048, tokens))),
            }
        )
        return self.model_copy(update={"learn": filled})

    def override(
        self,
        scheme: str | None = None,
        samples: int | None = None,
        seq_len: int | None = None,
        seed: int | None = None,
        vocab_bits: int | None = None,
    ) -> Self:
        """This recipe with what is not None replaced.

        Keys go that have no effect any more, such as ``learn.clip_lr`` with inputs of
        16 bits.

        Raises:
            ConfigError: naming the key, for a value it cannot have.
        """
        chosen = self if scheme is None else self.model_copy(update={"scheme": scheme})
        data = chosen._mapping()
        top = {"seed": seed, "vocab_bits": vocab_bits}
        data |= {key: value for key, value in top.items() if value is not None}
        sizes = {"samples": samples, "seq_len": seq_len}
        data["data"] |= {
            key: value for key, value in sizes.items() if value is not None
        }
        return validate(type(self), data, "recipe")

    @property
    def rounding(self) -> WeightMethod:
        """How codes are found, once what is learned is."""
        if self.weights.method != "omniquant":
            return self.weights
        return WeightMethod(method=self.omniquant.rounding)

    def training_samples(self) -> int:
        """Windows that anything is fitted to."""
        refined = self.refine.samples if self.refine.scope == "model" else None
        return max(self.data.samples, refined or 0)

    def text(self) -> str:
        """The recipe as a file: every key that has an effect, in a fixed order.

        Parsing it gives an equal recipe, and equal recipes have equal texts.
        """
        body = yaml.safe_dump(self._mapping(), sort_keys=False)
        return f"# Recipe of vllm-lowbit calibrate, every key filled in.\n{body}"

    def sha256(self) -> str:
        """Hash of :meth:`text` in UTF-8, 64 hexadecimal digits."""
        return hashlib.sha256(self.text().encode()).hexdigest()

    def _mapping(self) -> dict[str, Any]:
        data = self.model_dump()
        if self.learns:
            learn = self.learn.mapping(self.transforms, self.learns_clips)
            data["learn"] = learn
        else:
            del data["learn"]
        if self.transforms.smooth is None:
            del data["transforms"]["smooth"]
        if self.activations.clip_ratio == 1:
            del data["activations"]["clip_ratio"]
        if self.activations.clip == "fixed":
            del data["activations"]["clip"]
        method = self.weights.method
        if method not in GPTQ_METHODS:
            data["weights"] = {"method": method}
        elif method != "gptaq":
            del data["weights"]["correction"]
        if method != "omniquant":
            del data["omniquant"]
        elif self.activations.clip != "learned":
            del data["omniquant"]["input_clip_rate"]
        if self.refine.scope == "none":
            del data["refine"]
        elif self.refine.scope == "layer":
            for key in MODEL_ONLY:
                del data["refine"][key]
        return {key: data[key] for key in _ORDER if key in data}


def _learns(
    scheme: str, transforms: Transforms, weights: WeightMethod, grid: ActivationGrid
) -> bool:
    """Whether anything is learned end to end."""
    trained = transforms.rotations_are_learned or transforms.scales_are_learned
    return trained or _learns_clips(scheme, weights, grid)


def _learns_clips(scheme: str, weights: WeightMethod, grid: ActivationGrid) -> bool:
    """Whether clip ratios are learned end to end."""
    return (
        grid.clip == "learned"
        and weights.method != "omniquant"
        and scheme_from_name(scheme).activations.bits != 16
    )


def built_in_recipes() -> tuple[str, ...]:
    """Names :func:`load_recipe` knows without a file."""
    return tuple(sorted(path.stem for path in RECIPES.glob("*.yaml")))


def load_recipe(name_or_path: str) -> Recipe:
    """A built-in recipe, or one from a YAML file.

    Args:
        name_or_path: the name of a built-in recipe; else a path, if it ends in .yaml
            or .yml, has a path separator, or a file of that name is there.

    Raises:
        ConfigError: as ``FILE:LINE: problem`` for what is wrong inside a file.
    """
    names = built_in_recipes()
    if name_or_path in names:
        path = RECIPES / f"{name_or_path}.yaml"
    elif (
        name_or_path.endswith((".yaml", ".yml"))
        or os.sep in name_or_path
        or os.path.isfile(name_or_path)
    ):
        path = Path(name_or_path)
    else:
        close = difflib.get_close_matches(name_or_path, names, n=1)
        hint = f"; did you mean {close[0]}?" if close else ";"
        raise ConfigError(
            f"recipe {shorten(name_or_path)} does not exist{hint} built in: "
            f"{', '.join(names)}; any other is the path of a .yaml file"
        )
    return parse_recipe(read_bytes(path, MAX_BYTES), str(path))


def parse_recipe(data: bytes, source: str) -> Recipe:
    """A recipe from the bytes of a YAML file.

    Args:
        data: UTF-8 YAML.
        source: file named in errors.

    Raises:
        ConfigError: as ``SOURCE:LINE: problem`` for every problem, at most 8.
    """
    mapping, lines = parse_mapping(data, source)
    try:
        return Recipe.model_validate(mapping)
    except ValidationError as error:
        located = sorted(_located(details, lines) for details in error.errors())
        problems = [f"{source}:{line}: {problem}" for line, problem in located[:8]]
        raise ConfigError("; ".join(problems)) from None


def _located(details: ErrorDetails, lines: dict[KeyPath, int]) -> tuple[int, str]:
    """Line and text of one problem."""
    path = tuple(str(part) for part in details["loc"])
    name = f"key {dotted(path)}"
    if details["type"] == "extra_forbidden":
        return lines[path], f"{name} does not exist; {_known(path)}"
    message = details["msg"].removeprefix("Value error, ")
    if details["type"] == "model_type":
        message = "must hold keys and values"
    return lines[path], f"{name}: {message}, got {shorten(details['input'])}"


def _known(path: KeyPath) -> str:
    """What an unknown key may have meant, and the keys there are beside it."""
    model: Any = Recipe
    for key in path[:-1]:
        model = model.model_fields[key].annotation
    known = list(model.model_fields)
    close = difflib.get_close_matches(path[-1], known, n=1)
    # The section every recipe has first.
    sections = sorted(Recipe.model_fields.items(), key=lambda item: item[0] != "data")
    elsewhere = [
        f"{section}.{path[-1]}"
        for section, field in sections
        if path[-1] in getattr(field.annotation, "model_fields", ())
    ]
    hint = f"did you mean {(close + elsewhere)[0]}? " if close or elsewhere else ""
    return f"{hint}known: {', '.join(known)}"
