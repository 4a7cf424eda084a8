# SPDX-License-Identifier: Apache-2.0
"""Rows of experts and their router."""

import inspect
import typing
from dataclasses import fields
from typing import Any

from vllm_lowbit.parameters import ExpertShard

from .rows import holds, parameters


@holds("UnquantizedLinearMethod")
def _(symbol: Any, real: Any) -> None:
    kind = real.named("GateLinear")
    router = object.__new__(kind)
    assert type(real.quant.get_quant_method(router, "mlp.gate")) is symbol
    asked = f"isinstance(self.quant_method, {symbol.__name__})"
    assert asked in inspect.getsource(kind.__init__)


@holds("GateLinear")
def _(symbol: Any, real: Any) -> None:
    assert issubclass(
        symbol, real.resolve("vllm.model_executor.layers.linear.LinearBase")
    )


@holds("RoutedExperts")
def _(symbol: Any, real: Any) -> None:
    """That it calls our methods as we need is tested with engines, tests/live."""
    assert "is_monolithic" in inspect.getsource(symbol.forward_modular)
    load = parameters(ExpertShard.load)
    source = inspect.getsource(symbol.load_weights)
    assert all(f"{name}=" in source for name in load)


@holds("FusedMoEMethodBase")
def _(symbol: Any, real: Any) -> None:
    assert symbol.__abstractmethods__ == {
        "create_weights",
        "get_fused_moe_quant_config",
    }
    asserted = inspect.getsource(real.named("RoutedExperts")._get_quant_method)
    assert f"isinstance(quant_method, {symbol.__name__})" in asserted


@holds("FusedMoEConfig")
def _(symbol: Any, real: Any) -> None:
    names = {field.name for field in fields(symbol)}
    assert real.rows["FusedMoEConfig"] <= names


@holds("FusedMoEParallelConfig")
def _(symbol: Any, real: Any) -> None:
    names = {field.name for field in fields(symbol)} | set(vars(symbol))
    assert real.rows["FusedMoEParallelConfig"] <= names


@holds("FusedMoEQuantConfig")
def _(symbol: Any, real: Any) -> None:
    base = real.named("FusedMoEMethodBase").get_fused_moe_quant_config
    assert typing.get_type_hints(
        base, {**vars(inspect.getmodule(base)), "RoutedExperts": Any}
    )["return"] == (symbol | None)


@holds("MoEActivation")
def _(symbol: Any, real: Any) -> None:
    assert symbol.from_str("silu") is symbol.SILU
