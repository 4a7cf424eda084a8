# SPDX-License-Identifier: Apache-2.0
"""What a lowbit checkpoint is: its scheme, rotations and sizes, from headers alone.

``dataclasses.asdict`` of an :class:`Inspection` is what ``vllm-lowbit inspect --json``
prints; its keys stay as they are documented here.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from .architecture import ModelShape
from .errors import CheckpointError
from .kernels.kv4_store.layout import bytes_per_token
from .lowbit_checkpoint import read_config
from .manifest import StoredTensor, require_headers
from .module_names import FUSED, INPUTS, ROLES
from .placement import check_scheme
from .schema import LowbitConfig, Rotation

BF16_BYTES = 2


@dataclass(frozen=True)
class Linear:
    """How one class of linears is quantized.

    Attributes:
        weight_bits: of a code.
        weight_symmetric: False where weights have zero points.
        group_size: inputs that share a scale; None is one scale per output channel.
        activation_bits: of the input's codes, 16 where it is not quantized.
        activation_symmetric: False where the input has zero points.
        activation_group_size: elements of a token's input that share a scale and zero
            point; None where all of them do.
        activation_clip_ratio: fraction of a range that is kept; a list of one for
            every layer where they have their own.
        online_rotation: name of the rotation the server applies to the input, or None.
    """

    weight_bits: int
    weight_symmetric: bool
    group_size: int | None
    activation_bits: int
    activation_symmetric: bool
    activation_group_size: int | None
    activation_clip_ratio: float | tuple[float, ...]
    online_rotation: str | None


@dataclass(frozen=True)
class VocabularyMatrix:
    """Embedding and head.

    Attributes:
        bits: 8, symmetric with a scale per row; 16, not quantized.
        embedding_dtype: as safetensors names it, such as ``I32`` of packed codes.
        head_dtype: likewise.
        tied: whether both are one matrix.
    """

    bits: int
    embedding_dtype: str
    head_dtype: str
    tied: bool


@dataclass(frozen=True)
class Attention:
    """The KV cache.

    Attributes:
        kv_bits: of an entry, 16 where it is not quantized.
        key_rotation: ``online``, or None.
        value_rotation: ``folded``, or None.
    """

    kv_bits: int
    key_rotation: str | None
    value_rotation: str | None


@dataclass(frozen=True)
class BitsPerWeight:
    """Stored bits per weight of the model.

    Attributes:
        linears: codes, scales and zero points of the quantized linears, over the
            number of their weights.
        model: every tensor, over the number of the model's parameters.
    """

    linears: float
    model: float


@dataclass(frozen=True)
class Size:
    """Bytes of something, and of the same in bfloat16; ``ratio`` is their quotient."""

    bytes: int
    bf16_bytes: int
    ratio: float


@dataclass(frozen=True)
class Inspection:
    """A lowbit checkpoint.

    Attributes:
        checkpoint: its directory.
        provenance: ``base_model``, ``base_revision`` (None for one that is not of a
            hub), ``recipe`` and ``recipe_sha256``; None where it is not known.
        scheme: name, such as ``w4a4kv4``.
        linears: by class: ``qkv_proj``, ``o_proj``, ``gate_up_proj`` (``up_proj``
            without a gate), ``down_proj``.
        vocabulary: embedding and head.
        attention: the KV cache.
        rotations: by name; keys and values as in ``quantization_config``.
        max_tensor_parallel_size: largest tensor parallel size.
        bits_per_weight: stored bits per weight.
        kv_token: bytes of KV cache of one token in all layers.
        weight_files: bytes of the safetensors files, by name.
        weights: bytes of them all; in bfloat16 those of the tensors' data.
    """

    checkpoint: str
    provenance: dict[str, str | None] | None
    scheme: str
    linears: dict[str, Linear]
    vocabulary: VocabularyMatrix
    attention: Attention
    rotations: dict[str, dict[str, Any]]
    max_tensor_parallel_size: int
    bits_per_weight: BitsPerWeight
    kv_token: Size
    weight_files: dict[str, int]
    weights: Size


def read_checkpoint(directory: Path) -> tuple[ModelShape, LowbitConfig]:
    """Sizes of a lowbit checkpoint's model, and its quantization.

    Raises:
        CheckpointError: when the directory is no lowbit checkpoint.
        ConfigError, UnsupportedError: for a config.json that cannot be.
    """
    if not directory.is_dir():
        what = "is not a directory" if directory.exists() else "does not exist"
        raise CheckpointError(f"{directory} {what}; a lowbit checkpoint is a directory")
    data, config = read_config(str(directory))
    source = str(directory / "config.json")
    if config is None:
        raise CheckpointError(
            f"{source} has no quantization_config: this is a plain checkpoint, not a "
            "lowbit one"
        )
    shape = ModelShape.from_config(data, source)
    check_scheme(shape, config.scheme, source)
    return shape, config


def inspect(directory: Path) -> Inspection:
    """Describe a lowbit checkpoint; reads no tensor's data.

    Args:
        directory: of the checkpoint.

    Raises:
        CheckpointError: for another kind of checkpoint, or one whose files, manifest
            and model do not fit together; names the first such tensor or file.
        ConfigError, UnsupportedError: as :func:`read_checkpoint`.
    """
    shape, config = read_checkpoint(directory)
    stored = require_headers(directory, shape, config)
    files = sorted({tensor.file for tensor in stored.values()})
    sizes = {file: (directory / file).stat().st_size for file in files}
    parameters = sum(prod(size) for size in shape.tensors().values())
    return Inspection(
        checkpoint=str(directory),
        provenance=config.provenance.model_dump() if config.provenance else None,
        scheme=config.scheme.name,
        linears={
            name: _linear(config, name)
            for name in ("qkv_proj", "o_proj", shape.mlp_input, "down_proj")
        },
        vocabulary=_vocabulary(shape, config, stored),
        attention=_attention(config),
        rotations={
            name: rotation.model_dump()
            for name, rotation in config.rotations
            if isinstance(rotation, Rotation)
        },
        max_tensor_parallel_size=config.rotations.max_tensor_parallel_size,
        bits_per_weight=_bits_per_weight(shape, stored, parameters),
        kv_token=_kv_token(shape, config.scheme.kv_cache.bits),
        weight_files=sizes,
        weights=_size(sum(sizes.values()), BF16_BYTES * parameters),
    )


def _linear(config: LowbitConfig, name: str) -> Linear:
    scheme, rotation = config.scheme, INPUTS[name]
    kept = scheme.activations.kept(rotation)
    return Linear(
        weight_bits=scheme.weights.bits,
        weight_symmetric=scheme.weights.symmetric,
        group_size=scheme.weights.group_size,
        activation_bits=scheme.activations.bits,
        activation_symmetric=scheme.activations.symmetric,
        activation_group_size=scheme.activations.group_size,
        activation_clip_ratio=kept if scheme.activations.clip_ratios else kept[0],
        online_rotation=rotation if getattr(config.rotations, rotation) else None,
    )


def _vocabulary(
    shape: ModelShape, config: LowbitConfig, stored: Mapping[str, StoredTensor]
) -> VocabularyMatrix:
    suffix = "weight" if config.scheme.vocab_bits == 16 else "weight_packed"
    embedding = stored[shape.names.stored(f"model.embed_tokens.{suffix}")].dtype
    tied = shape.tie_word_embeddings
    return VocabularyMatrix(
        bits=config.scheme.vocab_bits,
        embedding_dtype=embedding,
        head_dtype=embedding if tied else stored[f"lm_head.{suffix}"].dtype,
        tied=tied,
    )


def _attention(config: LowbitConfig) -> Attention:
    k, v = config.rotations.k, config.rotations.v
    return Attention(
        kv_bits=config.scheme.kv_cache.bits,
        key_rotation=k.apply if k else None,
        value_rotation=v.apply if v else None,
    )


def _bits_per_weight(
    shape: ModelShape, stored: Mapping[str, StoredTensor], parameters: int
) -> BitsPerWeight:

    def of_linear(name: str) -> bool:
        module, _, kind = name.rpartition(".")
        role = module.rpartition(".")[2]
        return (role in ROLES or role in FUSED) and kind != "bias"

    plain, here = shape.tensors(), shape.names.here
    weights = sum(prod(size) for name, size in plain.items() if of_linear(name))
    linears = sum(t.num_bytes for name, t in stored.items() if of_linear(here(name)))
    model = sum(tensor.num_bytes for tensor in stored.values())
    return BitsPerWeight(8 * linears / weights, 8 * model / parameters)


def _kv_token(shape: ModelShape, bits: int) -> Size:
    heads = shape.num_layers * shape.num_kv_heads
    bf16 = heads * 2 * shape.head_dim * BF16_BYTES
    stored = bf16 if bits == 16 else heads * bytes_per_token(shape.head_dim)
    return _size(stored, bf16)


def _size(stored: int, bf16: int) -> Size:
    return Size(stored, bf16, stored / bf16)
