# SPDX-License-Identifier: Apache-2.0
"""The lowbit checkpoint format: which tensors there are, and reading one weight.

Beside the files of any Hugging Face checkpoint (config.json, tokenizer, safetensors
shards) a lowbit one has ``lowbit_manifest.json``, which says what every tensor and
every key of config.json was, and ``recipe.yaml``. Tensors keep the names of the model
they were made from, except that stacked linears (``qkv_proj``, ``gate_up_proj``, not
GPT-2's ``c_attn``) are split into ``q_proj``, ``k_proj`` and so on, and that a
quantized matrix ``X.weight`` is

* ``X.weight_packed``: int32, codes as in ``kernels/packing.py``;
* ``X.weight_scale``: float32 ``[n, groups]``;
* ``X.weight_zero_point``: int8 ``[n, groups]``, asymmetric weights only.

All transforms are folded in. Norms, biases, routers and a 16-bit vocabulary keep the
dtype of the base model. Where the residual rotation is online (tied embeddings) the
final norm's weight is 1, and what it was is ``lm_head.input_scale``, float32
``[hidden]``, applied after the rotation is undone.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .architecture import EMBEDDING, HEAD, ModelShape
from .checkpoint import FLOATS, TensorSpec, read_json
from .errors import CheckpointError, ConfigError
from .kernels.grid import IntGrid
from .kernels.packing import packed_columns, unpack
from .schema import LowbitConfig, Weights

MANIFEST = "lowbit_manifest.json"
RECIPE = "recipe.yaml"
VOCABULARY = Weights(bits=8)
HEAD_SCALE = "lm_head.input_scale"
_BLOCK_ELEMENTS = 1 << 19


def quantized_tensors(
    name: str, n: int, k: int, weights: Weights
) -> dict[str, TensorSpec]:
    """The tensors that hold a quantized matrix ``[n, k]``.

    Args:
        name: of the module, without ``.weight``.
        n: rows (outputs).
        k: columns (inputs).
        weights: its grid.
    """
    groups = 1 if weights.group_size is None else k // weights.group_size
    packed = (n, packed_columns(k, weights.bits))
    tensors = {
        f"{name}.weight_packed": TensorSpec(("I32",), packed),
        f"{name}.weight_scale": TensorSpec(("F32",), (n, groups)),
    }
    if not weights.symmetric:
        tensors[f"{name}.weight_zero_point"] = TensorSpec(("I8",), (n, groups))
    return tensors


def expected_tensors(shape: ModelShape, config: LowbitConfig) -> dict[str, TensorSpec]:
    """Every tensor a lowbit checkpoint of this model must hold, in file order."""
    tensors: dict[str, TensorSpec] = {}
    for name, size in shape.tensors().items():
        vocabulary = name in (EMBEDDING, HEAD)
        stored, rows = shape.in_lowbit(name)
        if rows != slice(None):
            size = (rows.stop, *size[1:])
        stock = shape.is_stock(stored)
        if len(size) == 1 or stock or (vocabulary and config.scheme.vocab_bits == 16):
            tensors[stored] = TensorSpec(FLOATS, size, unseen=stock)
        else:
            grid = VOCABULARY if vocabulary else config.scheme.weights
            module = stored.removesuffix(".weight")
            tensors |= quantized_tensors(module, size[0], size[1], grid)
    if residual_is_online(config):
        tensors[HEAD_SCALE] = TensorSpec(("F32",), (shape.hidden_size,))
    return tensors


def residual_is_online(config: LowbitConfig) -> bool:
    """Whether embedding and head share a matrix that is not rotated."""
    residual = config.rotations.residual
    return residual is not None and residual.apply == "online"


@dataclass(frozen=True)
class PackedWeight:
    """A quantized matrix as the checkpoint stores it; see the module."""

    packed: torch.Tensor
    scale: torch.Tensor
    zero_point: torch.Tensor | None

    def rows(self, rows: slice) -> "PackedWeight":
        """Some of its rows."""
        zero_point = None if self.zero_point is None else self.zero_point[rows]
        return PackedWeight(self.packed[rows], self.scale[rows], zero_point)

    def codes(self, name: str, columns: int, weights: Weights) -> torch.Tensor:
        """int8 codes ``[n, columns]``.

        Args:
            name: of the module, for errors.
            columns: inputs of the matrix.
            weights: its grid.

        Raises:
            CheckpointError: naming the tensor with a code, scale or zero point that
                the grid does not have.
        """
        grid = IntGrid(weights.bits, weights.symmetric)
        codes = self.packed.new_empty(len(self.packed), columns, dtype=torch.int8)
        # A few rows at a time: unpacking takes several times the memory of codes.
        step = max(1, _BLOCK_ELEMENTS // columns)
        for rows, words in zip(codes.split(step), self.packed.split(step), strict=True):
            rows.copy_(unpack(words, weights.bits, columns))
            check_range(f"{name}.weight_packed", "code", rows, grid)
        check_scale(f"{name}.weight_scale", self.scale)
        if self.zero_point is not None:
            check_range(f"{name}.weight_zero_point", "value", self.zero_point, grid)
        return codes


def check_scale(name: str, scale: torch.Tensor) -> None:
    """Raise CheckpointError naming the tensor when a scale cannot be one."""
    # No quantizer makes a subnormal one, and its inverse would be infinite.
    good = scale.isfinite() & (scale.float() >= torch.finfo(torch.float32).tiny)
    if not bool(good.all()):
        worst = float(scale[~good].flatten()[0])
        raise CheckpointError(
            f"tensor {name} holds {worst}; scales are positive, finite and not "
            "subnormal"
        )


def check_range(name: str, what: str, codes: torch.Tensor, grid: IntGrid) -> None:
    """Raise CheckpointError naming the tensor when a code is not on the grid."""
    low, high = (int(value) for value in torch.aminmax(codes))
    if low < grid.code_min or high > grid.code_max:
        worst = low if low < grid.code_min else high
        raise CheckpointError(
            f"tensor {name} holds the {what} {worst}, outside of "
            f"[{grid.code_min}, {grid.code_max}]"
        )


def read_config(model: str) -> tuple[dict[str, Any], LowbitConfig | None]:
    """config.json of a local model, and its quantization if it is a lowbit one.

    Raises:
        ConfigError: when it is not a JSON object, or its quantization is not ours.
    """
    config = read_model_config(model)
    return config, quantization_of(config, str(Path(model) / "config.json"))


def read_model_config(model: str) -> dict[str, Any]:
    """config.json of a local model.

    Raises:
        ConfigError: when it is not a JSON object.
    """
    path = Path(model) / "config.json"
    try:
        config = read_json(path)
    except CheckpointError as error:
        raise ConfigError(str(error)) from None
    if not isinstance(config, dict):
        raise ConfigError(f"{path}: not a JSON object")
    return config


def quantization_of(config: Mapping[str, Any], source: str) -> LowbitConfig | None:
    """The lowbit quantization of a config.json, None for a plain checkpoint.

    Raises:
        ConfigError: for another method's, or one that does not validate.
    """
    quantization = config.get("quantization_config")
    if quantization is None:
        return None
    method = None
    if isinstance(quantization, Mapping):
        method = quantization.get("quant_method")
    if method != "lowbit":
        raise ConfigError(
            f"{source}: the checkpoint is already quantized by {method!r}; supported: "
            "plain bf16/fp16/fp32 checkpoints and lowbit ones"
        )
    return LowbitConfig.parse(quantization, f"{source}: quantization_config")
