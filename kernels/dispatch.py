# SPDX-License-Identifier: Apache-2.0
"""Which backend runs each operator: the one table, and the choice made from it."""

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from .cpu import library
from .kv4_store.layout import HEAD_DIMS
from .packing import PACKABLE_BITS

Case = dict[str, Any]


@dataclass(frozen=True)
class Row:
    """One implementation of one operator.

    Attributes:
        operator: name of the operator, a folder of this package.
        backend: ``cpu`` (compiled for the instruction sets of CPUs), ``triton``
            (compiled for the GPU at hand, see ``gpu/configs.py``), ``blas`` (the GPU's
            library) or ``generic`` (plain torch).
        devices: torch device types it runs on.
        refuse: says why it cannot run a case, or None when it can.
    """

    operator: str
    backend: str
    devices: tuple[str, ...]
    refuse: Callable[[Case], str | None]

    def reason_against(self, device: str, case: Case) -> str | None:
        """Why this row is out for a case on a device type, or None."""
        if device not in self.devices:
            return f"runs on {', '.join(self.devices)}, not on {device}"
        return self.refuse(case)


def _any(case: Case) -> None:
    return None


def _compiled(refuse: Callable[[Case], str | None]) -> Callable[[Case], str | None]:
    """Also refuse where the compiled kernels are missing."""
    return lambda case: library.missing() or refuse(case)


def _triton(refuse: Callable[[Case], str | None]) -> Callable[[Case], str | None]:
    """Also refuse where Triton is missing."""
    missing = "triton is not installed"
    found = importlib.util.find_spec("triton") is not None
    return lambda case: refuse(case) if found else missing


def _weight_bits(case: Case) -> str | None:
    bits = case.get("weight_bits", 4)
    if bits in PACKABLE_BITS:
        return None
    return f"weight_bits must be one of {PACKABLE_BITS}, got {bits}"


def _integer_bits(case: Case) -> str | None:
    bits = case.get("activation_bits", 4)
    if not 2 <= bits <= 8:
        return f"activation_bits must be 2 to 8, got {bits}"
    return _weight_bits(case)


def _expert_bits(case: Case) -> str | None:
    weight_only = case.get("activation_bits", 4) == 16
    return _weight_bits(case) if weight_only else _integer_bits(case)


def _head_dim(case: Case) -> str | None:
    head_dim = case.get("head_dim", 128)
    if head_dim in HEAD_DIMS:
        return None
    return f"head_dim must be one of {HEAD_DIMS}, got {head_dim}"


# In order of preference: the first row that does not refuse is taken.
TABLE: tuple[Row, ...] = (
    Row("hadamard", "cpu", ("cpu",), _compiled(_any)),
    Row("hadamard", "triton", ("cuda",), _triton(_any)),
    Row("hadamard", "generic", ("cpu",), _any),
    Row("hadamard_quantize", "cpu", ("cpu",), _compiled(_integer_bits)),
    Row("hadamard_quantize", "triton", ("cuda",), _triton(_integer_bits)),
    Row("hadamard_quantize", "generic", ("cpu",), _integer_bits),
    Row("linear_w4a4", "cpu", ("cpu",), _compiled(_integer_bits)),
    Row("linear_w4a4", "triton", ("cuda",), _triton(_integer_bits)),
    Row("linear_w4a4", "generic", ("cpu",), _integer_bits),
    Row("linear_wna16", "cpu", ("cpu",), _compiled(_weight_bits)),
    Row("linear_wna16", "triton", ("cuda",), _triton(_weight_bits)),
    Row("linear_wna16", "generic", ("cpu",), _weight_bits),
    Row("linear_experts", "cpu", ("cpu",), _compiled(_expert_bits)),
    Row("linear_experts", "triton", ("cuda",), _triton(_expert_bits)),
    Row("linear_experts", "generic", ("cpu",), _expert_bits),
    Row("linear_tiled", "cpu", ("cpu",), _compiled(_any)),
    Row("linear_tiled", "blas", ("cuda",), _any),
    Row("linear_tiled", "generic", ("cpu",), _any),
    Row("quantize_weight", "cpu", ("cpu",), _compiled(_any)),
    Row("quantize_weight", "generic", ("cpu", "cuda"), _any),
    Row("kv4_store", "cpu", ("cpu",), _compiled(_head_dim)),
    Row("kv4_store", "triton", ("cuda",), _triton(_head_dim)),
    Row("kv4_store", "generic", ("cpu",), _head_dim),
    Row("rope_kv4_store", "triton", ("cuda",), _triton(_head_dim)),
    Row("rope_kv4_store", "generic", ("cpu",), _head_dim),
    Row("kv4_attention", "cpu", ("cpu",), _compiled(_head_dim)),
    Row("kv4_attention", "triton", ("cuda",), _triton(_head_dim)),
    Row("kv4_attention", "generic", ("cpu",), _head_dim),
)
OPERATORS = tuple(dict.fromkeys(row.operator for row in TABLE))


def select(operator: str, device: str, **case: Any) -> Row:
    """The row that runs an operator.

    Args:
        operator: one of OPERATORS.
        device: torch device type, ``cpu`` or ``cuda``.
        case: what the layer needs (``weight_bits``, ``activation_bits``,
            ``head_dim``).

    Raises:
        ValueError: when no backend runs the case; the message gives each reason.
    """
    reasons = []
    for row in TABLE:
        if row.operator == operator:
            reason = row.reason_against(device, case)
            if reason is None:
                return row
            reasons.append(f"{row.backend}: {reason}")
    raise ValueError(
        f"no backend runs {operator} on {device}: "
        + ("; ".join(reasons) or f"unknown operator, known: {', '.join(OPERATORS)}")
    )
