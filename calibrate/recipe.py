# SPDX-License-Identifier: Apache-2.0
"""Recipes: how a checkpoint is made, from a YAML file.

The built-in ones are in ``recipes/``. A recipe, the base model, the text and the
versions of the software determine the checkpoint.
"""

import difflib
import hashlib
import os
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import Field, ValidationError, ValidationInfo, field_validator
from pydantic_core import ErrorDetails

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
from .strict_yaml import KeyPath, parse_mapping

RECIPES = Path(__file__).parent / "recipes"
MAX_BYTES = 1 << 16
MAX_SEED = (1 << 63) - 1
_GPTQ_ONLY = ("damping", "block_size", "act_order")
_GPTQ = ("gptq", "gptaq")
_MODEL_ONLY = ("samples", "top_k")

Transform = Literal["hadamard", "none"]


class Transforms(StrictModel):
    """Function-preserving transforms of the float model."""

    residual: Transform = "hadamard"
    """Random-sign Hadamard of the residual stream."""
    value: Transform = "hadamard"
    """Per KV head, folded."""
    key: Transform = "hadamard"
    """Online on q and k after RoPE; only used with a quantized cache."""
    down_input: Transform = "hadamard"
    """Online before down_proj."""
    equalize: bool = False
    """Scales between up and down, and v and o (see equalize.py); folded."""
    smooth: Annotated[float, Field(ge=0, le=1)] | None = None
    """Alpha of SmoothQuant's scales (see smooth.py); folded. Instead of equalize."""

    @field_validator("smooth")
    @classmethod
    def _sets_the_same_scales(cls, value: Any, info: ValidationInfo) -> Any:
        if value is not None and info.data.get("equalize"):
            raise ValueError("sets the scales that equalize sets, remove one of them")
        return value


class WeightMethod(StrictModel):
    """How weights are rounded to their grid; the other fields are of gptq and gptaq."""

    method: Literal["rtn", "gptq", "gptaq", "omniquant"] = "gptq"
    damping: Annotated[float, Field(gt=0, le=1)] = 0.01
    """Added to the Hessian's diagonal, as a fraction of the diagonal's mean."""
    block_size: Annotated[int, Field(ge=1, le=4096)] = 128
    """Columns that are updated together."""
    act_order: bool = False
    """Columns by decreasing diagonal of the Hessian."""
    correction: Annotated[float, Field(gt=0, le=1)] = 0.25
    """Fraction of the drift from the float inputs that gptaq makes up for."""

    # Runs for keys that are given, not for defaults.
    @field_validator(*_GPTQ_ONLY, "correction")
    @classmethod
    def _is_used(cls, value: Any, info: ValidationInfo) -> Any:
        used = _GPTQ if info.field_name in _GPTQ_ONLY else _GPTQ[1:]
        method = info.data.get("method", used[0])
        if method not in used:
            raise ValueError(
                f"has no effect with method {method}, remove it or use {used[0]}"
            )
        return value


Rate = Annotated[float, Field(gt=0, le=1)]
Batch = Annotated[int, Field(ge=1, le=1 << 12)]


class OmniQuant(StrictModel):
    """Settings of method omniquant; None takes what was published for the scheme."""

    let: bool | None = None
    """Learn scales beside clipping; None: where activations are quantized."""
    alpha: Annotated[float, Field(ge=0, le=1)] = 0.5
    """SmoothQuant's, of the scales that learning starts from."""
    aug: bool | None = None
    """Also follow the float block on quantized inputs; None: for 2-bit weights."""
    epochs: Annotated[int, Field(ge=1, le=1000)] | None = None
    """None: 40 for 2-bit weights, else 20."""
    batch: Batch = 4
    """Windows of a step."""
    clip_rate: Rate = 1e-2
    """Learning rate of clipping."""
    scale_rate: Rate = 5e-3
    """Learning rate of scales."""


