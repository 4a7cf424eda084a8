# SPDX-License-Identifier: Apache-2.0
"""Mixtures of experts on integer codes, however their weights arrive."""

from typing import Any

import torch
from torch.nn import functional
from vllm.model_executor.layers.fused_moe.activation import MoEActivation
from vllm.model_executor.layers.fused_moe.config import (
    FusedMoEConfig,
    FusedMoEQuantConfig,
)
from vllm.model_executor.layers.fused_moe.fused_moe_method_base import (
    FusedMoEMethodBase,
)

from .errors import UnsupportedError
from .expert_kernels import EXPERT_KERNELS
from .kernels.linear_experts.routing import by_expert, combine
from .linear import LinearRole
from .schema import LowbitConfig

# As vLLM names them: gate and up of every expert stacked, and down.
W13, W2 = "w13", "w2"


class LowbitExpertsMethod(FusedMoEMethodBase):
    """The experts of one layer; subclasses create and load their weights.

    On the layer once it is loaded: the weights in the form of the backend (see
    ``expert_kernels``), ``w13_input_scale`` float32 ``[hidden]`` or None, which all
    experts share, and ``w2_input_scale`` float32 ``[experts, intermediate]`` or None.

    Args:
        config: what the model runs.
        moe: vLLM's description of the layer.
        prefix: name of the layer.

    Raises:
        UnsupportedError: for experts that would not compute what was asked for.
    """

    def __init__(self, config: LowbitConfig, moe: FusedMoEConfig, prefix: str) -> None:
        super().__init__(moe)
        self.scheme, self.prefix = config.scheme, prefix
        self.gate_up = LinearRole(config, f"{prefix}.gate_up_proj")
        self.down = LinearRole(config, f"{prefix}.down_proj")
        parallel = moe.moe_parallel_config
        problems = {
            f"activation {moe.activation.value!r}": moe.activation
            != MoEActivation.SILU,
            "biases of experts": moe.has_bias,
            "expert parallelism": parallel.use_ep,
            "load balancing of experts": parallel.enable_eplb,
            "data parallelism": parallel.dp_size > 1,
            "sequence parallelism": parallel.is_sequence_parallel,
        }
        for problem, present in problems.items():
            if present:
                raise UnsupportedError(
                    f"layer {prefix}: {problem} is not supported with a mixture of "
                    "experts; supported: SiLU-gated experts without biases, sharded by "
                    "tensor parallelism alone"
                )

    def _prepare_layer(self, experts: int, hidden: int, intermediate: int) -> None:
        """Check the shapes of the layer and choose its backend.

        Args:
            experts: how many.
            hidden: size of the residual stream.
            intermediate: of one expert, in this shard.

        Raises:
            UnsupportedError: when a rotation or group does not divide the shard, or
                no backend runs the scheme here.
        """
        self.experts, self.hidden, self.intermediate = experts, hidden, intermediate
        spec = self.gate_up.prepare(hidden, 2 * intermediate, "linear_experts")
        self.w13 = EXPERT_KERNELS[self.gate_up.backend](spec, W13)
        spec = self.down.prepare(intermediate, hidden, "linear_experts")
        self.w2 = EXPERT_KERNELS[self.down.backend](spec, W2)

    def get_fused_moe_quant_config(self, layer: Any) -> FusedMoEQuantConfig | None:
        """None: vLLM's own kernels do not run."""
        return None

    def apply(
        self,
        layer: Any,
        x: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        shared_experts: Any,
        shared_experts_input: torch.Tensor | None,
    ) -> torch.Tensor:
        """``[tokens, hidden]`` of ``x [tokens, hidden]``, in its dtype.

        Args:
            layer: that holds the weights.
            x: the tokens.
            topk_weights: float ``[tokens, experts_per_token]``.
            topk_ids: integer, of that shape.
            shared_experts: None; there are none in the supported models.
            shared_experts_input: None.
        """
        routing = by_expert(topk_ids, self.experts)
        gate_up = self.w13.multiply(
            layer, x, routing.rows, routing, layer.w13_input_scale
        )
        gate, up = gate_up.float().chunk(2, dim=-1)
        h = (functional.silu(gate) * up).to(x.dtype)
        pairs = torch.arange(h.shape[0], device=h.device)
        out = self.w2.multiply(layer, h, pairs, routing, layer.w2_input_scale)
        return combine(out, routing, topk_weights)
