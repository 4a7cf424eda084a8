# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of AutoAWQ and tools that write its ``gemm`` format, in 4 bits.

A linear ``X`` of ``[n, k]``:

* ``X.qweight`` int32 ``[k, n/8]``, fields ``u`` along the outputs, of every eight in
  the order 0 2 4 6 1 3 5 7 from the lowest bits up;
* ``X.qzeros`` int32 ``[groups, n/8]``, the zero points ``z`` packed alike;
* ``X.scales`` float ``[groups, n]``;

and ``w = scales * (u - z)``. Without ``zero_point`` every ``z`` is 8.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, Self

import torch
from pydantic import AfterValidator, model_validator

from ..checkpoint import FLOATS
from ..kernels.packing import codes_per_block
from ..load_time import QuantizedWeight
from ..lowbit_checkpoint import check_scale
from ..schema import Activations, KVCache, Scheme, Weights, validate
from .foreign import (
    HOW_IT_WAS_MADE,
    ForeignConfig,
    ForeignFormat,
    Layout,
    check_ignored,
    unpack_rows,
)

METHOD = "awq"
BITS = 4
# Where in a word each of eight neighbouring outputs lies.
_PLACES = (0, 4, 1, 5, 2, 6, 3, 7)
_OTHER_NAMES = {"w_bit": "bits", "q_group_size": "group_size", "format": "version"}


class _Config(ForeignConfig):
    # AWQ configs that transformers writes have all of GPTQ's keys.
    HARMLESS: ClassVar[tuple[str, ...]] = (*HOW_IT_WAS_MADE, "sym")
    REFUSED: ClassVar[dict[str, str]] = {
        "desc_act": "inputs in activation order are not supported",
        "lm_head": "a quantized head is not read",
        "modules_in_block_to_quantize": "every linear has to be quantized",
    }

    quant_method: Literal["awq"]
    bits: Literal[4]
    group_size: Literal[-1, 32, 64, 128, 256]
    zero_point: bool
    version: Literal["gemm"]
    modules_to_not_convert: Annotated[
        list[str] | None, AfterValidator(check_ignored)
    ] = None
    desc_act: Any = None
    lm_head: Any = None
    modules_in_block_to_quantize: Any = None

    @model_validator(mode="before")
    @classmethod
    def _names(cls, data: Any) -> Any:
        if not isinstance(data, Mapping):
            return data
        renamed = dict(data)
        for other, name in _OTHER_NAMES.items():
            if other in renamed and renamed.get(name, renamed[other]) == renamed[other]:
                renamed[name] = renamed.pop(other)
        if isinstance(renamed.get("version"), str):
            renamed["version"] = renamed["version"].lower()
        return renamed


@dataclass(frozen=True)
class Awq(ForeignFormat):
    """See the module."""

    @classmethod
    def parse(cls, data: object, source: str) -> Self:
        """As the base."""
        config = validate(_Config, data, source)
        group_size = None if config.group_size == -1 else config.group_size
        scheme = Scheme(
            weights=Weights(
                bits=config.bits, symmetric=not config.zero_point, group_size=group_size
            ),
            activations=Activations(bits=16),
            kv_cache=KVCache(bits=16),
        )
        return cls(f"{METHOD} {config.version}", scheme)

    def layouts(self, n: int, k: int) -> dict[str, Layout]:
        """As the base."""
        groups, factor = self.groups(k), codes_per_block(BITS)
        along = None if self.scheme.weights.group_size is None else 0
        return {
            "qweight": Layout(("I32",), (k, n // factor), 1, 0, 1, factor),
            "qzeros": Layout(("I32",), (groups, n // factor), 1, along, 1, factor),
            "scales": Layout(FLOATS, (groups, n), 1, along),
        }

    def convert(
        self, name: str, tensors: Mapping[str, torch.Tensor], n: int, k: int
    ) -> QuantizedWeight:
        """As the base."""
        scale = tensors["scales"].t().float().contiguous()
        check_scale(f"{name}.scales", scale)
        zero_point = self.zero_point(f"{name}.qzeros", _outputs(tensors["qzeros"], n))
        return QuantizedWeight(_outputs(tensors["qweight"], n), scale, zero_point, None)


def _outputs(words: torch.Tensor, n: int) -> torch.Tensor:
    """int8 ``[n, rows]`` of words ``[rows, n/8]``."""
    fields = unpack_rows(words, BITS, n).unflatten(-1, (-1, len(_PLACES)))
    return fields[..., list(_PLACES)].flatten(-2).t().contiguous()
