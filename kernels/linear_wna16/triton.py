# SPDX-License-Identifier: Apache-2.0
"""Weight-only linear on a GPU: packed weights, 16-bit products, float32 sums.

Codes minus zero are exact in 16 bits, so the only roundings are those of the float32
sums and scales; the order of the sums, not the result, depends on the configuration.
"""

import torch
import triton
import triton.language as tl

from ..gpu.checks import FLOATS, check_optional, check_out_dtype, check_tensor
from ..gpu.configs import LinearConfig, Weight, choose, parts
from ..gpu.limits import check_fits
from ..gpu.split import reduce_parts
from ..gpu.target import INTERPRETED, architecture, processors
from ..gpu.tiles import Sent, row_tiles
from ..gpu.weights import (
    BLOCK,
    group_size_of,
    half_block,
    padded,
    row_bytes,
    stored_bits,
)
from .triton_kernel import linear_kernel

REDUCE_BLOCK = 512
HALVES = (torch.bfloat16, torch.float16)
# The interpreter multiplies the bit patterns of bfloat16.
DOT = {
    torch.bfloat16: tl.float32 if INTERPRETED else tl.bfloat16,
    torch.float16: tl.float16,
}


def linear_wna16(
    x: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    weight_zero: torch.Tensor | None,
    bias: torch.Tensor | None,
    weight_bits: int,
    out_dtype: torch.dtype,
    config: LinearConfig | None = None,
) -> torch.Tensor:
    """Float x times a weight of ``gpu.weights.pack(..., widen=False)``.

    Args:
        x: bfloat16 or float16 ``[tokens, k]``.
        weight, weight_scale, weight_zero: of a GpuWeight.
        bias: float ``[n]`` or None.
        weight_bits: 2, 3, 4, 6 or 8, of the codes.
        out_dtype: bfloat16, float16 or float32, of the result ``[tokens, n]``.
        config: launch configuration; that of the chip's table when None.

    Raises:
        ValueError: for arguments of another form.
    """
    check_tensor(x, "x", HALVES, (None, None))
    device = x.device
    m, k = x.shape
    bits = stored_bits(weight_bits, False)
    held = torch.int8 if bits == 8 else torch.uint8
    check_tensor(weight, "weight", (held,), (None, row_bytes(k, bits)), device)
    n = weight.shape[0]
    check_tensor(weight_scale, "weight_scale", (torch.float32,), (None, n), device)
    groups = weight_scale.shape[0]
    size = group_size_of(k, groups)
    half_block(size or BLOCK, bits)
    check_optional(weight_zero, "weight_zero", (torch.int32,), (groups, n), device)
    check_optional(bias, "bias", FLOATS, (n,), device)
    check_out_dtype(out_dtype)
    out = torch.empty((m, n), dtype=out_dtype, device=device)
    if m and n:
        weights = (weight, weight_scale, weight_zero)
        launch(x, weights, bias, bits, size, out, config)
    return out


def launch(
    x: torch.Tensor,
    weights: tuple[torch.Tensor, torch.Tensor, torch.Tensor | None],
    bias: torch.Tensor | None,
    bits: int,
    group_size: int,
    out: torch.Tensor,
    config: LinearConfig | None,
    sent: Sent | None = None,
) -> None:
    """Launch the kernel; arguments as in :func:`linear_wna16`, checked.

    Args:
        x: bfloat16 or float16 ``[tokens, k]``.
        weights: packed, their scales and zero points, of all experts where there are
            some, with a first dimension of them.
        bias: without experts.
        bits: stored width.
        group_size: 0 for one group.
        out: ``[rows, n]``, not empty.
        config: None takes that of the chip's table.
        sent: of the tokens, to experts; None for one weight.

    Raises:
        ValueError: for a config that is not of this operator, or that the chip has no
            memory for.
    """
    weight, scale, zero = weights
    (m, n), k = out.shape, x.shape[1]
    arch, kind = architecture(x.device), Weight(bits, group_size, zero is not None)
    experts = 0 if sent is None else sent.experts
    if config is None:
        config = choose(arch, "linear_wna16", kind, m, experts)
    if config.e4m3:
        raise ValueError("config.e4m3 is of linear_w4a4, got it for linear_wna16")
    check_fits(arch, "linear_wna16", kind, config)
    half = half_block(group_size or BLOCK, bits)
    block = half * (8 if bits == 3 else 8 // bits)
    turns = padded(k, bits) // max(block, group_size)
    split = 1
    if sent is None:
        split = parts(config, m, n, turns, processors(x.device))
    target = out
    if split > 1:
        target = torch.empty((split, m, n), dtype=torch.float32, device=out.device)
    # An argument that is not read is still a pointer.
    bias_pointer = scale if bias is None else bias
    tiles = row_tiles(m, config.block_m, sent)
    linear_kernel[(tiles.number * triton.cdiv(n, config.block_n), split)](
        x,
        weight,
        target,
        scale,
        scale if zero is None else zero,
        bias_pointer,
        x if tiles.tokens is None else tiles.tokens,
        x if tiles.table is None else tiles.table,
        m,
        n,
        k,
        weight.shape[-1],
        turns,
        scale.shape[-2],
        experts,
        GROUP=group_size,
        BITS=bits,
        HALF=half,
        ZERO=zero is not None,
        BIAS=bias is not None,
        EVEN_K=k == padded(k, bits),
        PARTS=split,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        SWAP=config.swap,
        DOT=DOT[x.dtype],
        EXPERTS=sent is not None,
        **config.options(),
    )
    if split > 1:
        reduce_parts[(m, triton.cdiv(n, REDUCE_BLOCK))](
            target,
            out,
            scale,
            scale,
            scale,
            scale,
            bias_pointer,
            m,
            n,
            PARTS=split,
            INTEGER=False,
            CHANNEL=group_size == 0,
            TOKEN=False,
            ZERO=False,
            BIAS=bias is not None,
            BLOCK=REDUCE_BLOCK,
        )
