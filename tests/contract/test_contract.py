# SPDX-License-Identifier: Apache-2.0
"""What we need of vLLM's private symbols, against the ledger PRIVATE_SYMBOLS.md."""

from types import SimpleNamespace
from typing import Any

import pytest

from vllm_lowbit.errors import CheckpointError

pytest.importorskip("vllm")
from . import attention, engine, experts, loading, vocabulary  # noqa: F401 (they register their rows)
from .loading import gate_up
from .rows import CONTRACT


def test_every_row_has_an_assertion(ledger: dict[str, set[str]]) -> None:
    names = [symbol.rpartition(".")[2] for symbol in ledger]
    assert sorted(names) == sorted(CONTRACT)


@pytest.mark.parametrize("symbol", sorted(CONTRACT))
def test_symbol(symbol: str, real: SimpleNamespace) -> None:
    CONTRACT[symbol](real.named(symbol), real)


def test_non_finite_part_of_a_fused_linear_is_named(real: Any) -> None:
    message = "^tensor layers.0.mlp.up_proj.weight holds a non-finite value"
    with pytest.raises(CheckpointError, match=message):
        gate_up(real, 2, last=float("nan"))
