# SPDX-License-Identifier: Apache-2.0
"""Linear layers on integer codes, however their weights arrive."""

from typing import Any

import torch
from vllm.model_executor.layers.linear import LinearMethodBase

from .errors import UnsupportedError
from .kernels import dispatch
from .kernels.grid import IntGrid
from .linear_kernels import KERNELS, LinearSpec
from .load_time import activation_grid, check_finite, rotations_of
from .module_names import FUSED, ModuleNames
from .schema import LowbitConfig, Rotation

AS_HERE = ModuleNames()


class LinearRole:
    """What runs in a linear by its place in the model.

    Args:
        config: what the model runs.
        prefix: name of the layer; the last part of its name here is its role.
        names: of the model's modules.

    Raises:
        UnsupportedError: for a role that is not known.
    """

    def __init__(
        self, config: LowbitConfig, prefix: str, names: ModuleNames = AS_HERE
    ) -> None:
        self.scheme = config.scheme
        self.prefix, self.names = prefix, names
        self.block, _, self.role = names.module(prefix).rpartition(".")
        if self.role not in FUSED:
            raise UnsupportedError(
                f"linear {prefix} is not known to lowbit; supported: "
                + ", ".join(FUSED)
            )
        self.parts = [rotations_of(config.rotations, part) for part in FUSED[self.role]]
        self.input_rotation: Rotation | None = self.parts[0].online_input
        self.grid = IntGrid(self.scheme.weights.bits, self.scheme.weights.symmetric)
        self.activation_grid = activation_grid(self.scheme, f"{self.block}.{self.role}")
        self.weight_only = self.activation_grid is None
        self.backend = ""

    def prepare(self, inputs: int, outputs: int, operator: str) -> LinearSpec:
        """Check the shapes of a shard and choose its backend.

        Args:
            inputs: of this shard.
            outputs: of this shard.
            operator: that multiplies.

        Raises:
            UnsupportedError: when a rotation or group does not divide the shard, or
                no backend runs the scheme here.
        """
        self._check_shard(inputs)
        self.backend = self._select_backend(operator)
        rotation = self.input_rotation
        return LinearSpec(
            outputs,
            inputs,
            self.grid,
            self.activation_grid,
            1 if rotation is None else rotation.order,
            1 if rotation is None else rotation.stride,
        )

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

    def _select_backend(self, operator: str) -> str:
        case = {
            "weight_bits": self.scheme.weights.bits,
            "activation_bits": self.scheme.activations.bits,
        }
        try:
            device = torch.get_default_device().type
            return dispatch.select(operator, device, **case).backend
        except ValueError as error:
            raise UnsupportedError(f"linear {self.prefix}: {error}") from None


class LowbitLinearMethod(LinearRole, LinearMethodBase):
    """One linear, fused or not; subclasses create and load its weights.

    On the layer once it is loaded: the weight in the form of the backend (see
    ``linear_kernels``), and ``input_scale`` float32 ``[k]`` or None.
    """

    @property
    def _part_names(self) -> list[str]:
        """Names in the checkpoint of the linears that are stacked in this one."""
        parts = [f"{self.block}.{part}." for part in FUSED[self.role]]
        return [self.names.stored(part)[:-1] for part in parts]

    def _prepare_layer(self, inputs: int, output_sizes: list[int]) -> None:
        """As :meth:`LinearRole.prepare`.

        Args:
            inputs: of this shard.
            output_sizes: rows of each part in this shard.
        """
        operator = "linear_wna16" if self.weight_only else "linear_w4a4"
        spec = self.prepare(inputs, sum(output_sizes), operator)
        self.output_sizes = output_sizes
        self.kernel = KERNELS[self.backend](spec)

    def _check_finite(self, tensor: torch.Tensor, kind: str) -> None:
        """Raise CheckpointError naming the part whose rows hold an Inf or NaN."""
        parts = tensor.split(self.output_sizes)
        for name, rows in zip(self._part_names, parts, strict=True):
            check_finite(rows, f"{name}.{kind}")

    def apply(
        self,
        layer: Any,
        x: torch.Tensor,
        bias: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """``x [..., k]`` to ``[..., n]`` in the dtype of x."""
        rows = x.reshape(-1, x.shape[-1])
        out = self.kernel.multiply(layer, rows, layer.input_scale, bias, x.dtype)
        return out.view(*x.shape[:-1], -1)
