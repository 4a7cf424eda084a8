# SPDX-License-Identifier: Apache-2.0
"""What a backend keeps of a quantized weight, and how it multiplies with it."""

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch.nn import Parameter

from .kernels import ops as _ops  # noqa: F401 (registers torch.ops.lowbit)
from .kernels.gpu import weights as gpu_weights
from .kernels.gpu.configs import Weight
from .kernels.gpu.limits import check_weight
from .kernels.gpu.target import DEVICE_TYPES, architecture
from .kernels.grid import IntGrid
from .kernels.linear_w4a4.cpu import pack, unpack_rows
from .kernels.linear_w4a4.generic import prepare

HALVES = (torch.bfloat16, torch.float16)
# What either backend keeps on a layer.
_TENSORS = ("weight", "weight_scale", "weight_zero", "weight_sum")


@dataclass(frozen=True)
class LinearSpec:
    """A linear as its operators take it.

    Attributes:
        n: outputs of this shard.
        k: inputs of this shard.
        weights: grid of the weight.
        activations: grid of the activations, None for a weight-only linear.
        order: of the online Hadamard, 1 for none.
        stride: of the online Hadamard.
    """

    n: int
    k: int
    weights: IntGrid
    activations: IntGrid | None = None
    order: int = 1
    stride: int = 1


class LinearKernel(Protocol):
    """One backend's way with one linear."""

    spec: LinearSpec

    def keep(
        self,
        layer: Any,
        codes: torch.Tensor,
        scale: torch.Tensor,
        zero_point: torch.Tensor | None,
    ) -> None:
        """Put the weight on the layer in the form the backend reads.

        Args:
            layer: module that gets the parameters.
            codes: int8 ``[n, k]``.
            scale: float32 ``[n, groups]``.
            zero_point: integer ``[n, groups]``, None when symmetric.
        """

    def multiply(
        self,
        layer: Any,
        x: torch.Tensor,
        input_scale: torch.Tensor | None,
        bias: torch.Tensor | None,
        out_dtype: torch.dtype,
    ) -> torch.Tensor:
        """``x [tokens, k]``, transformed and quantized, times the weight."""

    def rows(self, layer: Any, index: torch.Tensor) -> torch.Tensor:
        """float32 ``[indices, k]``: dequantized rows of a per-channel weight."""


class GenericLinear:
    """int8 codes, one byte each."""

    def __init__(self, spec: LinearSpec) -> None:
        self.spec = spec

    def keep(
        self,
        layer: Any,
        codes: torch.Tensor,
        scale: torch.Tensor,
        zero_point: torch.Tensor | None,
    ) -> None:
        _set(layer, (prepare(codes, zero_point), scale, None, None))

    def multiply(
        self,
        layer: Any,
        x: torch.Tensor,
        input_scale: torch.Tensor | None,
        bias: torch.Tensor | None,
        out_dtype: torch.dtype,
    ) -> torch.Tensor:
        spec, weight, scale = self.spec, layer.weight, layer.weight_scale
        weight_max = spec.weights.max_difference
        if spec.activations is None:
            if spec.order > 1 or input_scale is not None:
                x = torch.ops.lowbit.hadamard(x, input_scale, spec.order, spec.stride)
            return torch.ops.lowbit.linear_wna16(
                x, weight, scale, bias, weight_max, out_dtype
            )
        grid = spec.activations
        codes, x_scale, zero_point = quantized(spec, grid, x, input_scale)
        return torch.ops.lowbit.linear_w4a4(
            codes,
            x_scale,
            zero_point,
            weight,
            scale,
            bias,
            grid.max_difference,
            weight_max,
            out_dtype,
        )

    def rows(self, layer: Any, index: torch.Tensor) -> torch.Tensor:
        return layer.weight[index].float() * layer.weight_scale[index]


class CpuLinear:
    """Packed codes, as the compiled kernels read them."""

    def __init__(self, spec: LinearSpec) -> None:
        self.spec = spec

    def keep(
        self,
        layer: Any,
        codes: torch.Tensor,
        scale: torch.Tensor,
        zero_point: torch.Tensor | None,
    ) -> None:
        _set(layer, pack(codes, scale, zero_point, self.spec.weights.bits))

    def multiply(
        self,
        layer: Any,
        x: torch.Tensor,
        input_scale: torch.Tensor | None,
        bias: torch.Tensor | None,
        out_dtype: torch.dtype,
    ) -> torch.Tensor:
        spec, grid = self.spec, self.spec.activations
        return torch.ops.lowbit.linear_packed(
            x,
            input_scale,
            spec.order,
            spec.stride,
            16 if grid is None else grid.bits,
            grid is not None and grid.symmetric,
            layer.weight,
            layer.weight_scale,
            layer.weight_zero,
            layer.weight_sum,
            bias,
            spec.n,
            spec.weights.bits,
            out_dtype,
            1.0 if grid is None else grid.clip_ratio,
            None if grid is None else grid.group_size,
        )

    def rows(self, layer: Any, index: torch.Tensor) -> torch.Tensor:
        spec = self.spec
        codes = unpack_rows(layer.weight, index, spec.n, spec.k, spec.weights.bits)
        return codes.float() * layer.weight_scale[0, index].unsqueeze(-1)


