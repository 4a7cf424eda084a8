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

from ..architecture import LlamaShape
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
Rotation = Literal["hadamard", "learned", "none"]


class Transforms(StrictModel):
    """Function-preserving transforms of the float model."""

    residual: Rotation = "hadamard"
    """Random-sign Hadamard of the residual stream, or any rotation, learned."""
    value: Rotation = "hadamard"
    """Per KV head, folded."""
    key: Transform = "hadamard"
    """Online on q and k after RoPE; only used with a quantized cache."""
    down_input: Transform = "hadamard"
    """Online before down_proj."""
    attn_input: Transform = "none"
    """Online before q, k and v, after the norm and its scale."""
    mlp_input: Transform = "none"
    """Online before gate and up."""
    equalize: bool = False
    """Scales between up and down, and v and o (see equalize.py); folded."""
    smooth: Annotated[float, Field(ge=0, le=1)] | None = None
    """Alpha of SmoothQuant's scales (see smooth.py); folded. Instead of equalize."""
    scales: Literal["learned", "none"] = "none"
    """Between norms and linears, v and o, k and q, up and down; those of ``equalize``
    are where they start. Folded."""

    @field_validator("smooth")
    @classmethod
    def _sets_the_same_scales(cls, value: Any, info: ValidationInfo) -> Any:
        if value is not None and info.data.get("equalize"):
            raise ValueError("sets the scales that equalize sets, remove one of them")
        return value

    @property
    def rotations_are_learned(self) -> bool:
        return "learned" in (self.residual, self.value)

    @property
    def scales_are_learned(self) -> bool:
        return self.scales == "learned"


class Learn(StrictModel):
    """How transforms are learned; only where some are."""

    start: Literal["womi", "hadamard", "identity"] = "womi"
    """Of rotations; see learn/start.py."""
    loss: Literal["kl_top", "mse", "cross_entropy"] = "kl_top"
    """Between the quantized and the float model; cross_entropy is the text's."""
    top_k: Annotated[int, Field(ge=1, le=1 << 20)] = 1000
    """Tokens of kl_top: the float model's likeliest, at most the whole vocabulary."""
    renormalise: bool = False
    """Whether kl_top takes those tokens for the whole distribution."""
    optimizer: Literal["riemannian_adam", "cayley_sgd"] = "riemannian_adam"
    """Of rotations; scales have Adam."""
    rotation_lr: Annotated[float, Field(gt=0, le=10)] = 0.05
    """Of the first step; decays to 0 as a half cosine."""
    scale_lr: Annotated[float, Field(gt=0, le=1)] = 0.006
    """The same of the scales' logarithms."""
    steps: Annotated[int, Field(ge=1, le=1 << 20)] | None = None
    """null: by the size of the model."""
    tokens_per_step: Annotated[int, Field(ge=2, le=1 << 24)] | None = None
    """Rounded to windows; null: by the size of the model."""
    quantize_weights: bool = False
    """Whether weights are rounded to nearest meanwhile, or in float."""

    @field_validator("top_k", "renormalise")
    @classmethod
    def _is_used(cls, value: Any, info: ValidationInfo) -> Any:
        if info.data.get("loss") != "kl_top":
            raise ValueError("has an effect with loss kl_top only, remove it")
        return value

    def mapping(self, transforms: Transforms) -> dict[str, Any]:
        """Every key that has an effect with these transforms."""
        data = self.model_dump()
        unused: set[str] = set()
        if self.loss != "kl_top":
            unused |= {"top_k", "renormalise"}
        return {
            key: value
            for key, value in data.items()
            if key not in unused | self.without_effect(transforms)
        }

    @staticmethod
    def without_effect(transforms: Transforms) -> set[str]:
        """Keys that mean nothing with these transforms."""
        keys: set[str] = set()
        if not transforms.rotations_are_learned:
            keys |= {"start", "optimizer", "rotation_lr"}
        if not transforms.scales_are_learned:
            keys.add("scale_lr")
        return keys


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
    learn: Learn = Learn()
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

    @field_validator("learn")
    @classmethod
    def _learns(cls, learn: Learn, info: ValidationInfo) -> Learn:
        transforms = info.data.get("transforms")
        if transforms is None:  # wrong itself
            return learn
        if not (transforms.rotations_are_learned or transforms.scales_are_learned):
            raise ValueError(
                "has no effect without a transform that is learned, remove it or set "
                "transforms.residual, value or scales to learned"
            )
        unused = sorted(Learn.without_effect(transforms) & learn.model_fields_set)
        if unused:
            what = "scale" if unused == ["scale_lr"] else "rotation"
            raise ValueError(
                f"{', '.join(unused)} has no effect where no {what} is learned, "
                "remove it"
            )
        return learn

    @property
    def learns(self) -> bool:
        """Whether any transform is learned."""
        transforms = self.transforms
        return transforms.rotations_are_learned or transforms.scales_are_learned

    def sized(self, shape: LlamaShape) -> Self:
        """This recipe with steps and tokens per step of learning filled in.

        At 7 billion parameters and above the published 100 steps of 32 x 2048 tokens;
        below, tokens by the square root of the size, at least 2048, and more steps, at
        most 500: a small model can afford them.
        """
        if not self.learns:
            return self
        size = sum(math.prod(size) for size in shape.tensors().values()) / 7e9
        tokens = 2.0 ** round(math.log2(65536 * math.sqrt(size)))
        learn = self.learn
        filled = learn.model_copy(
            update={
                "steps": learn.steps or min(500, max(100, round(100 * size**-0.2))),
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
        if self.learns:
            data["learn"] = self.learn.mapping(self.transforms)
        else:
            del data["learn"]
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
    # The section every recipe has first.
    sections = sorted(Recipe.model_fields.items(), key=lambda item: item[0] != "data")
    elsewhere = [
        f"{section}.{path[-1]}"
        for section, field in sections
        if path[-1] in getattr(field.annotation, "model_fields", ())
    ]
    hint = f"did you mean {(close + elsewhere)[0]}? " if close or elsewhere else ""
    return f"{hint}known: {', '.join(known)}"
