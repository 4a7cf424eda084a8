# SPDX-License-Identifier: Apache-2.0
"""How compressed-tensors checkpoints hold what lowbit ones do: codes stay the same.

Stock vLLM keeps scales of packed weights in the dtype of the model, whatever a file
has; they are rounded to it here, so that the file is what runs.
"""

from dataclasses import dataclass
from typing import Any

import torch

from ..checkpoint import TensorSpec
from ..kernels.packing import packed_columns
from ..lowbit_checkpoint import PackedWeight
from ..schema import Scheme
from .writer import DTYPES

Tensors = dict[str, torch.Tensor]
TORCH_DTYPES = {name: dtype for dtype, name in DTYPES.items()}


@dataclass(frozen=True)
class PackQuantized:
    """Weight-only int4, symmetric; its words are laid out as ours.

    Attributes:
        group_size: inputs that share a scale, None for one per output channel.
        scale_dtype: of the model, as safetensors names it.
        name: of the format.
    """

    group_size: int | None
    scale_dtype: str
    name: str = "pack-quantized"

    def specs(self, n: int, k: int) -> dict[str, TensorSpec]:
        """The tensors of a matrix ``[n, k]``; their names lack the module's."""
        groups = 1 if self.group_size is None else k // self.group_size
        return {
            "weight_packed": TensorSpec(("I32",), (n, packed_columns(k, 4))),
            "weight_scale": TensorSpec((self.scale_dtype,), (n, groups)),
            "weight_shape": TensorSpec(("I64",), (2,)),
        }

    def tensors(self, weight: PackedWeight, codes: torch.Tensor) -> Tensors:
        """Those of a weight and its int8 codes ``[n, k]``."""
        return {
            "weight_packed": weight.packed,
            "weight_scale": weight.scale.to(TORCH_DTYPES[self.scale_dtype]),
            "weight_shape": torch.tensor(codes.shape),
        }


@dataclass(frozen=True)
class IntQuantized:
    """int8 with dynamic int8 activations; attributes as of :class:`PackQuantized`."""

    name: str = "int-quantized"
    scale_dtype: str = "F32"

    def specs(self, n: int, k: int) -> dict[str, TensorSpec]:
        """As :meth:`PackQuantized.specs`."""
        return {
            "weight": TensorSpec(("I8",), (n, k)),
            "weight_scale": TensorSpec((self.scale_dtype,), (n, 1)),
        }

    def tensors(self, weight: PackedWeight, codes: torch.Tensor) -> Tensors:
        """As :meth:`PackQuantized.tensors`."""
        return {"weight": codes, "weight_scale": weight.scale}


Layout = PackQuantized | IntQuantized


def layout_of(scheme: Scheme, model_dtype: str) -> Layout:
    """That of a scheme that can be exported.

    Args:
        scheme: of the linears.
        model_dtype: of norms and vocabulary, as safetensors names it.
    """
    if scheme.activations.bits == 8:
        return IntQuantized()
    return PackQuantized(scheme.weights.group_size, model_dtype)


def quantization_config(scheme: Scheme, format: str) -> dict[str, Any]:
    """What config.json says of a scheme, through compressed-tensors' own classes.

    Args:
        scheme: of the linears; the head is not quantized.
        format: name of their layout.
    """
    from compressed_tensors.quantization import (
        QuantizationArgs,
        QuantizationConfig,
        QuantizationScheme,
    )

    weights, activations = scheme.weights, scheme.activations
    inputs = None
    if activations.bits != 16:
        inputs = QuantizationArgs(
            num_bits=activations.bits,
            symmetric=activations.symmetric,
            strategy="token",
            dynamic=True,
        )
    linears = QuantizationScheme(
        targets=["Linear"],
        weights=QuantizationArgs(
            num_bits=weights.bits,
            strategy="channel" if weights.group_size is None else "group",
            group_size=weights.group_size,
        ),
        input_activations=inputs,
    )
    config = QuantizationConfig(
        config_groups={"group_0": linears},
        format=format,
        quantization_status="compressed",
        ignore=["lm_head"],
    )
    return config.model_dump(mode="json", exclude_none=True)