class TritonLinear:
    """Packed codes, as the GPU kernels read them."""

    def __init__(self, spec: LinearSpec) -> None:
        self.spec = spec
        self.widen = spec.activations is not None

    def keep(
        self,
        layer: Any,
        codes: torch.Tensor,
        scale: torch.Tensor,
        zero_point: torch.Tensor | None,
    ) -> None:
        bits = self.spec.weights.bits
        check_memory(self.spec, codes.device, scale.shape[-1], zero_point is not None)
        _set(
            layer,
            gpu_weights.pack(codes, scale, zero_point, bits, widen=self.widen),
        )

    def multiply(
        self,
        layer: Any,
        x: torch.Tensor,
        input_scale: torch.Tensor | None,
        bias: torch.Tensor | None,
        out_dtype: torch.dtype,
    ) -> torch.Tensor:
        spec, grid = self.spec, self.spec.activations
        if grid is None:
            half = x.dtype if x.dtype in HALVES else out_dtype
            if spec.order > 1 or input_scale is not None:
                x = torch.ops.lowbit.hadamard(x, input_scale, spec.order, spec.stride)
            # The matrix units take 16 bits.
            return torch.ops.lowbit.gpu_linear_wna16(
                x.to(half),
                layer.weight,
                layer.weight_scale,
                layer.weight_zero,
                bias,
                spec.weights.bits,
                out_dtype,
            )
        codes, scale, zero_point = quantized(spec, grid, x, input_scale)
        return torch.ops.lowbit.gpu_linear_w4a4(
            codes,
            scale,
            None if grid.symmetric else zero_point,
            layer.weight,
            layer.weight_scale,
            layer.weight_zero,
            layer.weight_sum,
            bias,
            grid.bits,
            out_dtype,
        )

    def rows(self, layer: Any, index: torch.Tensor) -> torch.Tensor:
        spec = self.spec
        bits = gpu_weights.stored_bits(spec.weights.bits, self.widen)
        codes = gpu_weights.unpack(layer.weight[index], spec.k, bits, 0)
        return codes.float() * layer.weight_scale[0, index].unsqueeze(-1)


def check_memory(
    spec: LinearSpec, device: torch.device, groups: int, zeros: bool
) -> None:
    """Raise ValueError for a weight that a GPU's launch table has no tile for.

    Args:
        spec: of the linear.
        device: of the weight; only GPUs are looked at.
        groups: of each output.
        zeros: whether it has zero points.
    """
    if device.type not in DEVICE_TYPES:
        return
    grid = spec.activations
    widen = grid is not None
    bits = gpu_weights.stored_bits(spec.weights.bits, widen)
    size = gpu_weights.group_size_of(spec.k, groups)
    operator = "linear_w4a4" if widen else "linear_wna16"
    # Tokens whose only group is all of K have one scale.
    of_groups = grid is not None and grid.group_size is not None and groups > 1
    kind = Weight(bits, size, zeros, of_groups)
    check_weight(architecture(device), operator, kind)


KERNELS: dict[str, type[GenericLinear] | type[CpuLinear] | type[TritonLinear]] = {
    "generic": GenericLinear,
    "cpu": CpuLinear,
    "triton": TritonLinear,
}


def quantized(
    spec: LinearSpec, grid: IntGrid, x: torch.Tensor, input_scale: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes, scale and zero point of x, transformed."""
    return torch.ops.lowbit.hadamard_quantize(
        x,
        input_scale,
        spec.order,
        spec.stride,
        grid.bits,
        grid.symmetric,
        grid.clip_ratio,
        grid.group_size,
    )


def _set(layer: Any, tensors: tuple[torch.Tensor | None, ...]) -> None:
    for name, tensor in zip(_TENSORS, tensors, strict=True):
        if hasattr(layer, name):
            delattr(layer, name)
        parameter = None if tensor is None else Parameter(tensor, requires_grad=False)
        layer.register_parameter(name, parameter)
