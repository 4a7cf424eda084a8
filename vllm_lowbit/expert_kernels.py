# SPDX-License-Identifier: Apache-2.0
"""What a backend keeps of the linears of all experts, and how it multiplies."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch.nn import Parameter

from .kernels import ops as _ops  # noqa: F401 (registers torch.ops.lowbit)
from .kernels.gpu import weights as gpu_weights
from .kernels.linear_experts.routing import Routing
from .kernels.linear_w4a4.cpu import PackedWeight, pack
from .kernels.linear_w4a4.generic import prepare
from .linear_kernels import LinearSpec, check_memory, quantized

# What a packed weight of any backend is kept as.
_PACKED = ("weight", "weight_scale", "weight_zero", "weight_sum")


class ExpertsKernel(ABC):
    """One backend's way with one linear of every expert.

    Args:
        spec: of one expert's linear.
        name: of the linear, before the names of its parameters.
    """

    def __init__(self, spec: LinearSpec, name: str) -> None:
        self.spec, self.name = spec, name

    @abstractmethod
    def keep(
        self,
        layer: Any,
        codes: torch.Tensor,
        scale: torch.Tensor,
        zero_point: torch.Tensor | None,
    ) -> None:
        """Put the weights on the layer in the form the backend reads.

        Args:
            layer: module that gets the parameters.
            codes: int8 ``[experts, n, k]``.
            scale: float32 ``[experts, n, groups]``.
            zero_point: integer ``[experts, n, groups]``, None when symmetric.
        """

    @abstractmethod
    def multiply(
        self,
        layer: Any,
        x: torch.Tensor,
        rows: torch.Tensor,
        routing: Routing,
        input_scale: torch.Tensor | None,
    ) -> torch.Tensor:
        """``[pairs, n]`` of ``x [tokens, k]``, transformed and quantized.

        Args:
            layer: of :meth:`keep`.
            x: the tokens, in the dtype of the result.
            rows: int64 ``[pairs]``, the token of each pair.
            routing: of the pairs.
            input_scale: float32 ``[k]`` or ``[experts, k]``, or None.
        """

    def _kept(self, layer: Any, *kinds: str) -> list[torch.Tensor | None]:
        """Parameters of :meth:`keep`, None for one that there is not."""
        return [getattr(layer, f"{self.name}_{kind}", None) for kind in kinds]

    def _of_inputs(self) -> tuple[int, int, int, bool]:
        """Order and stride of their transform, bits and symmetry of their grid."""
        spec, grid = self.spec, self.spec.activations
        if grid is None:
            return spec.order, spec.stride, 16, False
        return spec.order, spec.stride, grid.bits, grid.symmetric

    def _of_ranges(self) -> tuple[float, int | None]:
        """Clip ratio and group size of the grid."""
        grid = self.spec.activations
        return (1.0, None) if grid is None else (grid.clip_ratio, grid.group_size)


class GenericExperts(ExpertsKernel):
    """int8 codes, one byte each."""

    def keep(
        self,
        layer: Any,
        codes: torch.Tensor,
        scale: torch.Tensor,
        zero_point: torch.Tensor | None,
    ) -> None:
        zero = None if zero_point is None else zero_point.flatten(0, 1)
        weight = prepare(codes.flatten(0, 1), zero).view(codes.shape)
        _set(layer, self.name, {"weight": weight, "weight_scale": scale})

    def multiply(
        self,
        layer: Any,
        x: torch.Tensor,
        rows: torch.Tensor,
        routing: Routing,
        input_scale: torch.Tensor | None,
    ) -> torch.Tensor:
        return torch.ops.lowbit.linear_experts_generic(
            x,
            rows,
            routing.offsets,
            input_scale,
            *self._of_inputs(),
            *self._kept(layer, "weight", "weight_scale"),
            self.spec.weights.max_difference,
            x.dtype,
            *self._of_ranges(),
        )


class CpuExperts(ExpertsKernel):
    """Packed codes, as the compiled kernels read them."""

    def keep(
        self,
        layer: Any,
        codes: torch.Tensor,
        scale: torch.Tensor,
        zero_point: torch.Tensor | None,
    ) -> None:
        def packed(expert: int) -> PackedWeight:
            zero = None if zero_point is None else zero_point[expert]
            return pack(codes[expert], scale[expert], zero, self.spec.weights.bits)

        _set(layer, self.name, _stacked(packed, len(codes)))

    def multiply(
        self,
        layer: Any,
        x: torch.Tensor,
        rows: torch.Tensor,
        routing: Routing,
        input_scale: torch.Tensor | None,
    ) -> torch.Tensor:
        return torch.ops.lowbit.linear_experts_packed(
            x,
            rows,
            routing.offsets,
            input_scale,
            *self._of_inputs(),
            *self._kept(layer, *_PACKED),
            self.spec.n,
            self.spec.weights.bits,
            x.dtype,
            *self._of_ranges(),
        )


class TritonExperts(ExpertsKernel):
    """Packed codes, as the GPU kernels read them."""

    def keep(
        self,
        layer: Any,
        codes: torch.Tensor,
        scale: torch.Tensor,
        zero_point: torch.Tensor | None,
    ) -> None:
        zeros = zero_point is not None
        check_memory(self.spec, codes.device, scale.shape[-1], zeros)

        def packed(expert: int) -> gpu_weights.GpuWeight:
            zero = None if zero_point is None else zero_point[expert]
            return gpu_weights.pack(
                codes[expert],
                scale[expert],
                zero,
                self.spec.weights.bits,
                widen=self.spec.activations is not None,
            )

        _set(layer, self.name, _stacked(packed, len(codes)))

    def multiply(
        self,
        layer: Any,
        x: torch.Tensor,
        rows: torch.Tensor,
        routing: Routing,
        input_scale: torch.Tensor | None,
    ) -> torch.Tensor:
        spec, grid, dtype = self.spec, self.spec.activations, x.dtype
        if input_scale is not None and input_scale.dim() == 2:
            # Each pair on its own, as no two experts read the same input.
            pairs = torch.arange(rows.shape[0], device=x.device)
            experts = torch.searchsorted(routing.offsets[1:], pairs, right=True)
            x = x[rows].float() * input_scale[experts]
            rows, input_scale = pairs, None
        weight, scale, zero, total = self._kept(layer, *_PACKED)
        if grid is None:
            if spec.order > 1 or input_scale is not None:
                x = torch.ops.lowbit.hadamard(x, input_scale, spec.order, spec.stride)
            return torch.ops.lowbit.gpu_linear_experts_wna16(
                x.to(dtype),
                rows,
                routing.offsets,
                weight,
                scale,
                zero,
                spec.weights.bits,
                dtype,
            )
        codes, x_scale, zero_point = quantized(spec, grid, x, input_scale)
        return torch.ops.lowbit.gpu_linear_experts_w4a4(
            codes,
            x_scale,
            None if grid.symmetric else zero_point,
            rows,
            routing.offsets,
            weight,
            scale,
            zero,
            total,
            grid.bits,
            dtype,
        )


EXPERT_KERNELS: dict[str, type[ExpertsKernel]] = {
    "generic": GenericExperts,
    "cpu": CpuExperts,
    "triton": TritonExperts,
}


def _stacked(
    packed: Callable[[int], PackedWeight | gpu_weights.GpuWeight], experts: int
) -> dict[str, torch.Tensor]:
    """The tensors of all experts' packed weights, by the names of the parameters."""
    kept: dict[str, torch.Tensor] = {}
    for expert in range(experts):
        for field, tensor in packed(expert)._asdict().items():
            if tensor is None:
                continue
            name = "weight" if field == "weight" else f"weight_{field}"
            if name not in kept:
                kept[name] = tensor.new_empty(experts, *tensor.shape)
            kept[name][expert] = tensor
    return kept


def _set(layer: Any, name: str, tensors: dict[str, torch.Tensor]) -> None:
    for kind, tensor in tensors.items():
        if hasattr(layer, f"{name}_{kind}"):
            delattr(layer, f"{name}_{kind}")
        parameter = Parameter(tensor, requires_grad=False)
        layer.register_parameter(f"{name}_{kind}", parameter)
