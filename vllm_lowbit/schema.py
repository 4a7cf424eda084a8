# SPDX-License-Identifier: Apache-2.0
"""The only description of what is quantized and how; needs neither torch nor vLLM.

``LowbitConfig`` is ``quantization_config`` in a checkpoint's config.json and, filled
in at load time, the description of a plain checkpoint served with the flag alone.
"""

import re
from collections.abc import Sequence
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    model_validator,
)

from .errors import ConfigError


class StrictModel(BaseModel):
    """Unknown keys and other types than declared are refused; frozen."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


_T = TypeVar("_T", bound=StrictModel)


def _no_boolean(value: object) -> object:
    """true equals 1, and a Literal asks for no more."""
    if isinstance(value, bool):
        raise ValueError("Input should be a number")
    return value


FormatVersion = Annotated[Literal[1], BeforeValidator(_no_boolean)]
GroupSize = Literal[32, 64, 128, 256]


class Weights(StrictModel):
    """Grid of the linear weights."""

    bits: Literal[2, 3, 4, 6, 8]
    symmetric: bool = True
    group_size: GroupSize | None = None
    """Input elements that share a scale; None is one scale per output channel."""


# Of a range, what may be kept.
LEAST_CLIP_RATIO, MOST_CLIP_RATIO = 0.5, 1.0
ClipRatio = Annotated[float, Field(ge=LEAST_CLIP_RATIO, le=MOST_CLIP_RATIO)]
OfEveryLayer = Annotated[tuple[ClipRatio, ...], Field(min_length=1, strict=False)]


class ClipRatios(StrictModel):
    """Fraction of each range that is kept, a value for every layer in order.

    Linears that share an input, and so its codes, share a value: q, k and v, gate and
    up, and all experts of a layer.
    """

    attn_input: OfEveryLayer
    """Of q, k and v."""
    o_input: OfEveryLayer
    mlp_input: OfEveryLayer
    """Of gate and up."""
    down_input: OfEveryLayer


class Activations(StrictModel):
    """Grid of the linear inputs: dynamic, per token or per group of its elements.

    16 bits means unquantized.
    """

    bits: Literal[4, 6, 8, 16]
    symmetric: bool = False
    group_size: GroupSize | None = None
    """Neighbouring elements of a token, transformed, that share a range; None: all."""
    clip_ratio: ClipRatio = 1.0
    """Fraction of each range that is kept."""
    clip_ratios: ClipRatios | None = None
    """The same where every input has its own; ``clip_ratio`` is 1 then."""

    @model_validator(mode="after")
    def _clips_what_is_quantized(self) -> Self:
        if self.clip_ratio != 1 and self.clip_ratios is not None:
            raise ValueError("clip_ratio has no effect with clip_ratios, remove it")
        for name in ("clip_ratio", "clip_ratios", "group_size"):
            if self.bits == 16 and getattr(self, name) not in (None, 1):
                raise ValueError(f"{name} has no effect with bits 16, remove it")
        return self

    @property
    def per(self) -> str:
        """What has a scale of its own, for instance ``token``."""
        if self.group_size is None:
            return "token"
        return f"token and group of {self.group_size}"

    def kept(self, place: str | None = None) -> tuple[float, ...]:
        """Fractions of a range that are kept: one, or one for every layer.

        Args:
            place: ``attn_input``, ``o_input``, ``mlp_input`` or ``down_input``; None
                for all of them one after another.
        """
        if self.clip_ratios is None:
            return (self.clip_ratio,)
        every = dict(self.clip_ratios)
        names = every if place is None else (place,)
        return tuple(ratio for name in names for ratio in every[name])


def clipped(ratios: Sequence[float]) -> str:
    """What to say of a grid after its scale: nothing where all of a range is kept.

    Args:
        ratios: of :meth:`Activations.kept`.
    """
    least, most = min(ratios), max(ratios)
    if least == 1:
        return ""
    if len(ratios) == 1:
        return f", clipped to {least:g} of its range"
    return f", clipped to {least:g} to {most:g} of its range, by layer"


class KVCache(StrictModel):
    """KV cache entries: per token and head, fp16 scale and zero. 16: unquantized."""

    bits: Literal[4, 16]


class Scheme(StrictModel):
    """Bit widths of everything that is quantized."""

    weights: Weights
    activations: Activations
    kv_cache: KVCache
    vocab_bits: Literal[8, 16] = 16
    """Embedding and head: 8 is symmetric with one scale per row, 16 unquantized."""

    @model_validator(mode="after")
    def _groups_are_those_of_the_weights(self) -> Self:
        size = self.activations.group_size
        if size is not None and size != self.weights.group_size:
            raise ValueError(
                f"activations.group_size {size} with weights.group_size "
                f"{self.weights.group_size}: scales of both multiply the sum of a "
                "group, so set the same for both, or leave that of activations out"
            )
        return self

    @property
    def name(self) -> str:
        """Canonical scheme name, for instance ``w4a4kv4`` or ``w4a16-g128``.

        ``-gN`` is the group size of weights, ``-agN`` that of activations.
        """
        name = f"w{self.weights.bits}a{self.activations.bits}"
        if self.kv_cache.bits != 16:
            name += f"kv{self.kv_cache.bits}"
        if self.weights.group_size is not None:
            name += f"-g{self.weights.group_size}"
        if self.activations.group_size is not None:
            name += f"-ag{self.activations.group_size}"
        return name

    def with_clip_ratios(self, ratios: ClipRatios) -> Self:
        """This scheme where every input of every layer has its own clip ratio."""
        activations = Activations(
            bits=self.activations.bits,
            symmetric=self.activations.symmetric,
            group_size=self.activations.group_size,
            clip_ratios=ratios,
        )
        return self.model_copy(update={"activations": activations})


class Rotation(StrictModel):
    """An orthogonal transform of one activation.

    ``folded`` ones are part of the weights on both sides; ``online`` ones run in the
    server on the input named by the field, their inverse being folded. A block of
    ``block`` neighbouring elements is transformed by a Hadamard matrix of ``order``,
    across elements ``block / order`` apart.
    """

    apply: Literal["folded", "online"]
    kind: Literal["hadamard", "orthogonal"] = "hadamard"
    order: int = Field(ge=2, le=1 << 20)
    block: int = Field(ge=2, le=1 << 20)
    sign_seed: int | None = Field(default=None, ge=0, le=(1 << 63) - 1)
    """Elements are multiplied by ``hadamard.signs.random_signs`` of it first."""
    scaled: bool = False
    """An ``input_scale`` of powers of two is multiplied in before an online one."""

    @property
    def stride(self) -> int:
        """Distance between neighbours of one transform."""
        return self.block // self.order

    @model_validator(mode="after")
    def _divides(self) -> Self:
        if self.block % self.order:
            raise ValueError(f"order {self.order} does not divide block {self.block}")
        return self


class Rotations(StrictModel):
    """Every transform of the model; a field that is None has none."""

    residual: Rotation | None = None
    """Of the whole residual stream. ``online`` where embedding and head share one
    matrix: it is applied after the look-up and undone before the head. Of a model with
    LayerNorms it is followed by the rotation in one plane that takes the image of the
    vector of ones back to it, and always folded."""
    attn_input: Rotation | None = None
    """On the shared input of q, k and v."""
    k: Rotation | None = None
    """On keys after RoPE; queries get the same one."""
    v: Rotation | None = None
    """On values, per head; the inverse is folded into o_proj."""
    o_input: Rotation | None = None
    mlp_input: Rotation | None = None
    """On the shared input of gate and up."""
    down_input: Rotation | None = None
    max_tensor_parallel_size: int = Field(default=1, ge=1, le=1024)
    """Any tensor parallel size that divides this serves the same function."""


class Provenance(StrictModel):
    """Where a calibrated checkpoint came from."""

    base_model: str
    base_revision: str | None = None
    recipe: str
    recipe_sha256: str = Field(pattern=r"^[0-9a-f]{64}$")


class LowbitConfig(StrictModel):
    """``quantization_config`` of a lowbit checkpoint."""

    quant_method: Literal["lowbit"] = "lowbit"
    format_version: FormatVersion = 1
    scheme: Scheme
    rotations: Rotations
    provenance: Provenance | None = None

    @classmethod
    def parse(cls, data: object, source: str) -> Self:
        """Validate a mapping.

        Args:
            data: parsed JSON.
            source: file or option named in errors.

        Raises:
            ConfigError: naming every offending key, its value and what is allowed.
        """
        return validate(cls, data, source)


class TensorEntry(StrictModel):
    """One tensor of a checkpoint."""

    file: str = Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.-]*\.safetensors$")
    dtype: Literal["F32", "F16", "BF16", "I32", "I64", "I8", "U8"]
    shape: tuple[int, ...] = Field(max_length=8, strict=False)
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")

    @model_validator(mode="after")
    def _sizes(self) -> Self:
        if any(size < 0 or size > 1 << 40 for size in self.shape):
            raise ValueError(f"impossible shape {list(self.shape)}")
        return self


class Manifest(StrictModel):
    """Every tensor of a checkpoint: the file lowbit_manifest.json beside it."""

    format_version: FormatVersion = 1
    tensors: dict[str, TensorEntry]
    config: dict[str, Any]
    """config.json as it was written, all of it. Most of its keys change what the model
    computes (a rotation's sign seed, rope_theta, rms_norm_eps, the end token) without
    changing the shape of any tensor, and no list of those that do not is ever
    complete. A copy instead of a hash, so that an error can name the key. To serve with
    another value on purpose, ``--hf-overrides`` changes what was read, not the file."""

    @classmethod
    def parse(cls, data: object, source: str) -> Self:
        """As :meth:`LowbitConfig.parse`."""
        return validate(cls, data, source)


class LoadTimeOptions(StrictModel):
    """What a user may choose for a plain checkpoint."""

    scheme: str = "w4a4kv4"
    activations_symmetric: bool = False
    vocab_bits: Literal[8, 16] = 16

    @classmethod
    def parse(cls, data: object, source: str) -> Self:
        """As :meth:`LowbitConfig.parse`."""
        return validate(cls, data, source)


# Name -> (weight bits, activation bits, KV bits). A suffix -gN sets the group size of
# weights, one more, -agN, that of activations.
_SCHEMES: dict[str, tuple[int, int, int]] = {
    "w4a4kv4": (4, 4, 4),
    "w4a4": (4, 4, 16),
    "w4a8kv4": (4, 8, 4),
    "w4a16": (4, 16, 16),
    "w4a16kv4": (4, 16, 4),
    "w3a16": (3, 16, 16),
    "w2a16": (2, 16, 16),
    "w6a6": (6, 6, 16),
    "w8a8": (8, 8, 16),
}
SCHEME_NAMES = tuple(_SCHEMES)
DEFAULT_SCHEME = "w4a4kv4"


def scheme_from_name(
    name: str,
    activations_symmetric: bool = False,
    vocab_bits: int = 16,
    clip_ratio: float = 1.0,
) -> Scheme:
    """The scheme a name such as ``w4a4kv4`` or ``w3a16-g128`` stands for.

    Args:
        name: weights, activations and cache, with an optional group size of weights,
            and of activations too, as in ``w4a4kv4-g128-ag128``.
        activations_symmetric: symmetric instead of asymmetric activation codes.
        vocab_bits: 8 or 16, of embedding and head.
        clip_ratio: fraction of an activation's range that is kept; where activations
            are not quantized it has no effect.

    Raises:
        ConfigError: for an unknown name or group size.
    """
    size = "[1-9][0-9]{0,3}"
    match = re.fullmatch(rf"([a-z0-9]+)(?:-g({size}))?(?:-ag({size}))?", name)
    if match is None or match[1] not in _SCHEMES:
        raise ConfigError(
            f"scheme {shorten(name)} does not exist; supported: "
            f"{', '.join(SCHEME_NAMES)}, "
            "each with an optional group size such as w4a16-g128, of activations too "
            "in w4a4kv4-g128-ag128"
        )
    weight_bits, activation_bits, kv_bits = _SCHEMES[match[1]]
    of_weights, of_activations = (int(s) if s else None for s in match.groups()[1:])
    return validate(
        Scheme,
        {
            "weights": {
                "bits": weight_bits,
                # Of 4 or 8 levels, symmetric codes would leave one unused.
                "symmetric": weight_bits > 3,
                "group_size": of_weights,
            },
            "activations": {
                "bits": activation_bits,
                "symmetric": activations_symmetric,
                "group_size": of_activations,
                "clip_ratio": 1.0 if activation_bits == 16 else clip_ratio,
            },
            "kv_cache": {"bits": kv_bits},
            "vocab_bits": vocab_bits,
        },
        f"scheme {name!r}",
    )


def validate(model: type[_T], data: object, source: str) -> _T:
    """``data`` as a model.

    Raises:
        ConfigError: naming ``source`` and every offending key, its value and what is
            allowed.
    """
    try:
        return model.model_validate(data)
    except ValidationError as error:
        problems = "; ".join(
            f"key {dotted(e['loc'])}: {e['msg']}"
            + ("" if e["type"] == "missing" else f", got {shorten(e['input'])}")
            for e in error.errors()[:8]
        )
        raise ConfigError(f"{source}: {problems}") from None


def dotted(keys: tuple[int | str, ...]) -> str:
    """A path of keys for a message; what is no plain word is quoted."""
    names = (
        key if isinstance(key, str) and re.fullmatch(r"\w{1,40}", key) else shorten(key)
        for key in keys
    )
    return ".".join(names) or "(top level)"


def shorten(value: object) -> str:
    """``repr`` of a value for a message: at most 60 characters."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
