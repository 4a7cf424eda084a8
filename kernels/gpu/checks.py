# SPDX-License-Identifier: Apache-2.0
"""Checks of what a kernel is launched with: a wrong argument never reaches a grid."""

import torch

from .target import DEVICE_TYPES

FLOATS = (torch.bfloat16, torch.float16, torch.float32)


def check_tensor(
    tensor: torch.Tensor,
    name: str,
    dtypes: tuple[torch.dtype, ...],
    shape: tuple[int | None, ...],
    device: torch.device | None = None,
) -> None:
    """Raise ValueError unless a tensor is contiguous and of this form.

    Args:
        tensor: the argument.
        name: of the argument.
        dtypes: that are supported.
        shape: sizes, None for any.
        device: it must be on; None for any that runs Triton.
    """
    wanted = " or ".join(str(dtype) for dtype in dtypes)
    sizes = ", ".join("any" if size is None else str(size) for size in shape)
    fits = tensor.dim() == len(shape) and all(
        size is None or size == actual
        for size, actual in zip(shape, tensor.shape, strict=True)
    )
    if tensor.dtype not in dtypes or not fits:
        raise ValueError(
            f"{name} must be {wanted} [{sizes}], got {tensor.dtype} "
            f"{list(tensor.shape)}"
        )
    if device is None and tensor.device.type not in DEVICE_TYPES:
        raise ValueError(f"{name} must be on a GPU (cuda), got {tensor.device}")
    if device is not None and tensor.device != device:
        raise ValueError(f"{name} must be on {device}, got {tensor.device}")
    if not tensor.is_contiguous():
        raise ValueError(f"{name} must be contiguous, got strides {tensor.stride()}")
    if tensor.data_ptr() % tensor.element_size():
        raise ValueError(
            f"{name} must be aligned to {tensor.element_size()} bytes, its data is at "
            f"{tensor.data_ptr():#x}"
        )


def check_optional(
    tensor: torch.Tensor | None,
    name: str,
    dtypes: tuple[torch.dtype, ...],
    shape: tuple[int | None, ...],
    device: torch.device,
) -> None:
    """As :func:`check_tensor`, for an argument that may be None."""
    if tensor is not None:
        check_tensor(tensor, name, dtypes, shape, device)


def check_out_dtype(dtype: torch.dtype) -> None:
    """Raise ValueError for a result of another type than the kernels write."""
    if dtype not in FLOATS:
        raise ValueError(f"out_dtype must be bfloat16, float16 or float32, got {dtype}")
