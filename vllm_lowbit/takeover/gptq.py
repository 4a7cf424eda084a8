# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of AutoGPTQ, GPTQModel and tools that write their format.

A linear ``X`` of ``[n, k]`` with ``b`` bits, ``f = 32 / b`` fields a word, the first in
the lowest bits:

* ``X.qweight`` int32 ``[k/f, n]``, fields ``u`` along the inputs;
* ``X.qzeros`` int32 ``[groups, n/f]``, fields along the outputs: the zero point ``z``
  in ``checkpoint_format`` gptq_v2, ``z - 1`` in gptq;
* ``X.scales`` float ``[groups, n]``;
* ``X.g_idx`` int32 ``[k]``, the group of each input;
* ``X.bias`` may be there, all zero, where the model has none;

and ``w = scales * (u - z)``. Symmetric ones (``sym``) have ``z = 2^(b-1)`` throughout.
In gptq the field of ``z = 0`` is all ones, and writers differ in what they then do to
the neighbouring fields (GPTQModel borrows from the next one, AutoGPTQ sets all above),
so such a word does not tell its zero points: it is refused.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self

import torch
from pydantic import field_validator, model_validator

from ..checkpoint import FLOATS, TensorSpec
from ..errors import CheckpointError
from ..kernels.packing import codes_per_block
from ..load_time import QuantizedWeight
from ..lowbit_checkpoint import check_scale
from ..schema import Activations, KVCache, Scheme, Weights, validate
from .foreign import (
    HOW_IT_WAS_MADE,
    ROLES,
    ForeignConfig,
    ForeignFormat,
    Layout,
    unpack_rows,
)

METHOD = "gptq"


class _Config(ForeignConfig):
    HARMLESS: ClassVar[tuple[str, ...]] = HOW_IT_WAS_MADE
    REFUSED: ClassVar[dict[str, str]] = {
        "adapter": "adapters would not run",
        "dynamic": "linears with settings of their own are not supported",
        "is_marlin_format": "weights repacked for Marlin are not read",
        "lm_head": "a quantized head is not read",
        "rotation": "rotated models are not supported",
    }

    quant_method: Literal["gptq"]
    bits: Literal[4, 8]
    group_size: Literal[-1, 32, 64, 128, 256]
    sym: bool
    desc_act: bool
    checkpoint_format: Literal["gptq", "gptq_v2"] | None = None
    # Another name of checkpoint_format.
    format: Literal["gptq", "gptq_v2"] | None = None
    pack_dtype: Literal["int32"] | None = None
    modules_in_block_to_quantize: list[list[str]] | list[str] | None = None
    adapter: Any = None
    dynamic: Any = None
    is_marlin_format: Any = None
    lm_head: Any = None
    rotation: Any = None

    @field_validator("modules_in_block_to_quantize")
    @classmethod
    def _all_of_them(cls, value: list[Any] | None) -> list[Any] | None:
        listed = [[part] if isinstance(part, str) else part for part in value or []]
        names = {name.rpartition(".")[2] for part in listed for name in part}
        missing = [role for role in ROLES if role not in names]
        if names and missing:
            raise ValueError(f"linears that are not quantized: {', '.join(missing)}")
        return value

    @model_validator(mode="after")
    def _one_format(self) -> Self:
        names = {self.checkpoint_format, self.format} - {None}
        if len(names) > 1:
            raise ValueError(
                f"checkpoint_format {self.checkpoint_format!r} is not format "
                f"{self.format!r}"
            )
        return self


@dataclass(frozen=True)
class Gptq(ForeignFormat):
    """See the module.

    Attributes:
        zero_offset: what is added to a stored zero point, 1 or 0.
        order: whether linears need a ``g_idx``.
    """

    zero_offset: int
    order: bool

    @classmethod
    def parse(cls, data: object, source: str) -> Self:
        """As the base."""
        config = validate(_Config, data, source)
        group_size = None if config.group_size == -1 else config.group_size
        scheme = Scheme(
            weights=Weights(
                bits=config.bits, symmetric=config.sym, group_size=group_size
            ),
            activations=Activations(bits=16),
            kv_cache=KVCache(bits=16),
        )
        version = config.checkpoint_format or config.format or "gptq"
        # With one group per channel the order of the inputs changes nothing.
        order = config.desc_act and group_size is not None
        return cls(version, scheme, int(version == "gptq"), order)

    def layouts(self, n: int, k: int) -> dict[str, Layout]:
        """As the base."""
        weights, groups = self.scheme.weights, self.groups(k)
        factor = codes_per_block(weights.bits)
        along = None if weights.group_size is None else 0
        return {
            "qweight": Layout(("I32",), (k // factor, n), 1, 0, 0, factor),
            "qzeros": Layout(("I32",), (groups, n // factor), 1, along, 1, factor),
            "scales": Layout(FLOATS, (groups, n), 1, along),
        }

    def facts(self, n: int, k: int) -> dict[str, TensorSpec]:
        """The group of each input, in order: others would need permuted inputs."""
        size = k // self.groups(k)
        meaning = f"i // {size}, as inputs in activation order (desc_act) are not run"
        groups = torch.arange(k) // size
        zeros, nothing = torch.zeros(n), "zeros: the model has no such bias"
        return {
            "g_idx": TensorSpec(("I32",), (k,), groups, meaning, not self.order),
            "bias": TensorSpec(FLOATS, (n,), zeros, nothing, optional=True),
        }

    def convert(
        self, name: str, tensors: Mapping[str, torch.Tensor], n: int, k: int
    ) -> QuantizedWeight:
        """As the base."""
        bits = self.scheme.weights.bits
        scale = tensors["scales"].t().float().contiguous()
        check_scale(f"{name}.scales", scale)
        return QuantizedWeight(
            unpack_rows(tensors["qweight"].t(), bits, k),
            scale,
            self._zero_point(f"{name}.qzeros", unpack_rows(tensors["qzeros"], bits, n)),
            None,
        )

    def _zero_point(self, name: str, stored: torch.Tensor) -> torch.Tensor | None:
        """int8 ``[n, groups]`` from ``[groups, n]``, shifted as codes are."""
        largest = int(stored.max())
        if self.zero_offset and largest == self.grid.code_max:
            field = largest + self.grid.offset
            raise CheckpointError(
                f"tensor {name} holds the field {field}, a zero point of 0 or "
                f"{field + 1}; writers of checkpoint_format gptq disagree which. "
                "Supported: gptq_v2"
            )
        return self.zero_point(name, (stored + self.zero_offset).t().contiguous())
