# SPDX-License-Identifier: Apache-2.0
"""The sections of a recipe, each with what it refuses by itself."""

from typing import Annotated, Any, Literal

from pydantic import Field, ValidationInfo, field_validator

from ..schema import ClipRatio, StrictModel

_GPTQ_ONLY = ("damping", "block_size", "act_order")
GPTQ_METHODS = ("gptq", "gptaq")
MODEL_ONLY = ("samples", "top_k")

Transform = Literal["hadamard", "none"]
Rotation = Literal["hadamard", "learned", "none"]
Clip = Literal["fixed", "searched", "learned"]


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

    @field_validator("scales")
    @classmethod
    def _are_not_set_otherwise(cls, value: Any, info: ValidationInfo) -> Any:
        if value == "learned" and info.data.get("smooth") is not None:
            raise ValueError("smooth sets the scales that are learned, remove one")
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
    clip_lr: Annotated[float, Field(gt=0, le=1)] = 0.002
    """The same of the inputs' clip ratios, where ``activations.clip`` is learned."""
    steps: Annotated[int, Field(ge=1, le=1 << 20)] | None = None
    """null: by the size of the model."""
    tokens_per_step: Annotated[int, Field(ge=2, le=1 << 24)] | None = None
    """Rounded to windows; null: by the size of the model."""
    quantize_weights: bool = False
    """Whether weights are rounded to nearest meanwhile, or in float."""
    extra_weight_bits: Annotated[int, Field(ge=0, le=4)] = 0
    """Beyond the scheme's, 8 in all at most. Rounding to nearest stands for GPTQ here,
    which will leave less error: 0.4 to 0.8 of it in the linears of ref-7m (output_error
    of quarot-gptq over that of quarot, w4a16). One more bit leaves half."""

    @field_validator("top_k", "renormalise")
    @classmethod
    def _is_used(cls, value: Any, info: ValidationInfo) -> Any:
        if info.data.get("loss") != "kl_top":
            raise ValueError("has an effect with loss kl_top only, remove it")
        return value

    @field_validator("extra_weight_bits")
    @classmethod
    def _needs_rounding(cls, value: Any, info: ValidationInfo) -> Any:
        if value and not info.data.get("quantize_weights"):
            raise ValueError("has an effect with quantize_weights true only, remove it")
        return value

    def mapping(self, transforms: Transforms, clips: bool) -> dict[str, Any]:
        """Every key that has an effect; arguments as of :meth:`without_effect`."""
        data = self.model_dump()
        unused: set[str] = set()
        if self.loss != "kl_top":
            unused |= {"top_k", "renormalise"}
        if not self.extra_weight_bits:
            unused.add("extra_weight_bits")
        return {
            key: value
            for key, value in data.items()
            if key not in unused | self.without_effect(transforms, clips)
        }

    @staticmethod
    def without_effect(transforms: Transforms, clips: bool) -> set[str]:
        """Keys that mean nothing with these transforms.

        Args:
            transforms: of the recipe.
            clips: whether clip ratios are learned as well.
        """
        keys: set[str] = set()
        if not transforms.rotations_are_learned:
            keys |= {"start", "optimizer", "rotation_lr"}
        if not transforms.scales_are_learned:
            keys.add("scale_lr")
        if not clips:
            keys.add("clip_lr")
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
        used = GPTQ_METHODS if info.field_name in _GPTQ_ONLY else GPTQ_METHODS[1:]
        method = info.data.get("method", used[0])
        if method not in used:
            raise ValueError(
                f"has no effect with method {method}, remove it or use {used[0]}"
            )
        return value


Rate = Annotated[float, Field(gt=0, le=1)]
Batch = Annotated[int, Field(ge=1, le=1 << 12)]


class OmniQuant(StrictModel):
    """Settings of method omniquant; None: by the scheme."""

    let: bool | None = None
    """Learn scales beside clipping; None: where activations are quantized."""
    alpha: Annotated[float, Field(ge=0, le=1)] | None = None
    """SmoothQuant's, of the scales that learning starts from; None: 0.5, or for weights
    alone 0.25, as inputs that keep their sizes need not be made even."""
    aug: bool | None = None
    """Also follow the float block on quantized inputs; None: for 2-bit weights."""
    epochs: Annotated[int, Field(ge=1, le=1000)] | None = None
    """None: 40 for 2-bit weights, else 20."""
    rounding: Literal["rtn", "gptq", "gptaq"] = "rtn"
    """To the learned ranges, at the end; rtn as published."""
    extra_weight_bits: Annotated[int, Field(ge=0, le=4)] | None = None
    """Beyond the scheme's while learning, 8 in all at most: scales are then for what
    GPTQ leaves. The learned ranges are those of the finer grid; weights are rounded to
    ranges that are searched for, as with the other methods. None: 1 for weights alone
    whose scales are learned, with rounding gptq or gptaq; else 0."""
    batch: Batch = 4
    """Windows of a step."""
    clip_rate: Rate = 1e-2
    """Learning rate of clipping."""
    scale_rate: Rate = 5e-3
    """Learning rate of scales."""
    input_clip_rate: Rate = 1e-3
    """Learning rate of the inputs' clip ratios, where ``activations.clip`` is learned.
    """

    @field_validator("extra_weight_bits")
    @classmethod
    def _is_for_gptq(cls, value: Any, info: ValidationInfo) -> Any:
        if value and info.data.get("rounding") not in GPTQ_METHODS:
            raise ValueError("is for rounding gptq or gptaq, remove it or choose one")
        return value


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
        if scope == "layer" and info.field_name in MODEL_ONLY:
            raise ValueError("has no effect with scope layer, remove it or use model")
        return value


class ActivationGrid(StrictModel):
    """Grid of the linear inputs; their bits and groups are the scheme's."""

    symmetric: bool = False
    clip: Clip = "fixed"
    """Whether every input of every layer gets a ratio of its own: for least squared
    error of its linears' outputs, or learned with the transforms, by method omniquant
    block by block (see clips.py)."""
    clip_ratio: ClipRatio = 1.0
    """Fraction of each range that is kept; where they are learned, what they start
    from; where they are searched for, what is kept until then."""


class Data(StrictModel):
    """How much text calibration reads."""

    samples: Annotated[int, Field(ge=1, le=1 << 16)] = 128
    """Windows."""
    seq_len: Annotated[int, Field(ge=2, le=1 << 17)] = 512
    """Tokens of a window."""
