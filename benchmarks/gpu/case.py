# SPDX-License-Identifier: Apache-2.0
"""What a module of an operator contributes."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import torch

Result = TypeVar("Result", torch.Tensor, Sequence[torch.Tensor])


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
Count = Callable[[int], int]
Calls = list[Callable[[], object]]
Prepare = Callable[[Count], Calls]


@dataclass(frozen=True)
class Arm:
    """One way to solve the problem of a row.

    Attributes:
        prepare: see above.
        moved: bytes that it has to move, for its share of copy bandwidth; 0 for none.
        baseline: speed-ups are against the fastest arm of these.
        spare: a baseline that is timed only where no other one reaches
            SPARE_BELOW of copy bandwidth.
        other: a library's, neither the operator nor what it is compared with.
        integer: whether its products are for the int8 peak.
    """

    prepare: Prepare
    moved: int = 0
    baseline: bool = False
    spare: bool = False
    other: bool = False
    integer: bool = False

    @property
    def own(self) -> bool:
        """Whether it is the operator's."""
        return not (self.baseline or self.other)


SPARE_BELOW = 0.75


@dataclass(frozen=True)
class Row:
    """One problem, timed in several arms.

    Attributes:
        operator: folder of ``kernels/``; not timed when one of its checks fails.
        name: of the problem.
        sizes: of the problem (``m``, ``n``, ``k``).
        arms: by name, the operator's own first.
        operations: of its matrix products, for a share of the int8 peak; or 0.
        needs: other operators that an arm calls.
        aims: speed-ups that arms should have. Rows with aims are timed first.
    """

    operator: str
    name: str
    sizes: dict[str, int]
    arms: dict[str, Arm]
    operations: int = 0
    needs: tuple[str, ...] = ()
    aims: dict[str, float] = field(default_factory=dict)


def same_twice(call: Callable[[], Result]) -> Result:
    """The result of a call, once a second one has given the same bits.

    Raises:
        RuntimeError: when it has not.
    """
    first, second = call(), call()
    pairs = [(first, second)]
    if not isinstance(first, torch.Tensor):
        pairs = list(zip(first, second, strict=True))
    for a, b in pairs:
        if not torch.equal(*(t.contiguous().view(torch.uint8) for t in (a, b))):
            raise RuntimeError("two runs differ")
    return first
