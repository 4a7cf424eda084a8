# SPDX-License-Identifier: Apache-2.0
"""Experts of a lowbit checkpoint: packed weights, transforms folded in."""

from typing import Any

import torch
from vllm.model_executor.layers.fused_moe.config import FusedMoEConfig

from . import truth
from .errors import UnsupportedError
from .experts import W2, W13, LowbitExpertsMethod
from .kernels.packing import codes_per_block
from .lowbit_checkpoint import PackedWeight
from .parameters import ExpertShard, create_packed_experts, take_packed
from .schema import LowbitConfig
from .verification import Verification
from .worker_metrics import load_time


class CheckpointExpertsMethod(LowbitExpertsMethod):
    """Unpacks what the checkpoint holds, and checks it on the way.

    Args:
        config: what the model runs.
        moe: vLLM's description of the layer.
        prefix: name of the layer.
        verification: of the whole checkpoint; nothing is served before its end.
    """

    def __init__(
        self,
        config: LowbitConfig,
        moe: FusedMoEConfig,
        prefix: str,
        verification: Verification,
    ) -> None:
        super().__init__(config, moe, prefix)
        self.verification = verification

    def create_weights(
        self,
        layer: Any,
        num_experts: int,
        hidden_size: int,
        intermediate_size_per_partition: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: object,
    ) -> None:
        """Declare the packed tensors and check the shapes.

        Raises:
            UnsupportedError: when a rotation, a group or the packing does not divide
                the shard, or no backend runs the scheme here.
        """
        hidden, intermediate = hidden_size, intermediate_size_per_partition
        self._prepare_layer(num_experts, hidden, intermediate)
        parallel = self.moe.moe_parallel_config
        per_block = codes_per_block(self.scheme.weights.bits)
        if parallel.tp_size > 1 and intermediate % per_block:
            raise UnsupportedError(
                f"experts {self.prefix}: a shard of {intermediate} inputs is not a "
                f"multiple of the {per_block} codes of {self.scheme.weights.bits} bits "
                "packed together"
            )
        shard = ExpertShard(intermediate, parallel.tp_rank)
        for name, n, k in (
            (W13, 2 * intermediate, hidden),
            (W2, hidden, intermediate),
        ):
            create_packed_experts(
                layer, name, (num_experts, n, k), self.scheme.weights, shard
            )

    @load_time
    def process_weights_after_loading(self, layer: Any) -> None:
        """Unpack the loaded weights.

        Raises:
            CheckpointError: naming the tensor with a value its grid does not have,
                or any tensor of the checkpoint whose checksum is wrong.
        """
        self.verification.finish()
        for name, role, kernel, columns in (
            (W13, self.gate_up, self.w13, self.hidden),
            (W2, self.down, self.w2, self.intermediate),
        ):
            stored = take_packed(layer, f"{name}_")
            codes = torch.stack(
                [
                    PackedWeight(*parts).codes(
                        f"{self.prefix}.{expert}.{role.role}",
                        columns,
                        self.scheme.weights,
                    )
                    for expert, parts in enumerate(_by_expert(stored))
                ]
            )
            kernel.keep(layer, codes, stored.scale, stored.zero_point)
            setattr(layer, f"{name}_input_scale", None)
            truth.linear_ready(role)


def _by_expert(stored: PackedWeight) -> list[tuple[Any, ...]]:
    """Packed codes, scales and zero points of each expert."""
    zeros = stored.zero_point
    none = [None] * len(stored.packed)
    return list(
        zip(stored.packed, stored.scale, none if zeros is None else zeros, strict=True)
    )
