# SPDX-License-Identifier: Apache-2.0
"""What a module of an operator contributes."""

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Check:
    """One comparison of an operator with its reference on the device.

    Attributes:
        operator: folder of ``kernels/``.
        name: what tells it from the operator's others.
        run: returns what is wrong, or None.
    """

    operator: str
    name: str
    run: Callable[[], str | None]


# Prepares copies of an arm's operands and returns one call per copy. The argument says,
# from the bytes of one, how many it takes to exceed the cache.
Prepare = Callable[[Callable[[int], int]], list[Callable[[], object]]]


@dataclass(frozen=True)
class Row:
    """One problem, timed in several arms.

    Attributes:
        operator: folder of ``kernels/``; not timed when one of its checks fails.
        name: of the problem.
        sizes: of the problem (``m``, ``n``, ``k``).
        arms: by name, the operator's own first.
        baseline: the arm that speed-ups are against.
        moved: bytes that the operator has to move, for its share of copy bandwidth.
        operations: of its matrix products, for its share of the int8 peak; or 0.
        needs: other operators that an arm calls.
    """

    operator: str
    name: str
    sizes: dict[str, int]
    arms: dict[str, Prepare]
    baseline: str
    moved: int
    operations: int = 0
    needs: tuple[str, ...] = ()
