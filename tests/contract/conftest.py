# SPDX-License-Identifier: Apache-2.0
"""Real vLLM objects, which all rows share."""

from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest

# Not test files, but their assertions tell as much when they fail.
for _subject in ("attention", "engine", "experts", "loading", "rows", "vocabulary"):
    pytest.register_assert_rewrite(f"{__package__}.{_subject}")


@pytest.fixture(scope="module")
def real(
    engine_config: Callable[..., Any], ledger: dict[str, set[str]], resolve: Any
) -> Iterator[SimpleNamespace]:
    """Real vLLM objects for ref-7m: config, a stock and a 4-bit attention layer."""
    from vllm.config import set_current_vllm_config
    from vllm.model_executor.layers.attention import Attention

    config = engine_config()
    full = {symbol.rpartition(".")[2]: symbol for symbol in ledger}
    with set_current_vllm_config(config):
        sizes = (4, 64, 0.125, 2)
        yield SimpleNamespace(
            rows={name: ledger[symbol] for name, symbol in full.items()},
            named=lambda name: resolve(full[name]),
            resolve=resolve,
            config=config,
            quant=config.quant_config,
            stock=Attention(*sizes, prefix="layers.0.attn"),
            kv4=Attention(
                *sizes, prefix="layers.1.attn", quant_config=config.quant_config
            ),
        )
