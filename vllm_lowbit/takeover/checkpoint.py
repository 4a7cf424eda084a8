# SPDX-License-Identifier: Apache-2.0
"""Finding out what a checkpoint is, and checking that its files hold just that."""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from ..architecture import ModelShape
from ..checkpoint import FLOATS, TensorSpec, check_tensors, may_be_there
from ..errors import ConfigError, UnsupportedError
from ..lowbit_checkpoint import quantization_of, read_model_config
from ..schema import LowbitConfig
from . import awq, compressed_tensors, gptq
from .foreign import ROLES, ForeignFormat

_FORMATS: dict[str, type[ForeignFormat]] = {
    compressed_tensors.METHOD: compressed_tensors.CompressedTensors,
    gptq.METHOD: gptq.Gptq,
    awq.METHOD: awq.Awq,
}


def parse(config: Mapping[str, Any], source: str) -> ForeignFormat:
    """The format of another tool's quantization_config.

    Args:
        config: as in config.json.
        source: file and key named in errors.

    Raises:
        ConfigError: for a method that is not supported, or naming every key that is
            not.
    """
    method = str(config.get("quant_method", "")).lower().replace("_", "-")
    if method not in _FORMATS:
        raise ConfigError(
            f"{source}: key quant_method: the checkpoint is already quantized by "
            f"{config.get('quant_method')!r}; supported: lowbit, {', '.join(_FORMATS)} "
            "and checkpoints that are not quantized"
        )
    return _FORMATS[method].parse({**config, "quant_method": method}, source)


def read_quantization(
    model: str,
) -> tuple[dict[str, Any], LowbitConfig | ForeignFormat | None]:
    """config.json of a local model, and how it is quantized: None is not at all.

    Raises:
        ConfigError: when it is not a JSON object, or the quantization is not supported.
    """
    config, source = read_model_config(model), str(Path(model) / "config.json")
    quantization = config.get("quantization_config")
    if not isinstance(quantization, Mapping):
        return config, quantization_of(config, source)
    if quantization.get("quant_method") == "lowbit":
        return config, quantization_of(config, source)
    return config, parse(quantization, f"{source}: quantization_config")


def expected_tensors(
    shape: ModelShape, foreign: ForeignFormat
) -> dict[str, TensorSpec]:
    """Every tensor a checkpoint of this model must, or may, hold.

    Raises:
        UnsupportedError: where a linear cuts through a packed word.
    """
    plain = {
        name: TensorSpec(FLOATS, size, unseen=shape.is_stock(name))
        for name, size in shape.tensors().items()
    }
    tensors: dict[str, TensorSpec] = {}
    for name, spec in plain.items():
        module, _, kind = name.rpartition(".")
        if kind != "weight" or module.rpartition(".")[2] not in ROLES:
            tensors[name] = spec
            continue
        n, k = spec.shape
        foreign.check_packing(module, n, k)
        for kind, layout in foreign.layouts(n, k).items():
            tensors[f"{module}.{kind}"] = TensorSpec(layout.dtypes, layout.shape)
        for kind, fact in foreign.facts(n, k).items():
            if f"{module}.{kind}" not in plain:
                tensors[f"{module}.{kind}"] = fact
    return tensors


def check_foreign_checkpoint(
    model: str, shape: ModelShape, foreign: ForeignFormat
) -> None:
    """Check that the files of a checkpoint hold exactly what its config says.

    Raises:
        CheckpointError: as :func:`~vllm_lowbit.checkpoint.check_tensors`. A head that
            repeats a tied embedding, and rotary buffers, may be there.
        UnsupportedError: where a linear cuts through a packed word, or the model has
            stacked ones.
    """
    if shape.architecture.fused:
        raise UnsupportedError(
            f"{model}/config.json: {foreign.name} checkpoints of "
            f"{shape.architecture.name} are not supported: their linears are stacked "
            "in the files; supported: plain and lowbit ones"
        )
    expected = expected_tensors(shape, foreign)
    check_tensors(Path(model), expected, partial(may_be_there, shape))
