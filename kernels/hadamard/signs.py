# SPDX-License-Identifier: Apache-2.0
"""Random signs that are the same for ever, on every machine and version.

No library promises the stream of its generator across versions; a checkpoint that
records only a seed needs one that does. SHAKE-256 (FIPS 202) is one.
"""

import hashlib

import torch


def random_signs(seed: int, size: int) -> torch.Tensor:
    """``[size]`` of +1 and -1, int8.

    Element i is -1 where bit ``i % 8`` of byte ``i // 8`` of SHAKE-256 of the seed's
    decimal digits (ASCII) is set.

    Raises:
        ValueError: for a negative seed or size.
    """
    if seed < 0 or size < 0:
        raise ValueError(f"seed and size must not be negative, got {seed}, {size}")
    stream = hashlib.shake_256(str(seed).encode("ascii")).digest(-(-size // 8))
    data = torch.frombuffer(bytearray(stream or b"\0"), dtype=torch.uint8)
    bits = data.unsqueeze(-1) >> torch.arange(8, dtype=torch.uint8) & 1
    return 1 - 2 * bits.flatten()[:size].to(torch.int8)
