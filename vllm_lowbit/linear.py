# SPDX-License-Identifier: Apache-2.0
"""Linear layers: quantized while loading, run on integer codes."""

from typing import Any

import torch
from torch.nn import Parameter
from vllm.model_executor.layers.linear import LinearMethodBase
from vllm.model_executor.model_loader.reload.layerwise import (
    get_layerwise_info,
    initialize_online_processing,
)
from vllm.model_executor.utils import set_weight_attrs

from . import truth
from .errors import CheckpointError, UnsupportedError
from .kernels import dispatch
from .kernels import ops as _ops  # noqa: F401 (registers torch.ops.lowbit)
from .kernels.grid import IntGrid
from .kernels.linear_w4a4.generic import prepare
from .load_time import (
    FUSED,
    check_finite,
    fold_bias,
    quantize_linear,
    rotations_of,
)
from .schema import LowbitConfig, Rotation


class LowbitLinearMethod(LinearMethodBase):
    """One linear, fused or not, of a plain checkpoint.

    Weights arrive on the meta device and are quantized layer by layer as soon as
    vLLM has buffered all of a layer, so the float model never exists as a whole.

    Attributes on the layer afterwards: ``weight`` int8 codes ``[n, k]``,
    ``weight_scale`` float32 ``[n, groups]``, ``input_scale`` float32 ``[k]`` or None.
    """

    uses_meta_device = True

    def __init__(self, config: LowbitConfig, prefix: str) -> None:
        self.scheme = config.scheme
        self.prefix = prefix
        self.role = prefix.rpartition(".")[2]
        if self.role not in FUSED:
            raise UnsupportedError(
                f"linear {prefix} is not known to lowbit; supported: "
                + ", ".join(FUSED)
            )
        self.parts = [rotations_of(config.rotations, part) for part in FUSED[self.role]]
        self.input_rotation: Rotation | None = self.parts[0].online_input
        self.grid = IntGrid(self.scheme.weights.bits, self.scheme.weights.symmetric)
        bits = self.scheme.activations.bits
        self.weight_only = bits == 16
        self.activation_grid = None
        if not self.weight_only:
            self.activation_grid = IntGrid(bits, self.scheme.activations.symmetric)

    def create_weights(
        self,
        layer: Any,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: object,
    ) -> None:
        """Declare the float weight on the meta device and check the shapes.

        Raises:
            UnsupportedError: when a rotation or group does not divide the shard, or
                no backend runs the scheme here.
        """
        self._check_shard(input_size_per_partition)
        self.backend = self._select_backend()
        self.output_sizes = output_partition_sizes
        weight = Parameter(
            torch.empty(
                sum(output_partition_sizes),
                input_size_per_partition,
                dtype=params_dtype,
                device="meta",
            ),
            requires_grad=False,
        )
        set_weight_attrs(weight, {"input_dim": 1, "output_dim": 0})
        set_weight_attrs(weight, extra_weight_attrs)
        layer.register_parameter("weight", weight)
        initialize_online_processing(layer)

    def _check_shard(self, size: int) -> None:
        rotation = self.input_rotation
        if rotation is not None and size % rotation.block:
            raise UnsupportedError(
                f"linear {self.prefix}: a shard of {size} inputs is not a multiple of "
                f"the rotation block {rotation.block}"
            )
        group_size = self.scheme.weights.group_size
        if group_size is not None and size % group_size:
            raise UnsupportedError(
                f"linear {self.prefix}: a shard of {size} inputs is not a multiple of "
                f"group_size {group_size}"
            )

    def _select_backend(self) -> str:
        operator = "linear_wna16" if self.weight_only else "linear_w4a4"
        case = {
            "weight_bits": self.scheme.weights.bits,
            "activation_bits": self.scheme.activations.bits,
        }
        try:
            device = torch.get_default_device().type
            return dispatch.select(operator, device, **case).backend
        except ValueError as error:
            raise UnsupportedError(f"linear {self.prefix}: {error}") from None

    def process_weights_after_loading(self, layer: Any) -> None:
        """Fold and quantize the loaded weight.

        Raises:
            CheckpointError: when part of the weight was never loaded, or it is not
                finite.
        """
        if getattr(layer, "_already_called_process_weights_after_loading", False):
            return
        self._check_loaded(layer)
        weight = layer.weight.data
        self._check_finite(weight, "weight")
        if layer.bias is not None:
            self._check_finite(layer.bias.data, "bias")
            layer.bias.data.copy_(
                fold_bias(layer.bias.data, self.output_sizes, self.parts)
            )
        done = quantize_linear(
            weight, self.output_sizes, self.parts, self.scheme.weights
        )
        codes = prepare(done.codes, done.zero_point)
        layer.weight = Parameter(codes, requires_grad=False)
        layer.weight_scale = Parameter(done.scale, requires_grad=False)
        layer.input_scale = (
            None
            if done.input_scale is None
            else Parameter(done.input_scale, requires_grad=False)
        )
        layer._already_called_process_weights_after_loading = True
        truth.linear_ready(self)

    def _check_loaded(self, layer: Any) -> None:
        info = get_layerwise_info(layer)
        if info.load_numel_total is None:
            return
        if info.load_numel < info.load_numel_total:
            raise CheckpointError(
                f"linear {self.prefix}: only {info.load_numel} of "
                f"{info.load_numel_total} elements are in the checkpoint"
            )

    def _check_finite(self, tensor: torch.Tensor, kind: str) -> None:
        block = self.prefix.rpartition(".")[0]
        names = [f"{block}.{part}.{kind}" for part in FUSED[self.role]]
        for name, rows in zip(names, tensor.split(self.output_sizes), strict=True):
            check_finite(rows, name)

    def apply(
        self,
        layer: Any,
        x: torch.Tensor,
        bias: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """``x [..., k]`` to ``[..., n]`` in the dtype of x."""
        rotation = self.input_rotation
        order = 1 if rotation is None else rotation.order
        stride = 1 if rotation is None else rotation.stride
        rows = x.reshape(-1, x.shape[-1])
        weight_max = self.grid.max_difference
        if self.activation_grid is None:
            rotated = torch.ops.lowbit.hadamard(rows, layer.input_scale, order, stride)
            out = torch.ops.lowbit.linear_wna16(
                rotated, layer.weight, layer.weight_scale, bias, weight_max, x.dtype
            )
        else:
            grid = self.activation_grid
            codes, scale, zero_point = torch.ops.lowbit.hadamard_quantize(
                rows, layer.input_scale, order, stride, grid.bits, grid.symmetric
            )
            out = torch.ops.lowbit.linear_w4a4(
                codes,
                scale,
                zero_point,
                layer.weight,
                layer.weight_scale,
                bias,
                grid.max_difference,
                weight_max,
                x.dtype,
            )
        return out.view(*x.shape[:-1], -1)
