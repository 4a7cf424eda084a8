# SPDX-License-Identifier: Apache-2.0
"""What the backends of a CPU share: one expert after another."""

from collections.abc import Callable

import torch

Linear = Callable[[int, torch.Tensor], torch.Tensor]


def scale_of(input_scale: torch.Tensor | None, expert: int) -> torch.Tensor | None:
    """The scale of one expert's input."""
    if input_scale is None or input_scale.dim() == 1:
        return input_scale
    return input_scale[expert]


def over_experts(
    x: torch.Tensor,
    rows: torch.Tensor,
    offsets: torch.Tensor,
    experts: int,
    n: int,
    out_dtype: torch.dtype,
    linear: Linear,
) -> torch.Tensor:
    """``[pairs, n]`` from the linear of every expert that has pairs.

    Args:
        x: ``[tokens, k]``.
        rows: int64 ``[pairs]``, the token of each pair.
        offsets: int32 ``[experts + 1]``, pairs of expert e are
            ``offsets[e]:offsets[e + 1]``.
        experts: how many there are.
        n: outputs of each.
        out_dtype: of the result.
        linear: of an expert, from its index and its tokens.

    Raises:
        ValueError: for rows or offsets that do not fit.
    """
    ends = _checked(x, rows, offsets, experts)
    out = torch.empty((len(rows), n), dtype=out_dtype, device=x.device)
    for expert, (start, end) in enumerate(zip(ends, ends[1:], strict=False)):
        if start < end:
            out[start:end] = linear(expert, x[rows[start:end]])
    return out


def _checked(
    x: torch.Tensor, rows: torch.Tensor, offsets: torch.Tensor, experts: int
) -> list[int]:
    """Offsets as numbers, once they and rows fit."""
    for name, tensor, dtype, shape in (
        ("rows", rows, torch.int64, (len(rows),)),
        ("offsets", offsets, torch.int32, (experts + 1,)),
    ):
        if tensor.dtype != dtype or tensor.shape != shape:
            raise ValueError(
                f"{name} must be {dtype} {list(shape)}, got {tensor.dtype} "
                f"{list(tensor.shape)}"
            )
    ends = offsets.tolist()
    if ends[0] != 0 or ends[-1] != len(rows) or sorted(ends) != ends:
        raise ValueError(
            f"offsets must ascend from 0 to the {len(rows)} pairs, got {ends}"
        )
    if len(rows) and not 0 <= int(rows.min()) <= int(rows.max()) < len(x):
        raise ValueError(f"rows must lie in [0, {len(x)}), got {rows.tolist()}")
    return ends
