# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of compressed-tensors (llm-compressor) with integer weights.

The source of the format is the package ``compressed_tensors`` 0.17: ``quant_config``,
``quant_args`` and ``compressors``. A linear ``X`` of ``[n, k]`` is

* ``pack-quantized``: ``X.weight_packed`` int32 ``[n, k/8]``, eight fields ``code + 8``
  a word, the first in the lowest bits; ``X.weight_zero_point`` int32 ``[n/8, groups]``,
  packed alike along the outputs; ``X.weight_shape`` int64, ``(n, k)``. (With 8 bits,
  four fields ``code + 128`` a word.)
* ``int-quantized``: ``X.weight`` int8 ``[n, k]``, ``X.weight_zero_point`` int8
  ``[n, groups]``;

both with ``X.weight_scale`` float ``[n, groups]``, zero points of asymmetric weights
only, and ``w = scale * (code - zero_point)``. Activations are quantized when they
arrive, each token on its own: of them the config only says the grid. Ours leaves the
lowest symmetric code unused (the scale is ``max / 7``), as vLLM's int8 kernels do.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, Self

import torch
from pydantic import AfterValidator, model_validator

from ..checkpoint import FLOATS, TensorSpec
from ..kernels.packing import codes_per_block
from ..load_time import QuantizedWeight
from ..lowbit_checkpoint import check_range, check_scale
from ..schema import Activations, KVCache, Scheme, StrictModel, Weights, validate
from .foreign import (
    ForeignConfig,
    ForeignFormat,
    Layout,
    check_ignored,
    unpack_rows,
)

METHOD = "compressed-tensors"


class _Arguments(ForeignConfig):
    HARMLESS: ClassVar[tuple[str, ...]] = ("observer", "observer_kwargs")
    REFUSED: ClassVar[dict[str, str]] = {
        "block_structure": "only scales per channel or per group are supported",
    }

    num_bits: Literal[4, 8]
    type: Literal["int"] = "int"
    symmetric: bool = True
    block_structure: Any = None
    zp_dtype: str | None = None


class _WeightArguments(_Arguments):
    strategy: Literal["channel", "group"] | None = None
    group_size: Literal[-1, 32, 64, 128, 256] | None = None
    dynamic: Literal[False] = False
    # Activation order of this kind only changes how the codes were found.
    actorder: Literal["weight", "static", False] | None = None
    scale_dtype: str | None = None

    @model_validator(mode="after")
    def _strategy_fits_group_size(self) -> Self:
        grouped = self.group_size is not None and self.group_size > 0
        if self.strategy is None and self.group_size is None:
            raise ValueError("neither strategy nor group_size: a scale per tensor")
        if self.strategy is not None and grouped != (self.strategy == "group"):
            raise ValueError(
                f"strategy {self.strategy!r} does not go with group_size "
                f"{self.group_size}"
            )
        return self


class _InputArguments(_Arguments):
    REFUSED: ClassVar[dict[str, str]] = {
        **_Arguments.REFUSED,
        "group_size": "activations are taken over per token, not per group",
        "actorder": "activations have no order",
        "scale_dtype": "scales of activations are not rounded to another type",
    }

    strategy: Literal["token"]
    dynamic: Literal[True]
    group_size: Any = None
    actorder: Any = None
    scale_dtype: Any = None


class _Group(ForeignConfig):
    REFUSED: ClassVar[dict[str, str]] = {
        "output_activations": "outputs of linears are not quantized",
    }

    targets: list[Literal["Linear"]]
    weights: _WeightArguments
    input_activations: _InputArguments | None = None
    output_activations: Any = None
    format: Literal["pack-quantized", "int-quantized"] | None = None


class _Sparsity(StrictModel):
    """``dense`` is how older versions wrote that there is none."""

    format: Literal["dense"]
    global_sparsity: float | None = None
    registry_requires_subclass: bool | None = None
    sparsity_structure: str | None = None
    ignore: list[str] | None = None
    targets: list[str] | None = None


