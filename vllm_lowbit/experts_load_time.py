# SPDX-License-Identifier: Apache-2.0
"""Experts of a plain checkpoint, quantized while it loads."""

from typing import Any

import torch
from torch.nn import Parameter

from . import truth
from .experts import W2, W13, LowbitExpertsMethod
from .load_time import check_finite, quantize_experts
from .parameters import check_loaded, create_float_experts
from .worker_metrics import load_time


class LoadTimeExpertsMethod(LowbitExpertsMethod):
    """Quantizes the experts of a layer as soon as vLLM has all of their weights."""

    uses_meta_device = True

    def create_weights(
        self,
        layer: Any,
        num_experts: int,
        hidden_size: int,
        intermediate_size_per_partition: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: object,
    ) -> None:
        """Declare the float weights and check the shapes.

        Raises:
            UnsupportedError: when a rotation or group does not divide the shard, or
                no backend runs the scheme here.
        """
        hidden, intermediate = hidden_size, intermediate_size_per_partition
        self._prepare_layer(num_experts, hidden, intermediate)
        shapes = {
            f"{W13}_weight": (num_experts, 2 * intermediate, hidden),
            f"{W2}_weight": (num_experts, hidden, intermediate),
        }
        create_float_experts(layer, shapes, params_dtype, extra_weight_attrs)

    @load_time
    def process_weights_after_loading(self, layer: Any) -> None:
        """Fold and quantize the loaded weights.

        Raises:
            CheckpointError: when part of a weight was never loaded, or is not finite.
        """
        if getattr(layer, "_already_called_process_weights_after_loading", False):
            return
        check_loaded(layer, f"experts {self.prefix}")
        for name, role, kernel, shared in (
            (W13, self.gate_up, self.w13, True),
            (W2, self.down, self.w2, False),
        ):
            weight = getattr(layer, f"{name}_weight").data
            check_finite(weight, f"{name}_weight of {self.prefix}")
            done = quantize_experts(weight, role.parts[0], self.scheme.weights, shared)
            kernel.keep(layer, done.codes, done.scale, done.zero_point)
            scale = done.input_scale
            setattr(
                layer,
                f"{name}_input_scale",
                None if scale is None else Parameter(scale, requires_grad=False),
            )
            truth.linear_ready(role)
        layer._already_called_process_weights_after_loading = True
