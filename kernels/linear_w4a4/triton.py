# SPDX-License-Identifier: Apache-2.0
"""Integer linear on the int8 matrix units of a GPU; weights stay packed in memory.

Codes of 4 bits may be multiplied on the e4m3 units of some chips instead
(``LinearConfig.e4m3``), whose sums are the same by what is known of them (see
``triton_kernel.py``).

int32 sums equal the reference's bit for bit. So does the output, except with groups and
split-K, where the groups of a part are added up before the parts are.
"""

from dataclasses import replace
from typing import Any

import torch
import triton

from ..gpu.checks import FLOATS, check_optional, check_out_dtype, check_tensor
from ..gpu.configs import LinearConfig, Weight, choose, parts
from ..gpu.limits import check_fits
from ..gpu.split import reduce_parts
from ..gpu.target import E4M3_SUMS, architecture, inline_ptx, processors
from ..gpu.tiles import Sent, row_tiles
from ..gpu.weights import GpuWeight, group_size_of, padded, row_bytes
from .reference import check_int32, check_scales
from .triton_kernel import linear_kernel

# |code| <= 128 times 16 |code| <= 128, summed over K, fits int32 below this.
MAX_K = 2**31 // 128**2
REDUCE_BLOCK = 512


def linear_w4a4(
    codes: torch.Tensor,
    scale: torch.Tensor,
    zero_point: torch.Tensor | None,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    weight_zero: torch.Tensor | None,
    weight_sum: torch.Tensor,
    bias: torch.Tensor | None,
    activation_bits: int,
    out_dtype: torch.dtype,
    config: LinearConfig | None = None,
) -> torch.Tensor:
    """Quantized activations times a weight of ``gpu.weights.pack(..., widen=True)``.

    Args:
        codes: int8 ``[tokens, k]``.
        scale: float32 ``[tokens, 1]`` or ``[tokens, groups]``.
        zero_point: int32 of that shape, None for symmetric activations.
        weight, weight_scale, weight_zero, weight_sum: a GpuWeight.
        bias: float ``[n]`` or None.
        activation_bits: 2 to 8, of the codes, whose values are not checked.
        out_dtype: bfloat16, float16 or float32, of the result ``[tokens, n]``.
        config: launch configuration; that of the chip's table when None.

    Raises:
        ValueError: for arguments of another form, a K whose sums might not fit, or a
            config that does not fit the codes or the chip.
    """
    check_tensor(codes, "codes", (torch.int8,), (None, None))
    device = codes.device
    m, k = codes.shape
    check_tensor(weight, "weight", (torch.uint8, torch.int8), (None, None), device)
    check_tensor(weight_scale, "weight_scale", (torch.float32,), (None, None), device)
    n, groups = weight.shape[0], weight_scale.shape[0]
    group_size_of(k, groups)
    bits = 4 if weight.dtype == torch.uint8 else 8
    size = row_bytes(k, bits)
    check_tensor(weight, "weight", (weight.dtype,), (n, size), device)
    form = groups, n
    check_tensor(weight_scale, "weight_scale", (torch.float32,), form, device)
    check_optional(weight_zero, "weight_zero", (torch.int32,), form, device)
    check_tensor(weight_sum, "weight_sum", (torch.int32,), form, device)
    check_tokens(scale, zero_point, m, groups, device)
    check_optional(bias, "bias", FLOATS, (n,), device)
    check_out_dtype(out_dtype)
    check_sums(k, groups, (activation_bits, zero_point), (bits, weight_zero))
    out = torch.empty((m, n), dtype=out_dtype, device=device)
    if m == 0 or n == 0:
        return out
    launch(
        codes,
        activation_bits,
        (scale, zero_point),
        GpuWeight(weight, weight_scale, weight_zero, weight_sum),
        bias,
        out,
        config,
    )
    return out


def check_tokens(
    scale: torch.Tensor,
    zero_point: torch.Tensor | None,
    m: int,
    groups: int,
    device: torch.device,
) -> None:
    """Raise ValueError unless m tokens have one scale, or one for each group."""
    check_tensor(scale, "scale", (torch.float32,), (m, None), device)
    check_scales(scale, "scale", groups)
    form = m, scale.shape[1]
    check_optional(zero_point, "zero_point", (torch.int32,), form, device)