class Refine(StrictModel):
    """Training of what is stored, after everything else (see refine.py)."""

    scope: Literal["none", "model", "layer"] = "none"
    """On the whole model's logits, or each layer on its output in less memory."""
    samples: Annotated[int, Field(ge=2, le=1 << 16)] | None = None
    """Windows, for model; None is data.samples, which layer always takes."""
    steps: Annotated[int, Field(ge=1, le=1 << 20)] = 256
    """Of the optimiser; of every layer, for layer."""
    batch: Batch = 4
    """Windows of a step."""
    top_k: Annotated[int, Field(ge=1, le=1 << 20)] = 1000
    """Tokens of the float model's that count, for model; capped by the vocabulary."""
    code_rate: Rate = 1e-2
    """Learning rate of weights, in codes."""
    scale_rate: Rate = 1e-3
    """Learning rate of the scales' logarithms."""
    norm_rate: Rate = 1e-3
    """Learning rate of norm weights."""

    @field_validator("*")
    @classmethod
    def _is_used(cls, value: Any, info: ValidationInfo) -> Any:
        scope = info.data.get("scope", value)
        if scope == "none" and info.field_name != "scope":
            raise ValueError("has no effect with scope none, remove it or use model")
        if scope == "layer" and info.field_name in _MODEL_ONLY:
            raise ValueError("has no effect with scope layer, remove it or use model")
        return value


class ActivationGrid(StrictModel):
    """Grid of the linear inputs; their bits are the scheme's."""

    symmetric: bool = False


class Data(StrictModel):
    """How much text calibration reads."""

    samples: Annotated[int, Field(ge=1, le=1 << 16)] = 128
    """Windows."""
    seq_len: Annotated[int, Field(ge=2, le=1 << 17)] = 512
    """Tokens of a window."""


class Recipe(StrictModel):
    """How a checkpoint is made from a model."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")] = "custom"
    """What the checkpoint calls it; :meth:`sha256` identifies it."""
    scheme: str = DEFAULT_SCHEME
    """A name :func:`~vllm_lowbit.schema.scheme_from_name` knows."""
    transforms: Transforms = Transforms()
    weights: WeightMethod = WeightMethod()
    omniquant: OmniQuant = OmniQuant()
    """Of ``weights.method`` omniquant."""
    refine: Refine = Refine()
    activations: ActivationGrid = ActivationGrid()
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
        return value

    def override(
        self,
        scheme: str | None = None,
        samples: int | None = None,
        seq_len: int | None = None,
        seed: int | None = None,
        vocab_bits: int | None = None,
    ) -> Self:
        """This recipe with what is not None replaced.

        Raises:
            ConfigError: naming the key, for a value it cannot have.
        """
        data = self._mapping()
        top = {"scheme": scheme, "seed": seed, "vocab_bits": vocab_bits}
        data |= {key: value for key, value in top.items() if value is not None}
        sizes = {"samples": samples, "seq_len": seq_len}
        data["data"] |= {
            key: value for key, value in sizes.items() if value is not None
        }
        return validate(type(self), data, "recipe")

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
        if self.transforms.smooth is None:
            del data["transforms"]["smooth"]
        method = self.weights.method
        if method not in _GPTQ:
            data["weights"] = {"method": method}
        elif method != "gptaq":
            del data["weights"]["correction"]
        if method != "omniquant":
            del data["omniquant"]
        if self.refine.scope == "none":
            del data["refine"]
        elif self.refine.scope == "layer":
            for key in _MODEL_ONLY:
                del data["refine"][key]
        return data


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
    elsewhere = [
        f"{section}.{path[-1]}"
        for section, field in Recipe.model_fields.items()
        if path[-1] in getattr(field.annotation, "model_fields", ())
    ]
    hint = f"did you mean {(close + elsewhere)[0]}? " if close or elsewhere else ""
    return f"{hint}known: {', '.join(known)}"