class _Config(ForeignConfig):
    HARMLESS: ClassVar[tuple[str, ...]] = (
        "global_compression_ratio",
        "run_compressed",
        "version",
        # Put there by vLLM.
        "total_num_heads",
        "total_num_kv_heads",
    )
    REFUSED: ClassVar[dict[str, str]] = {
        "transform_config": "its transforms of activations would not run",
        "kv_cache_scheme": "the KV cache would be 16 bit, not as it says",
    }

    quant_method: Literal["compressed-tensors"]
    format: Literal["pack-quantized", "int-quantized"]
    quantization_status: Literal["compressed"]
    config_groups: dict[str, _Group]
    ignore: Annotated[list[str] | None, AfterValidator(check_ignored)] = None
    transform_config: Any = None
    kv_cache_scheme: Any = None
    sparsity_config: _Sparsity | dict[str, None] | None = None

    @model_validator(mode="after")
    def _one_kind_of_linear(self) -> Self:
        groups = list(self.config_groups.values())
        if not groups or any(group != groups[0] for group in groups):
            raise ValueError(
                f"config_groups {list(self.config_groups)}: there must be one, or all "
                "the same: every linear runs one scheme"
            )
        if groups[0].format not in (None, self.format):
            raise ValueError(
                f"format {self.format!r} is not config_groups' {groups[0].format!r}"
            )
        return self


@dataclass(frozen=True)
class CompressedTensors(ForeignFormat):
    """See the module.

    Attributes:
        packed: ``pack-quantized`` instead of ``int-quantized``.
    """

    packed: bool

    @classmethod
    def parse(cls, data: object, source: str) -> Self:
        """As the base."""
        config = validate(_Config, data, source)
        group = next(iter(config.config_groups.values()))
        weights, inputs = group.weights, group.input_activations
        group_size = None if weights.group_size == -1 else weights.group_size
        scheme = Scheme(
            weights=Weights(
                bits=weights.num_bits,
                symmetric=weights.symmetric,
                group_size=group_size,
            ),
            activations=Activations(bits=16)
            if inputs is None
            else Activations(bits=inputs.num_bits, symmetric=inputs.symmetric),
            kv_cache=KVCache(bits=16),
        )
        packed = config.format == "pack-quantized"
        return cls(f"{METHOD} {config.format}", scheme, packed)

    def layouts(self, n: int, k: int) -> dict[str, Layout]:
        """As the base; sizes are rounded up to whole words."""
        weights, groups = self.scheme.weights, self.groups(k)
        along = None if weights.group_size is None else 1
        codes = Layout(("I8",), (n, k), 0, 1)
        zeros = Layout(("I8",), (n, groups), 0, along)
        if self.packed:
            factor = codes_per_block(weights.bits)
            words = (n, -(-k // factor))
            codes = Layout(("I32",), words, 0, 1, 1, factor)
            words = (-(-n // factor), groups)
            zeros = Layout(("I32",), words, 0, along, 0, factor)
        found = {
            "weight_packed" if self.packed else "weight": codes,
            "weight_scale": Layout(FLOATS, (n, groups), 0, along),
        }
        return found if weights.symmetric else {**found, "weight_zero_point": zeros}

    def facts(self, n: int, k: int) -> dict[str, TensorSpec]:
        """The shape of the weight, where it is packed."""
        if not self.packed:
            return {}
        size = torch.tensor([n, k])
        meaning = f"the weight's shape, [{n}, {k}]"
        return {"weight_shape": TensorSpec(("I64",), (2,), size, meaning)}

    def convert(
        self, name: str, tensors: Mapping[str, torch.Tensor], n: int, k: int
    ) -> QuantizedWeight:
        """As the base."""
        bits = self.scheme.weights.bits
        zero_point = tensors.get("weight_zero_point")
        if self.packed:
            codes = unpack_rows(tensors["weight_packed"], bits, k)
            if zero_point is not None:
                zero_point = unpack_rows(zero_point.t(), bits, n).t().contiguous()
        else:
            codes = tensors["weight"]
            check_range(f"{name}.weight", "code", codes, self.grid)
            if zero_point is not None:
                zeros = f"{name}.weight_zero_point"
                check_range(zeros, "value", zero_point, self.grid)
        scale = tensors["weight_scale"].float()
        check_scale(f"{name}.weight_scale", scale)
        return QuantizedWeight(codes, scale, zero_point, None)
