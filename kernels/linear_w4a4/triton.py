# SPDX-License-Identifier: Apache-2.0
"""Integer linear on the int8 matrix units of a GPU; weights stay packed in memory.

int32 sums equal the reference's bit for bit. So does the output, except with groups and
split-K, where the groups of a part are added up before the parts are.
"""

from typing import Any

import torch
import triton

from ..gpu.checks import FLOATS, check_optional, check_out_dtype, check_tensor
from ..gpu.configs import LinearConfig, choose, choose_for_experts, parts
from ..gpu.split import reduce_parts
from ..gpu.target import architecture, inline_ptx, processors
from ..gpu.tiles import Sent, row_tiles
from ..gpu.weights import GpuWeight, group_size_of, padded, row_bytes
from .reference import check_int32
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
    out_dtype: torch.dtype,
    config: LinearConfig | None = None,
) -> torch.Tensor:
    """Quantized activations times a weight of ``gpu.weights.pack(..., widen=True)``.

    Args:
        codes: int8 ``[tokens, k]``.
        scale: float32 ``[tokens, 1]``.
        zero_point: int32 ``[tokens, 1]``, None for symmetric activations.
        weight, weight_scale, weight_zero, weight_sum: a GpuWeight.
        bias: float ``[n]`` or None.
        out_dtype: bfloat16, float16 or float32, of the result ``[tokens, n]``.
        config: launch configuration; that of the chip's table when None.

    Raises:
        ValueError: for arguments of another form, or a K whose sums might not fit.
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
    check_tensor(scale, "scale", (torch.float32,), (m, 1), device)
    check_optional(zero_point, "zero_point", (torch.int32,), (m, 1), device)
    check_optional(bias, "bias", FLOATS, (n,), device)
    check_out_dtype(out_dtype)
    if k >= MAX_K:
        raise ValueError(f"codes must have K below {MAX_K}, got {k}")
    unit = 16 if bits == 4 and groups > 1 else 1
    code_max = 128 if zero_point is None else 255
    weight_max = 1 << bits - 1 if weight_zero is None else (1 << bits) - 1
    check_int32(code_max * weight_max * unit * (k // groups))
    out = torch.empty((m, n), dtype=out_dtype, device=device)
    if m == 0 or n == 0:
        return out
    launch(
        codes,
        (scale, zero_point),
        GpuWeight(weight, weight_scale, weight_zero, weight_sum),
        bias,
        out,
        config,
    )
    return out


def _config(arch: str, scheme: str, m: int, sent: Sent | None) -> LinearConfig:
    if sent is None:
        return choose(arch, "linear_w4a4", scheme, m)
    each = -(-m // sent.experts)
    return choose_for_experts(arch, "linear_w4a4", scheme, each)


def launch(
    codes: torch.Tensor,
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
        tokens: scale and zero point of each.
        weight: of all experts where there are some, with a first dimension of them.
        bias: without experts.
        out: ``[rows, n]``, not empty.
        config: None takes that of the chip's table.
        sent: of the tokens, to experts; None for one weight.
    """
    (m, n), k = out.shape, codes.shape[1]
    scale, zero_point = tokens
    arch = architecture(codes.device)
    groups = weight.scale.shape[-2]
    group_size = group_size_of(k, groups)
    nibbles = weight.weight.dtype == torch.uint8
    if config is None:
        scheme = "channel" if group_size == 0 else "group"
        config = _config(arch, scheme, m, sent)
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
        0 if sent is None else sent.experts,
        GROUP=group_size,
        NIBBLES=nibbles,
        WEIGHT_ZERO=weight.zero is not None,
        EVEN_K=k % 128 == 0,
        PARTS=split,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        SWAP=config.swap,
        PTX=inline_ptx(arch),
        EXPERTS=sent is not None,
        num_warps=config.warps,
        num_stages=config.stages,
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
            TOKEN=True,
            BLOCK=REDUCE_BLOCK,
            enable_fp_fusion=False,
            **flags,
        )
