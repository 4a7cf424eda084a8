# SPDX-License-Identifier: Apache-2.0
"""KV4 store by Triton kernels: the pages of the reference, byte for byte."""

import functools

import torch

from ..gpu.target import architecture
from ..hadamard.matrices import matrix
from .layout import check_cache

# Tokens of one program: as many rows as one integer matrix instruction has.
ROWS = 16
TYPES = (torch.float32, torch.bfloat16, torch.float16)


def next_power_of_two(n: int) -> int:
    """The least power of two that is at least n."""
    return 1 << (n - 1).bit_length()


def row_warps(head_dim: int) -> int:
    """Warps that transform a block of rows: so many that registers hold it."""
    return 4 if head_dim <= 128 else 8


@functools.lru_cache(maxsize=64)
def rotation_table(head_dim: int, device: torch.device) -> torch.Tensor:
    """The transposed Hadamard matrix, int8, padded with zeros to a power of two.

    The first call for a device copies from the host: make it before a CUDA graph is
    captured.
    """
    padded = next_power_of_two(head_dim)
    table = torch.zeros(padded, padded, dtype=torch.int8, device="cpu")
    table[:head_dim, :head_dim] = matrix(head_dim).t()
    return table.to(device)


def check_rows(x: torch.Tensor, name: str, shape: tuple[int, int, int]) -> None:
    """Raise ValueError unless x holds contiguous heads of a type that kernels read."""
    if x.dtype not in TYPES:
        raise ValueError(f"{name} must be {', '.join(map(str, TYPES))}, got {x.dtype}")
    if x.shape != shape:
        raise ValueError(f"{name} must be {list(shape)}, got {list(x.shape)}")
    if x.stride(2) != 1:
        raise ValueError(f"heads of {name} must be contiguous, got {x.stride()}")


def check_devices(device: torch.device, **others: torch.Tensor | None) -> None:
    """Raise ValueError for a tensor that is not on the device of the first one."""
    for name, tensor in others.items():
        if tensor is not None and tensor.device != device:
            raise ValueError(f"{name} must be on {device}, got {tensor.device}")


def check_integers(x: torch.Tensor, name: str, shape: tuple[int, ...]) -> None:
    """Raise ValueError unless x is int32 or int64 of a shape (-1 for any size) whose
    last dimension is contiguous."""
    if x.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"{name} must be int32 or int64, got {x.dtype}")
    if x.dim() != len(shape) or any(
        want not in (-1, size) for want, size in zip(shape, x.shape, strict=True)
    ):
        wanted = ["any" if size < 0 else size for size in shape]
        raise ValueError(f"{name} must be {wanted}, got {list(x.shape)}")
    if x.numel() and x.stride(-1) != 1:
        raise ValueError(f"{name} must be contiguous, got strides {x.stride()}")


def check_pages(kv_cache: torch.Tensor) -> int:
    """The head_dim of a cache whose pages kernels can address.

    Raises:
        ValueError: as ``check_cache``, and for pages or heads that do not begin at
            even addresses.
    """
    head_dim = check_cache(kv_cache)
    strides = kv_cache.stride()[:2]
    if kv_cache.data_ptr() % 2 or any(stride % 2 for stride in strides):
        raise ValueError(
            f"kv_cache pages must begin at even addresses, got strides {strides} from "
            f"{kv_cache.data_ptr():#x}"
        )
    return head_dim


def kv4_store(
    key: torch.Tensor,
    value: torch.Tensor,
    kv_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    rotate_key: bool,
) -> None:
    """As the reference, byte for byte; nothing waits for the device.

    A slot that the cache does not have is skipped like padding: its number is known
    to the device alone.

    Raises:
        ValueError: for a dtype, shape, stride or device that the kernel cannot take.
    """
    architecture(key.device)  # refuses other devices
    head_dim = check_pages(kv_cache)
    blocks, heads, block_size, _ = kv_cache.shape
    check_integers(slot_mapping, "slot_mapping", (-1,))
    tokens = slot_mapping.shape[0]
    check_rows(key, "key", (tokens, heads, head_dim))
    check_rows(value, "value", (tokens, heads, head_dim))
    check_devices(key.device, value=value, kv_cache=kv_cache, slot_mapping=slot_mapping)
    if tokens == 0:
        return
    from .triton_kernel import store

    half = head_dim // 2
    store[(-(-tokens // ROWS), heads)](
        key,
        value,
        kv_cache,
        slot_mapping,
        rotation_table(head_dim, key.device),
        tokens,
        blocks * block_size,
        *key.stride()[:2],
        *value.stride()[:2],
        *kv_cache.stride()[:2],
        BLOCK_SIZE=block_size,
        HALF=half,
        PADDED=next_power_of_two(head_dim),
        PADDED_HALF=next_power_of_two(half),
        ROWS=ROWS,
        ROTATE=rotate_key,
        num_warps=row_warps(head_dim),
        enable_fp_fusion=False,
    )
