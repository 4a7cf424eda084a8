# SPDX-License-Identifier: Apache-2.0
"""Rows of loading: files, names, linears quantized while they load."""

import inspect
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch

from vllm_lowbit.errors import CheckpointError

from .rows import holds

LOADER = "vllm.model_executor.model_loader.default_loader.DefaultModelLoader"


@holds("_prepare_weights")
def _(symbol: Any, real: Any) -> None:
    config = real.resolve("vllm.config.load.LoadConfig")()
    loader = real.resolve(LOADER)(config)
    config.load_format = "safetensors"  # as we do it, after the loader is built
    with tempfile.TemporaryDirectory() as directory:
        for name in ("model.safetensors", "pytorch_model.bin", "model.pt"):
            (Path(directory) / name).touch()
        files = symbol(loader, directory, None, None, True, None)[1]
        assert files == [f"{directory}/model.safetensors"]
        Path(files[0]).unlink()
        with pytest.raises(RuntimeError, match="Cannot find any model weights"):
            symbol(loader, directory, None, None, True, None)


def gate_up(real: Any, parts: int, last: float = 1.0, bias: bool = False) -> Any:
    """A fused linear with its first parts loaded through vLLM's loader.

    Each part's bias comes before its weight, as names are ordered in files.
    """
    from vllm.model_executor.layers.linear import MergedColumnParallelLinear

    layer = MergedColumnParallelLinear(
        256,
        [32, 32],
        bias=bias,
        quant_config=real.quant,
        prefix="layers.0.mlp.gate_up_proj",
        disable_tp=True,
        params_dtype=torch.bfloat16,
    )
    for part in range(parts):
        if bias:
            part_bias = torch.full((32,), 1.0 + part, dtype=torch.bfloat16)
            layer.bias.weight_loader(layer.bias, part_bias, part)
        rows = torch.ones(32, 256, dtype=torch.bfloat16)
        rows[-1, -1] = last if part == 1 else 1.0
        layer.weight.weight_loader(layer.weight, rows, part)
    return layer


@holds("initialize_online_processing")
def _(symbol: Any, real: Any) -> None:
    assert gate_up(real, 0).weight.is_meta
    assert gate_up(real, 1).weight.is_meta
    assert gate_up(real, 2).weight.dtype in (torch.int8, torch.uint8)


@holds("get_layerwise_info")
def _(symbol: Any, real: Any) -> None:
    assert type(symbol(gate_up(real, 0))) is real.named("LayerReloadingInfo")


@holds("LayerReloadingInfo")
def _(symbol: Any, real: Any) -> None:
    info = real.named("get_layerwise_info")(gate_up(real, 1))
    assert (info.load_numel, info.load_numel_total) == (32 * 256, 2 * 32 * 256)


@holds("finalize_layerwise_processing")
def _(symbol: Any, real: Any) -> None:
    message = "linear layers.0.mlp.gate_up_proj: only 8192 of 16384 elements"
    with pytest.raises(CheckpointError, match=message):
        symbol(gate_up(real, 1), real.config.model_config)


@holds("LinearBase")
def _(symbol: Any, real: Any) -> None:
    layer = gate_up(real, 2)
    assert isinstance(layer, symbol) and layer.bias is None
    codes = layer.weight
    layer.quant_method.process_weights_after_loading(layer)  # as the loader does
    assert layer.weight is codes
    assert gate_up(real, 1, bias=True).weight.is_meta
    biased = gate_up(real, 2, bias=True)
    assert not biased.weight.is_meta
    assert biased.bias.tolist() == [1.0] * 32 + [2.0] * 32


@holds("QKVParallelLinear")
def _(symbol: Any, real: Any) -> None:
    """How it cuts is tested with the layers, tests/takeover/test_layers.py."""
    newer = real.resolve("vllm.model_executor.layers.linear.WEIGHT_LOADER_V2_SUPPORTED")
    assert "TakeoverLinearMethod" not in newer
    for name in ("input_dim", "output_dim", "packed_dim", "packed_factor"):
        loaders = [symbol.weight_loader]
        if name == "input_dim":
            row = "vllm.model_executor.layers.linear.RowParallelLinear.weight_loader"
            loaders = [real.resolve(row)]
        assert name in inspect.getsource(loaders[0])


@holds("AutoWeightsLoader")
def _(symbol: Any, real: Any) -> None:
    model = torch.nn.Module()
    model.quant_config, model.linear = real.quant, torch.nn.Linear(2, 2, bias=False)
    names = ("g_idx", "weight_shape", "bias", "weight")
    loaded = symbol(model).load_weights(
        (f"linear.{name}", torch.ones(2, 2)) for name in names
    )
    assert loaded == {"linear.weight"}


@holds("WeightsMapper")
def _(symbol: Any, real: Any) -> None:
    assert isinstance(real.quant.get_checkpoint_weight_mapper(), symbol)
