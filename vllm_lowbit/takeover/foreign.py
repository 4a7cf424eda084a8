# SPDX-License-Identifier: Apache-2.0
"""What the foreign formats have in common: layouts, parsing, checks."""

import re
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from pydantic import ValidationInfo, field_validator, model_validator

from ..architecture import ModelShape
from ..checkpoint import TensorSpec
from ..errors import CheckpointError, UnsupportedError
from ..kernels.grid import IntGrid
from ..kernels.packing import unpack
from ..load_time import QuantizedWeight
from ..module_names import ROLES, ModuleNames
from ..placement import check_scheme
from ..schema import LowbitConfig, Rotations, Scheme, StrictModel

_BLOCK_ELEMENTS = 1 << 19
_LARGEST_PARALLEL = 1024
# Keys of GPTQ and AWQ configs that only say how the codes were found, or how other
# programs are to run them.
HOW_IT_WAS_MADE = (
    "act_group_aware",
    "autoround_version",
    "backend",
    "batch_size",
    "block_name_to_quantize",
    "cache_block_outputs",
    "damp_auto_increment",
    "damp_percent",
    "dataset",
    "disable_exllama",
    "do_fuse",
    "exllama_config",
    "fuse_max_seq_len",
    "max_input_length",
    "meta",
    "model_file_base_name",
    "model_name_or_path",
    "model_seqlen",
    "module_name_preceding_first_block",
    "modules_to_fuse",
    "mse",
    "pad_token_id",
    "static_groups",
    "tokenizer",
    "true_sequential",
    "use_cuda_fp16",
    "use_exllama",
)


@dataclass(frozen=True)
class Layout:
    """One tensor of a quantized linear, and how it is cut into shards.

    Attributes:
        dtypes: it may have, as safetensors names them.
        shape: of it.
        output_dim: dimension along the linear's outputs.
        input_dim: dimension along its inputs, None where every shard needs it whole.
        packed_dim: dimension along which an element holds several codes.
        packed_factor: how many.
    """

    dtypes: tuple[str, ...]
    shape: tuple[int, int]
    output_dim: int
    input_dim: int | None
    packed_dim: int | None = None
    packed_factor: int = 1


@dataclass(frozen=True)
class ForeignFormat(ABC):
    """A checkpoint format of another tool, with the settings of one checkpoint.

    Attributes:
        name: of the format, for logs and metrics.
        scheme: what the checkpoint declares.
    """

    name: str
    scheme: Scheme

    @classmethod
    @abstractmethod
    def parse(cls, data: object, source: str) -> Self:
        """From a quantization_config.

        Raises:
            ConfigError: naming ``source`` and every key that is not supported.
        """

    @property
    def grid(self) -> IntGrid:
        """Of the weights; symmetric ones may use the lowest code, which ours do not."""
        weights = self.scheme.weights
        return IntGrid(weights.bits, weights.symmetric, full_range=weights.symmetric)

    @abstractmethod
    def layouts(self, n: int, k: int) -> dict[str, Layout]:
        """The tensors of a linear ``[n, k]`` by the last part of their names."""

    @abstractmethod
    def convert(
        self, name: str, tensors: Mapping[str, torch.Tensor], n: int, k: int
    ) -> QuantizedWeight:
        """Codes, scales and zero points of a linear ``[n, k]``, or of a shard.

        Args:
            name: of the linear, for errors.
            tensors: those of :meth:`layouts`.
            n: outputs.
            k: inputs.

        Raises:
            CheckpointError: naming the tensor with a value that cannot be.
        """

    def facts(self, n: int, k: int) -> dict[str, TensorSpec]:
        """Tensors beside them that say what is known already; loading skips them."""
        return {}

    def groups(self, k: int) -> int:
        """Number of scales of ``k`` inputs."""
        group_size = self.scheme.weights.group_size
        return 1 if group_size is None else k // group_size

    def zero_point(self, name: str, zero_point: torch.Tensor) -> torch.Tensor | None:
        """The zero points of asymmetric weights; None once symmetric ones are checked.

        Args:
            name: of their tensor.
            zero_point: int8, any shape, shifted as codes are.

        Raises:
            CheckpointError: where the config says symmetric and the tensor does not.
        """
        if not self.scheme.weights.symmetric:
            return zero_point
        off = zero_point[zero_point != 0]
        if off.numel():
            middle = self.grid.offset
            raise CheckpointError(
                f"tensor {name} holds the zero point {int(off[0]) + middle}; "
                f"config.json says that weights are symmetric, which is {middle} "
                "throughout"
            )
        return None

    def check_packing(self, name: str, n: int, k: int) -> None:
        """Raise UnsupportedError where ``[n, k]`` cuts through a packed word."""
        for kind, layout in self.layouts(n, k).items():
            along_outputs = layout.packed_dim == layout.output_dim
            size = n if along_outputs else k
            if layout.packed_dim is not None and size % layout.packed_factor:
                which = "outputs" if along_outputs else "inputs"
                raise UnsupportedError(
                    f"linear {name}: {size} {which} are not a multiple of the "
                    f"{layout.packed_factor} codes packed together in {kind}"
                )

    def resolve(self, shape: ModelShape, source: str) -> LowbitConfig:
        """What the server runs: this scheme, without rotations.

        Raises:
            UnsupportedError: where it does not fit the model's sizes, or the model is
                a mixture of experts or one with other names than Llama's.
        """
        if shape.names != ModuleNames() or shape.num_experts:
            raise UnsupportedError(
                f"{source}: {shape.architecture.name} quantized by {self.name} is not "
                "supported; plain and lowbit checkpoints of it are"
            )
        check_scheme(shape, self.scheme, source)
        # No rotation ties shards together; heads are never cut.
        parallel = min(shape.num_heads, _LARGEST_PARALLEL)
        return LowbitConfig(
            scheme=self.scheme,
            rotations=Rotations(max_tensor_parallel_size=parallel),
        )


