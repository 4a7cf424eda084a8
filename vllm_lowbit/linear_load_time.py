# SPDX-License-Identifier: Apache-2.0
"""Linear layers of a plain checkpoint, quantized while it loads."""

from typing import Any

import torch
from torch.nn import Parameter

from . import truth
from .linear import LowbitLinearMethod
from .load_time import fold_bias, quantize_linear
from .parameters import check_loaded, count_bias, create_float
from .worker_metrics import load_time


class LoadTimeLinearMethod(LowbitLinearMethod):
    """Quantizes each layer as soon as vLLM has all of its float weight."""

    uses_meta_device = True

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
        """Declare the float weight and check the shapes.

        Raises:
            UnsupportedError: when a rotation or group does not divide the shard, or
                no backend runs the scheme here.
        """
        self._prepare_layer(input_size_per_partition, output_partition_sizes)
        create_float(
            layer,
            sum(output_partition_sizes),
            input_size_per_partition,
            params_dtype,
            extra_weight_attrs,
        )
        count_bias(layer)

    @load_time
    def process_weights_after_loading(self, layer: Any) -> None:
        """Fold and quantize the loaded weight.

        Raises:
            CheckpointError: when part of the weight was never loaded, or it is not
                finite.
        """
        if getattr(layer, "_already_called_process_weights_after_loading", False):
            return
        check_loaded(layer, f"linear {self.prefix}")
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
        self.kernel.keep(layer, done.codes, done.scale, done.zero_point)
        layer.input_scale = (
            None
            if done.input_scale is None
            else Parameter(done.input_scale, requires_grad=False)
        )
        layer._already_called_process_weights_after_loading = True
        truth.linear_ready(self)
