# SPDX-License-Identifier: Apache-2.0
"""How a quantized layer's weight arrives: float, to be quantized, or packed."""

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import Parameter
from vllm.model_executor.model_loader.reload.layerwise import (
    get_layerwise_info,
    initialize_online_processing,
)
from vllm.model_executor.utils import set_weight_attrs

from .errors import CheckpointError
from .lowbit_checkpoint import PackedWeight, quantized_tensors
from .schema import Weights

# Types as in files, and what a tensor holds until it is loaded: nothing that the
# checks of PackedWeight let through together.
_UNLOADED: dict[str, tuple[torch.dtype, float]] = {
    "I32": (torch.int32, 0),
    "F32": (torch.float32, torch.nan),
    "I8": (torch.int8, 127),
}


def create_float(
    layer: Any, n: int, k: int, dtype: torch.dtype, attributes: Mapping[str, Any]
) -> None:
    """Declare ``weight [n, k]`` on the meta device.

    vLLM buffers what is loaded and processes the layer once all of it is there, so
    the float model never exists as a whole.

    Args:
        layer: module that gets the parameter.
        n: rows of this shard.
        k: columns of this shard.
        dtype: of the model.
        attributes: vLLM's, among them the weight loader.
    """
    weight = Parameter(
        torch.empty(n, k, dtype=dtype, device="meta"), requires_grad=False
    )
    set_weight_attrs(weight, {"input_dim": 1, "output_dim": 0, **attributes})
    layer.register_parameter("weight", weight)
    initialize_online_processing(layer)


def create_float_experts(
    layer: Any,
    shapes: Mapping[str, tuple[int, ...]],
    dtype: torch.dtype,
    attributes: Mapping[str, Any],
) -> None:
    """Declare the weights of experts on the meta device, as :func:`create_float`.

    Args:
        layer: module that gets the parameters.
        shapes: of each by its name, ``[experts, n, k]``.
        dtype: of the model.
        attributes: vLLM's, among them the weight loader.
    """
    for name, shape in shapes.items():
        weight = Parameter(
            torch.empty(shape, dtype=dtype, device="meta"), requires_grad=False
        )
        set_weight_attrs(weight, attributes)
        layer.register_parameter(name, weight)
    initialize_online_processing(layer)


def count_bias(linear: Any) -> None:
    """Let a bias that is loaded before the weight count as a part of the layer.

    vLLM gives a linear its bias after its weight, and notices only when another
    tensor of the layer has been loaded. The layer would never be whole, and its float
    weight stay in memory.

    Args:
        linear: layer of :func:`create_float`, which has no bias yet.
    """
    original = linear.weight_loader

    @functools.wraps(original)
    def load(param: Any, *args: object, **kwargs: object) -> object:
        loader = original
        if param.weight_loader is load and not get_layerwise_info(linear).load_numel:
            initialize_online_processing(linear)
            loader = param.weight_loader
        return loader(param, *args, **kwargs)

    linear.weight_loader = load


def check_loaded(layer: Any, name: str, elements: int | None = None) -> None:
    """Raise CheckpointError when part of a float weight was never loaded.

    Args:
        layer: module of :func:`create_float`.
        name: of the layer, for the error.
        elements: to be loaded; None is all of the layer's.
    """
    info = get_layerwise_info(layer)
    if info.load_numel_total is None:
        return
    needed = info.load_numel_total if elements is None else elements
    if info.load_numel < needed:
        raise CheckpointError(
            f"{name}: only {info.load_numel} of {needed} elements are in the checkpoint"
        )


def create_packed(
    layer: Any, n: int, k: int, weights: Weights, attributes: Mapping[str, Any]
) -> None:
    """Declare the tensors of a packed weight ``[n, k]`` as the checkpoint names them.

    Scales and zero points are sharded along the input only where it has groups.
    Arguments as in :func:`create_float`.
    """
    for name, spec in quantized_tensors("layer", n, k, weights).items():
        kind = name.rpartition(".")[2]
        dtype, unloaded = _UNLOADED[spec.dtypes[0]]
        parameter = Parameter(
            torch.full(spec.shape, unloaded, dtype=dtype), requires_grad=False
        )
        sharded = kind == "weight_packed" or weights.group_size is not None
        set_weight_attrs(parameter, {"input_dim": 1} if sharded else {})
        set_weight_attrs(parameter, {"output_dim": 0, **attributes})
        layer.register_parameter(kind, parameter)


@dataclass(frozen=True)
class ExpertShard:
    """Which part of every expert this worker holds.

    Attributes:
        intermediate: of the intermediate size, how much.
        rank: of the worker.
    """

    intermediate: int
    rank: int

    def load(
        self,
        param: Any,
        loaded_weight: torch.Tensor,
        weight_name: str,
        shard_id: str,
        expert_id: int,
        return_success: bool = False,
    ) -> bool:
        """Take this worker's part of one tensor of one expert; vLLM's weight loader.

        Args:
            param: ``[experts, ...]``, of :func:`create_packed_experts`.
            loaded_weight: the tensor of the checkpoint.
            weight_name: of it.
            shard_id: ``w1`` for gate, ``w3`` for up, ``w2`` for down.
            expert_id: of the expert.
            return_success: has no effect; a tensor that does not fit raises.
        """
        part = param.data[expert_id]
        if shard_id == "w2":
            start = self.rank * part.shape[1] if param.sharded else 0
            part.copy_(loaded_weight[:, start : start + part.shape[1]])
        else:
            first = 0 if shard_id == "w1" else self.intermediate
            start = self.rank * self.intermediate
            part[first : first + self.intermediate].copy_(
                loaded_weight[start : start + self.intermediate]
            )
        return True


def create_packed_experts(
    layer: Any,
    name: str,
    shape: tuple[int, int, int],
    weights: Weights,
    shard: ExpertShard,
) -> None:
    """Declare the tensors of the packed weights of experts.

    Args:
        layer: module that gets the parameters.
        name: of the linear, before the names of its parameters.
        shape: of the weights, ``(experts, n, k)``.
        weights: their grid.
        shard: what of them is loaded.
    """
    experts, n, k = shape
    for full, spec in quantized_tensors("layer", n, k, weights).items():
        kind = full.rpartition(".")[2]
        dtype, unloaded = _UNLOADED[spec.dtypes[0]]
        parameter = Parameter(
            torch.full((experts, *spec.shape), unloaded, dtype=dtype),
            requires_grad=False,
        )
        sharded = kind == "weight_packed" or weights.group_size is not None
        set_weight_attrs(parameter, {"sharded": sharded, "weight_loader": shard.load})
        layer.register_parameter(f"{name}_{kind}", parameter)


def take_packed(layer: Any, prefix: str = "") -> PackedWeight:
    """Remove the tensors of a packed weight from the layer and return them.

    Args:
        layer: that has them.
        prefix: of their names.
    """
    tensors = []
    for kind in ("weight_packed", "weight_scale", "weight_zero_point"):
        parameter = getattr(layer, prefix + kind, None)
        tensors.append(None if parameter is None else parameter.data)
        if parameter is not None:
            delattr(layer, prefix + kind)
    packed, scale, zero_point = tensors
    assert packed is not None and scale is not None
    return PackedWeight(packed, scale, zero_point)