class ForeignConfig(StrictModel):
    """Base of the parsed configs: every key is understood, harmless or refused.

    Attributes:
        HARMLESS: keys that say how a checkpoint was made, not what it is.
        REFUSED: keys that would change what is computed, and why they cannot be
            honoured; empty values of them are fine.
    """

    HARMLESS: ClassVar[tuple[str, ...]] = ()
    REFUSED: ClassVar[dict[str, str]] = {}

    @model_validator(mode="before")
    @classmethod
    def _leave_out(cls, data: Any) -> Any:
        if not isinstance(data, Mapping):
            return data
        return {key: value for key, value in data.items() if key not in cls.HARMLESS}

    @field_validator("*", mode="before")
    @classmethod
    def _refuse(cls, value: Any, info: ValidationInfo) -> Any:
        reason = cls.REFUSED.get(str(info.field_name))
        if reason is None or value in (None, False, [], {}):
            return value
        raise ValueError(reason)


def check_ignored(entries: list[str] | None) -> list[str]:
    """Names of modules left unquantized: of the model's linears only the head.

    A list ``ignore`` or ``modules_to_not_convert``, with ``re:`` before patterns.

    Raises:
        ValueError: naming the entry that would leave another linear unquantized.
    """
    for entry in entries or []:
        # Patterns are not run: an unknown file must not choose how long that takes.
        bare = re.fullmatch(r"(re:)?\^?(\.\*)?(.*?)(\.\*)?\$?", entry, re.DOTALL)
        pattern, name = (entry[:3] == "re:"), bare[3] if bare else entry
        linear = name == "Linear" or name.rpartition(".")[2] in ROLES
        if linear or (pattern and name.lstrip("\\.") != "lm_head"):
            raise ValueError(
                f"{entry!r} may leave linears unquantized; of those only lm_head can be"
            )
    return entries or []


def unpack_rows(words: torch.Tensor, bits: int, columns: int) -> torch.Tensor:
    """int8 codes ``[rows, columns]`` of int32 words, a few rows at a time.

    Unpacking takes several times the memory of the codes.
    """
    codes = words.new_empty(len(words), columns, dtype=torch.int8)
    step = max(1, _BLOCK_ELEMENTS // columns)
    for rows, part in zip(codes.split(step), words.split(step), strict=True):
        rows.copy_(unpack(part, bits, columns))
    return codes
