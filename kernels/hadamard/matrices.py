# SPDX-License-Identifier: Apache-2.0
"""Hadamard matrices of order K x 2^p, and which orders and blocks exist.

``H_n = H_K (x) H_(2^p)`` with ``2^p`` by Sylvester's doubling and ``K`` by Paley's
constructions (R. E. A. C. Paley, On Orthogonal Matrices, 1933). The cores that
need a search (92, 116, 156, 172, 188, 236) are read from the tables of the
``compressed-tensors`` package, which vLLM installs.
"""

import functools
import importlib.util
from collections.abc import Callable
from pathlib import Path

import torch

# Cores are 4 times an odd number; every one up to 252 is here.
_PALEY_1 = (12, 20, 28, 44, 60, 68, 84, 108, 132, 140, 164, 180, 212, 228, 252)
_PALEY_2 = (36, 52, 76, 100, 124, 148, 196, 204, 220, 244, 924)
_TABLES = (92, 116, 156, 172, 188, 236)
CORES = tuple(sorted(_PALEY_1 + _PALEY_2 + _TABLES))


@functools.cache
def factor(order: int) -> tuple[int, int]:
    """Split an order into its core K and power of two: ``order = K * 2^p``.

    K is 1 when the order itself is a power of two.

    Raises:
        ValueError: when no Hadamard matrix of this order is known here.
    """
    if order < 1:
        raise ValueError(f"Hadamard order must be positive, got {order}")
    odd = order
    while odd % 2 == 0:
        odd //= 2
    if odd == 1:
        return 1, order
    core = 4 * odd
    if order % core == 0 and core in CORES:
        return core, order // core
    raise ValueError(
        f"no Hadamard matrix of order {order} (odd part {odd}); known cores: "
        + ", ".join(map(str, CORES))
    )


def exists(order: int) -> bool:
    """Whether :func:`matrix` can build this order."""
    try:
        factor(order)
    except ValueError:
        return False
    return True


@functools.cache
def largest_order(size: int) -> int:
    """Largest known order that divides ``size`` (1 when there is none)."""
    return max(d for d in range(1, size + 1) if size % d == 0 and exists(d))


@functools.cache
def core_matrix(core: int) -> torch.Tensor:
    """The ``[core, core]`` matrix of +1 and -1 (int8) for a core of CORES, or 1.

    Raises:
        ValueError: when the core is not known, or compressed-tensors is missing.
    """
    # What is cached must not depend on the default device of the first caller.
    with torch.device("cpu"):
        if core == 1:
            return torch.ones(1, 1, dtype=torch.int8)
        if core in _PALEY_1:
            return _paley_1(core - 1)
        if core in _PALEY_2:
            return _paley_2(core // 2 - 1)
        if core in _TABLES:
            return _from_tables(core)
    raise ValueError(f"no Hadamard core of order {core}")


@functools.cache
def matrix(order: int) -> torch.Tensor:
    """The unnormalised ``[order, order]`` Hadamard matrix, int8."""
    core, power = factor(order)
    h = core_matrix(core)
    sylvester = torch.ones(1, 1, dtype=torch.int8, device="cpu")
    doubling = torch.tensor([[1, 1], [1, -1]], dtype=torch.int8, device="cpu")
    while sylvester.shape[0] < power:
        sylvester = torch.kron(doubling, sylvester)
    return torch.kron(h, sylvester)


def _paley_1(q: int) -> torch.Tensor:
    """Order q + 1 for a prime power q = 3 mod 4."""
    n = q + 1
    skew = torch.zeros(n, n, dtype=torch.int8)
    skew[0, 1:], skew[1:, 0] = 1, -1
    skew[1:, 1:] = _jacobsthal(q)
    return skew + torch.eye(n, dtype=torch.int8)


def _paley_2(q: int) -> torch.Tensor:
    """Order 2 (q + 1) for a prime power q = 1 mod 4."""
    n = q + 1
    conference = torch.zeros(n, n, dtype=torch.int8)
    conference[0, 1:], conference[1:, 0] = 1, 1
    conference[1:, 1:] = _jacobsthal(q)
    plus = torch.tensor([[1, 1], [1, -1]], dtype=torch.int8)
    diagonal = torch.tensor([[1, -1], [-1, -1]], dtype=torch.int8)
    return torch.kron(conference, plus) + torch.kron(
        torch.eye(n, dtype=torch.int8), diagonal
    )


def _jacobsthal(q: int) -> torch.Tensor:
    """``Q[i, j]`` = quadratic character of element i minus element j of GF(q)."""
    subtract, multiply = _field(q)
    squares = {multiply(a, a) for a in range(1, q)}
    character = [0] + [1 if a in squares else -1 for a in range(1, q)]
    rows = [[character[subtract(i, j)] for j in range(q)] for i in range(q)]
    return torch.tensor(rows, dtype=torch.int8)


def _field(
    q: int,
) -> tuple[Callable[[int, int], int], Callable[[int, int], int]]:
    """Subtraction and multiplication of GF(q), elements as integers in base p."""
    p = next(d for d in range(2, q + 1) if q % d == 0)
    degree = 0
    while p**degree < q:
        degree += 1
    if degree == 1:
        return (lambda a, b: (a - b) % q), (lambda a, b: a * b % q)
    modulus = _irreducible(p, degree)

    def digits(a: int) -> list[int]:
        return [a // p**i % p for i in range(degree)]

    def number(d: list[int]) -> int:
        return sum(c % p * p**i for i, c in enumerate(d))

    def subtract(a: int, b: int) -> int:
        return number([x - y for x, y in zip(digits(a), digits(b), strict=True)])

    def multiply(a: int, b: int) -> int:
        product = [0] * (2 * degree - 1)
        for i, x in enumerate(digits(a)):
            for j, y in enumerate(digits(b)):
                product[i + j] += x * y
        for i in range(2 * degree - 2, degree - 1, -1):
            for j in range(degree + 1):
                product[i - degree + j] -= product[i] * modulus[j] if j < degree else 0
        return number(product[:degree])

    return subtract, multiply


def _irreducible(p: int, degree: int) -> list[int]:
    """Low coefficients of a monic polynomial of degree 2 or 3 without a root."""
    for value in range(p**degree):
        low = [value // p**i % p for i in range(degree)]
        if all(
            (x**degree + sum(c * x**i for i, c in enumerate(low))) % p for x in range(p)
        ):
            return low
    raise ValueError(f"no irreducible polynomial of degree {degree} over GF({p})")


def _from_tables(core: int) -> torch.Tensor:
    spec = importlib.util.find_spec("compressed_tensors")
    if spec is None or spec.origin is None:
        raise ValueError(
            f"the Hadamard core of order {core} is a table of the compressed-tensors "
            "package, which is not installed (pip install compressed-tensors)"
        )
    from safetensors import safe_open

    table = Path(spec.origin).parent / "transform" / "utils" / "hadamards.safetensors"
    with safe_open(table, framework="pt") as file:
        return file.get_tensor(str(core)).to(torch.int8)
