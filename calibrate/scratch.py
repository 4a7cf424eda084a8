# SPDX-License-Identifier: Apache-2.0
"""Where the large tensors of a calibration live: in memory, or in files on disk."""

import math
import os
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch

from ..errors import OutputError


class Scratch:
    """Makes large tensors.

    On disk a tensor is a mapped file that has lost its name: the kernel writes its
    pages out when memory is short, and frees the disk when the tensor goes, however
    the process ends.

    Args:
        directory: of the files; None keeps everything in memory.
    """

    def __init__(self, directory: Path | None = None) -> None:
        self.directory = directory

    def empty(
        self,
        shape: Sequence[int],
        dtype: torch.dtype = torch.float32,
        device: str | torch.device = "cpu",
    ) -> torch.Tensor:
        """A contiguous tensor whose elements are not set.

        Raises:
            OutputError: when the directory has no room for it.
        """
        count = math.prod(shape)
        if self.directory is None or not count:
            return torch.empty(*shape, dtype=dtype, device=device)
        size = count * dtype.itemsize
        try:
            with tempfile.NamedTemporaryFile(dir=self.directory) as file:
                # A page without a block on disk would end the process when written.
                os.posix_fallocate(file.fileno(), 0, size)
                mapped = torch.from_file(file.name, True, count, dtype=dtype)
        except OSError as error:
            raise OutputError(
                f"scratch directory {self.directory}: {size >> 20} MiB more are "
                f"needed: {error}"
            ) from None
        return mapped.view(*shape)

    def keep(self, tensor: torch.Tensor) -> torch.Tensor:
        """The tensor itself in memory, or a copy of it on disk."""
        if self.directory is None:
            return tensor
        return self.empty(tensor.shape, tensor.dtype).copy_(tensor)

    def collect(self, parts: Iterable[torch.Tensor], rows: int) -> torch.Tensor:
        """Parts one after another along the first dimension, as they come.

        Args:
            parts: at least one, of one dtype and device.
            rows: of all of them together.
        """
        whole, filled = None, 0
        for part in parts:
            if whole is None:
                shape = (rows, *part.shape[1:])
                whole = self.empty(shape, part.dtype, part.device)
            whole[filled : filled + len(part)] = part
            filled += len(part)
        if whole is None or filled != rows:
            raise ValueError(f"{filled} rows came, {rows} were announced")
        return whole
