# SPDX-License-Identifier: Apache-2.0
"""Linear layers of a lowbit checkpoint: packed weights, transforms folded in."""

from typing import Any

import torch

from . import truth
from .errors import UnsupportedError
from .kernels.packing import codes_per_block
from .linear import AS_HERE, LowbitLinearMethod
from .lowbit_checkpoint import PackedWeight
from .module_names import ModuleNames
from .parameters import create_packed, take_packed
from .schema import LowbitConfig
from .verification import Verification
from .worker_metrics import load_time


class CheckpointLinearMethod(LowbitLinearMethod):
    """Unpacks what the checkpoint holds, and checks it on the way.

    Args:
        config: what the model runs.
        prefix: name of the layer.
        verification: of the whole checkpoint; nothing is served before its end.
        names: of the model's modules.
    """

    def __init__(
        self,
        config: LowbitConfig,
        prefix: str,
        verification: Verification,
        names: ModuleNames = AS_HERE,
    ) -> None:
        super().__init__(config, prefix, names)
        self.verification = verification

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
        """Declare the packed tensors and check the shapes.

        Raises:
            UnsupportedError: when a rotation, a group or the packing does not divide
                the shard, or no backend runs the scheme here.
        """
        inputs, bits = input_size_per_partition, self.scheme.weights.bits
        self._prepare_layer(inputs, output_partition_sizes)
        if inputs != input_size and inputs % codes_per_block(bits):
            raise UnsupportedError(
                f"linear {self.prefix}: a shard of {inputs} inputs is not a multiple "
                f"of the {codes_per_block(bits)} codes of {bits} bits packed together"
            )
        self.inputs = inputs
        create_packed(
            layer,
            sum(output_partition_sizes),
            inputs,
            self.scheme.weights,
            extra_weight_attrs,
        )

    @load_time
    def process_weights_after_loading(self, layer: Any) -> None:
        """Unpack the loaded weight.

        Raises:
            CheckpointError: naming the tensor with a value its grid does not have,
                or any tensor of the checkpoint whose checksum is wrong.
        """
        self.verification.finish()
        if layer.bias is not None:
            self._check_finite(layer.bias.data, "bias")
        stored = take_packed(layer)
        codes = self._codes(stored)
        self.kernel.keep(layer, codes, stored.scale, stored.zero_point)
        layer.input_scale = None
        truth.linear_ready(self)

    def _codes(self, stored: PackedWeight) -> torch.Tensor:
        packed = stored.packed
        codes = packed.new_empty(len(packed), self.inputs, dtype=torch.int8)
        start = 0
        for name, size in zip(self._part_names, self.output_sizes, strict=True):
            rows = slice(start, start + size)
            part = stored.rows(rows)
            codes[rows] = part.codes(name, self.inputs, self.scheme.weights)
            start += size
        return codes