def check_sums(
    k: int,
    groups: int,
    activations: tuple[int, torch.Tensor | None],
    weights: tuple[int, torch.Tensor | None],
) -> None:
    """Raise ValueError where sums might not fit, or activations are of no known width.

    Args:
        k: columns.
        groups: that they are in.
        activations: bits and zero points, None when symmetric.
        weights: stored bits and zero points, None when symmetric.
    """
    activation_bits, zero_point = activations
    if not 2 <= activation_bits <= 8:
        raise ValueError(f"activation_bits must be 2 to 8, got {activation_bits}")
    if k >= MAX_K:
        raise ValueError(f"codes must have K below {MAX_K}, got {k}")
    bits, weight_zero = weights
    unit = 16 if bits == 4 and groups > 1 else 1
    check_int32(
        _largest(activation_bits, zero_point)
        * _largest(bits, weight_zero)
        * unit
        * (k // groups)
    )


def _largest(bits: int, zero: torch.Tensor | None) -> int:
    """Magnitude of a code less its zero."""
    return 1 << bits - 1 if zero is None else (1 << bits) - 1


def _check_e4m3(arch: str, activation_bits: int, weight_bits: int) -> None:
    """Raise ValueError unless e4m3 holds the codes and is known to add them exactly."""
    if arch not in E4M3_SUMS:
        chips = ", ".join(chip for chip in E4M3_SUMS if chip.startswith("sm_"))
        raise ValueError(f"config.e4m3 is supported on {chips}, not on {arch}")
    if activation_bits > 4 or weight_bits > 4:
        raise ValueError(
            "config.e4m3 is for codes of up to 4 bits, got activation_bits "
            f"{activation_bits} and weights of {weight_bits} bits"
        )


def launch(
    codes: torch.Tensor,
    activation_bits: int,
    tokens: tuple[torch.Tensor, torch.Tensor | None],
    weight: GpuWeight,
    bias: torch.Tensor | None,
    out: torch.Tensor,
    config: LinearConfig | None,
    sent: Sent | None = None,
) -> None:
    """Launch the kernel; arguments as in :func:`linear_w4a4`, checked.

    Args:
        codes: int8 ``[tokens, k]``.
        activation_bits: of the codes.
        tokens: scale and zero point of each.
        weight: of all experts where there are some, with a first dimension of them.
        bias: without experts.
        out: ``[rows, n]``, not empty.
        config: None takes that of the chip's table.
        sent: of the tokens, to experts; None for one weight.

    Raises:
        ValueError: for a config that does not fit the codes, or that the chip has no
            memory or no units for.
    """
    (m, n), k = out.shape, codes.shape[1]
    scale, zero_point = tokens
    arch = architecture(codes.device)
    groups = weight.scale.shape[-2]
    group_size = group_size_of(k, groups)
    nibbles = weight.weight.dtype == torch.uint8
    bits = 4 if nibbles else 8
    of_groups = scale.shape[1] > 1
    kind = Weight(bits, group_size, weight.zero is not None, of_groups)
    experts = 0 if sent is None else sent.experts
    if config is None:
        config = choose(arch, "linear_w4a4", kind, m, experts)
        if bits > 4 or activation_bits > 4:
            config = replace(config, e4m3=False)
    if config.e4m3:
        _check_e4m3(arch, activation_bits, bits)
    check_fits(arch, "linear_w4a4", kind, config)
    step = group_size * (2 if nibbles else 1) if group_size in (32, 64) else 128
    steps = padded(k, 4) // step
    turns = steps // max(1, group_size // step)
    split = 1
    if sent is None:
        split = parts(config, m, n, turns, processors(codes.device))
    target = out
    if split > 1:
        dtype = torch.int32 if group_size == 0 else torch.float32
        target = torch.empty((split, m, n), dtype=dtype, device=out.device)
    # An argument that is not read is still a pointer.
    operands: list[Any] = [
        scale,
        scale if zero_point is None else zero_point,
        weight.scale,
        weight.scale if weight.zero is None else weight.zero,
        weight.sum,
        scale if bias is None else bias,
    ]
    flags = {"ZERO": zero_point is not None, "BIAS": bias is not None}
    tiles = row_tiles(m, config.block_m, sent)
    linear_kernel[(tiles.number * triton.cdiv(n, config.block_n), split)](
        codes,
        weight.weight.view(torch.int8),
        target,
        *operands,
        codes if tiles.tokens is None else tiles.tokens,
        codes if tiles.table is None else tiles.table,
        m,
        n,
        k,
        weight.weight.shape[-1],
        steps,
        groups,
        experts,
        GROUP=group_size,
        NIBBLES=nibbles,
        WEIGHT_ZERO=kind.zeros,
        TOKEN_GROUPS=of_groups,
        EVEN_K=k % 128 == 0,
        PARTS=split,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        SWAP=config.swap,
        PTX=inline_ptx(arch),
        EXPERTS=sent is not None,
        E4M3=config.e4m3,
        IMPRECISE=E4M3_SUMS[arch] if config.e4m3 else None,
        **config.options(),
        # Product and sum are rounded apart, as in the reference.
        enable_fp_fusion=False,
        **flags,
    )
    if split > 1:
        scale, zero, weight_scale, _, weight_sum, bias = operands
        flags["ZERO"] &= group_size == 0
        reduce_parts[(m, triton.cdiv(n, REDUCE_BLOCK))](
            target,
            out,
            scale,
            zero,
            weight_scale,
            weight_sum,
            bias,
            m,
            n,
            PARTS=split,
            INTEGER=group_size == 0,
            CHANNEL=group_size == 0,
            TOKEN=not of_groups,
            BLOCK=REDUCE_BLOCK,
            enable_fp_fusion=False,
            **flags,
        )
