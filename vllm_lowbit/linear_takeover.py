# SPDX-License-Identifier: Apache-2.0
"""Linear layers of a checkpoint that another tool quantized."""

from typing import Any

import torch
from torch.nn import Parameter
from vllm.model_executor.utils import set_weight_attrs

from . import truth
from .linear import LowbitLinearMethod
from .load_time import QuantizedWeight
from .schema import LowbitConfig
from .takeover.foreign import ForeignFormat, Layout
from .worker_metrics import load_time

_DTYPES = {"I32": torch.int32, "I8": torch.int8}


class TakeoverLinearMethod(LowbitLinearMethod):
    """Loads the tensors of a foreign format and converts them to our codes.

    Args:
        config: what the model runs.
        prefix: name of the layer.
        foreign: format of the checkpoint.
    """

    def __init__(
        self, config: LowbitConfig, prefix: str, foreign: ForeignFormat
    ) -> None:
        super().__init__(config, prefix)
        self.foreign = foreign
        self.grid = foreign.grid

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
        """Declare the tensors as the checkpoint names them, and check the shapes.

        Raises:
            UnsupportedError: when a group or the packing does not divide the shard,
                or no backend runs the scheme here.
        """
        self.inputs = input_size_per_partition
        self._prepare_layer(self.inputs, output_partition_sizes)
        for name, size in zip(self._part_names, output_partition_sizes, strict=True):
            self.foreign.check_packing(name, size, self.inputs)
        layouts = self.foreign.layouts(sum(output_partition_sizes), self.inputs)
        for kind, layout in layouts.items():
            parameter = _unloaded(layout)
            set_weight_attrs(parameter, extra_weight_attrs)
            layer.register_parameter(kind, parameter)

    @load_time
    def process_weights_after_loading(self, layer: Any) -> None:
        """Convert the loaded tensors.

        Raises:
            CheckpointError: naming the tensor with a value that cannot be.
        """
        if layer.bias is not None:
            self._check_finite(layer.bias.data, "bias")
        parts = self._convert(layer)
        codes = torch.cat([part.codes for part in parts])
        found = [part.zero_point for part in parts if part.zero_point is not None]
        zero_point = torch.cat(found) if found else None
        scale = torch.cat([part.scale for part in parts])
        self.kernel.keep(layer, codes, scale, zero_point)
        layer.input_scale = None
        truth.linear_ready(self, self.foreign.name)

    def _convert(self, layer: Any) -> list[QuantizedWeight]:
        """Take the foreign tensors off the layer, a part of it at a time."""
        layouts = self.foreign.layouts(sum(self.output_sizes), self.inputs)
        loaded = {kind: layer.get_parameter(kind).data for kind in layouts}
        for kind in layouts:
            delattr(layer, kind)
        start, parts = 0, []
        for name, size in zip(self._part_names, self.output_sizes, strict=True):
            tensors = {
                kind: _outputs(loaded[kind], layout, start, size)
                for kind, layout in layouts.items()
            }
            parts.append(self.foreign.convert(name, tensors, size, self.inputs))
            start += size
        return parts


def _unloaded(layout: Layout) -> Parameter:
    """A parameter with the attributes vLLM's weight loaders cut it by."""
    dtype = _DTYPES.get(layout.dtypes[0])
    if dtype is None:  # scales, which show that they were never loaded
        tensor = torch.full(layout.shape, torch.nan, dtype=torch.float32)
    else:
        tensor = torch.zeros(layout.shape, dtype=dtype)
    parameter = Parameter(tensor, requires_grad=False)
    attributes = {"output_dim": layout.output_dim, "input_dim": layout.input_dim}
    if layout.packed_dim is not None:
        attributes["packed_dim"] = layout.packed_dim
        attributes["packed_factor"] = layout.packed_factor
    set_weight_attrs(parameter, attributes)
    return parameter


def _outputs(
    tensor: torch.Tensor, layout: Layout, start: int, size: int
) -> torch.Tensor:
    """The part of a tensor that belongs to some outputs."""
    packed = layout.packed_dim == layout.output_dim
    factor = layout.packed_factor if packed else 1
    return tensor.narrow(layout.output_dim, start // factor, size // factor)
