# SPDX-License-Identifier: Apache-2.0
"""One linear layer in every form that is compared: stock vLLM's, torch's and ours.

An arm turns a bf16 weight ``[n, k]`` into a factory of layers; each layer owns its
copy of the packed weight, so that a rotation through many of them reads memory and not
the last-level cache. Stock arms pack through vLLM's own code.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from vllm_lowbit.kernels.dispatch import select
from vllm_lowbit.kernels.grid import IntGrid
from vllm_lowbit.kernels.packing import pack
from vllm_lowbit.linear_kernels import KERNELS, LinearSpec
from vllm_lowbit.load_time import LinearRotations, activation_grid, quantize_linear
from vllm_lowbit.schema import Rotation, scheme_from_name

from .checkpoints import round_to_nearest

# bf16 [m, k] -> bf16 [m, n]
Layer = Callable[[torch.Tensor], torch.Tensor]
GROUP_SIZE = 128


@dataclass(frozen=True)
class Prepared:
    """A packed linear.

    Attributes:
        copy: makes a layer with packed weights of its own.
        weight_bytes: codes and scales that one call reads.
    """

    copy: Callable[[], Layer]
    weight_bytes: int


@dataclass(frozen=True)
class LinearArm:
    """One way to compute a linear.

    Attributes:
        prepare: packs a bf16 weight ``[n, k]``, given the transform that ours runs on
            its input.
        operators: of ``torch.ops._C`` that it needs; vLLM builds for older CPUs lack
            some.
        bits: of the weight, and of the activations.
        stock_bf16: whether it is one of the unquantized arms.
        ours: whether it is one of this package.
    """

    prepare: Callable[[torch.Tensor, Rotation], Prepared]
    operators: tuple[str, ...]
    bits: tuple[int, int]
    ours: bool = False

    @property
    def stock_bf16(self) -> bool:
        return self.bits == (16, 16)

    def missing(self) -> str | None:
        """Why it cannot run here, or None."""
        absent = [name for name in self.operators if not hasattr(torch.ops._C, name)]
        if not absent:
            return None
        return f"this build of vLLM for this CPU has no {', '.join(absent)}"


def _torch_linear(weight: torch.Tensor) -> Prepared:
    def copy() -> Layer:
        own = weight.clone()
        return lambda x: torch.nn.functional.linear(x, own)

    return Prepared(copy, weight.nbytes)


def _onednn(weight: torch.Tensor) -> Prepared:
    from vllm import _custom_ops as ops

    def copy() -> Layer:
        handler = ops.create_onednn_mm(weight.clone().t(), 32)
        return lambda x: ops.onednn_mm(handler, x, None)

    return Prepared(copy, weight.nbytes)


def _packed_bf16(weight: torch.Tensor) -> Prepared:
    from vllm import _custom_ops as ops

    def copy() -> Layer:
        packed = torch.ops._C.convert_weight_packed(weight)
        return lambda x: ops.weight_packed_linear_cpu(x, packed, len(weight), None)

    return Prepared(copy, weight.nbytes)


def _onednn_w8a8(weight: torch.Tensor) -> Prepared:
    from vllm import _custom_ops as ops

    codes, scale = round_to_nearest(weight, IntGrid(8), None)

    def copy() -> Layer:
        # The handler refers to the scales it was made with.
        own = codes.clone().t(), scale.clone()
        handler = ops.create_onednn_scaled_mm(*own, torch.bfloat16, True, False, 32)

        def layer(x: torch.Tensor, own: Any = own) -> torch.Tensor:
            quantized, x_scale, _ = ops.onednn_scaled_int8_quant(x)
            out = x.new_empty(len(x), handler.n)
            return ops.onednn_scaled_mm(
                handler, quantized, out, x_scale, None, None, None
            )

        return layer

    return Prepared(copy, codes.nbytes + scale.nbytes)


def _int8_with_quant(weight: torch.Tensor) -> Prepared:
    codes, scale = round_to_nearest(weight, IntGrid(8), None)

    def copy() -> Layer:
        packed = torch.ops._C.convert_weight_packed(codes)
        own = scale.flatten().clone()
        return lambda x: torch.ops._C.int8_scaled_mm_with_quant(
            x, packed, own, None, x.dtype, True
        )

    return Prepared(copy, codes.nbytes + scale.nbytes)


def _mixed_precision(weight: torch.Tensor, activations_int8: bool) -> Prepared:
    """vLLM's kernel of 4-bit weights, packed by its own class."""
    from vllm.model_executor.kernels.linear.mixed_precision import cpu
    from vllm.model_executor.kernels.linear.mixed_precision.MPLinearKernel import (
        MPLinearLayerConfig,
    )
    from vllm.scalar_type import scalar_types

    n, k = weight.shape
    codes, scale = round_to_nearest(weight, IntGrid(4), GROUP_SIZE)
    config = MPLinearLayerConfig(
        full_weight_shape=(k, n),
        partition_weight_shape=(k, n),
        weight_type=scalar_types.uint4b8,
        act_type=weight.dtype,
        group_size=GROUP_SIZE,
        zero_points=False,
    )
    kernel = cpu.CPUWNA16LinearKernel(config, "packed", "scale", "zero_point")
    module: Any = torch.nn.Module()
    module.bias = module.isa_hint = None
    for name, tensor in (("packed", pack(codes, 4)), ("scale", scale.to(weight.dtype))):
        parameter: Any = torch.nn.Parameter(tensor, requires_grad=False)
        parameter.input_dim, parameter.output_dim = 1, 0
        parameter.packed_dim = 1
        module.register_parameter(name, parameter)
    if activations_int8:
        module.packed.data = module.packed.data.t()
        module.scale.data = module.scale.data.t().contiguous()
        module.use_w4a8 = True
        kernel._process_gptq_weights_w4a8(module)
    else:
        kernel.process_weights_after_loading(module)

    def copy() -> Layer:
        own = _clone(module)
        own.zero_point = getattr(own, "zero_point", None)
        own.use_w4a8, own.isa_hint = activations_int8, module.isa_hint
        return lambda x: kernel.apply_weights(own, x)

    size = sum(parameter.nbytes for parameter in module.parameters())
    return Prepared(copy, size)


