# SPDX-License-Identifier: Apache-2.0
"""Where the GPU kernels cut a context into splits.

Boundaries are fixed positions, finer where contexts are short: 256 tokens a split up
to 4096, 1024 up to 32768, 4096 from there. So a short context has enough splits for a
whole GPU, and a long one few enough to merge (68 for 128k tokens). A split never
depends on the batch, on the length of its sequence or on the page size.
"""

# (first token, tokens of a split) from there on.
LEVELS = ((0, 256), (4096, 1024), (32768, 4096))


def split_count(tokens: int) -> int:
    """Splits of a context of so many tokens."""
    ends = (*(first for first, _ in LEVELS[1:]), tokens)
    return sum(
        -(-max(0, min(tokens, end) - first) // size)
        for (first, size), end in zip(LEVELS, ends, strict=True)
    )


def split_start(index: int) -> int:
    """First token of a split."""
    begun = 0
    for (first, size), (end, _) in zip(LEVELS, LEVELS[1:], strict=False):
        level = (end - first) // size
        if index < begun + level:
            return first + (index - begun) * size
        begun += level
    first, size = LEVELS[-1]
    return first + (index - begun) * size