def ours_linear(weight: torch.Tensor, rotation: Rotation, scheme: str) -> Prepared:
    """This package's linear, as its layers run it: transform, quantize, multiply.

    Args:
        weight: bf16 ``[n, k]``.
        rotation: of its input, online.
        scheme: ``w4a4`` or ``w4a16``.
    """
    n, k = weight.shape
    parsed = scheme_from_name(scheme)
    around = LinearRotations(online_input=rotation)
    made = quantize_linear(weight, [n], [around], parsed.weights)
    bits, inputs = parsed.activations.bits, activation_grid(parsed, "")
    spec = LinearSpec(
        n,
        k,
        IntGrid(parsed.weights.bits, parsed.weights.symmetric),
        inputs,
        rotation.order,
        rotation.stride,
    )
    operator = "linear_wna16" if inputs is None else "linear_w4a4"
    case = {"weight_bits": parsed.weights.bits, "activation_bits": bits}
    kernel = KERNELS[select(operator, "cpu", **case).backend](spec)
    module: Any = torch.nn.Module()
    kernel.keep(module, made.codes, made.scale, made.zero_point)
    factors = made.input_scale

    def copy() -> Layer:
        own = _clone(module)
        return lambda x: kernel.multiply(own, x, factors, None, x.dtype)

    size = sum(parameter.nbytes for parameter in module.parameters())
    return Prepared(copy, size + (0 if factors is None else factors.nbytes))


def _clone(module: Any) -> Any:
    """A module with copies of the parameters of another, those that are None too."""
    own = torch.nn.Module()
    for name, parameter in module._parameters.items():
        copied = None if parameter is None else parameter.data.clone()
        own.register_parameter(
            name,
            None if copied is None else torch.nn.Parameter(copied, requires_grad=False),
        )
    return own


def _stock(
    prepare: Callable[[torch.Tensor], Prepared], bits: tuple[int, int], *operators: str
) -> LinearArm:
    return LinearArm(lambda weight, rotation: prepare(weight), operators, bits)


LINEAR_ARMS: dict[str, LinearArm] = {
    "F.linear bf16": _stock(_torch_linear, (16, 16)),
    "onednn_mm bf16": _stock(_onednn, (16, 16), "create_onednn_mm_handler"),
    "weight_packed_linear bf16": _stock(
        _packed_bf16, (16, 16), "convert_weight_packed", "weight_packed_linear"
    ),
    "onednn_scaled_mm W8A8": _stock(
        _onednn_w8a8, (8, 8), "create_onednn_scaled_mm_handler"
    ),
    "int8_scaled_mm_with_quant W8A8": _stock(
        _int8_with_quant, (8, 8), "convert_weight_packed", "int8_scaled_mm_with_quant"
    ),
    "cpu_gemm_wna16 W4A16": _stock(
        lambda weight: _mixed_precision(weight, False), (4, 16), "cpu_gemm_wna16"
    ),
    "int4_scaled_mm_cpu W4A8": _stock(
        lambda weight: _mixed_precision(weight, True),
        (4, 8),
        "convert_weight_packed_scale_zp",
        "int4_scaled_mm_cpu",
    ),
    "lowbit W4A4": LinearArm(partial(ours_linear, scheme="w4a4"), (), (4, 4), True),
    "lowbit W4A16": LinearArm(partial(ours_linear, scheme="w4a16"), (), (4, 16), True),
}
