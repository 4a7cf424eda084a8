# SPDX-License-Identifier: Apache-2.0
"""Likelihoods by a float or quantized model: the reference, or vLLM itself."""

import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..architecture import ModelShape
from ..checkpoint import check_plain_checkpoint
from ..errors import CheckpointError, ConfigError
from ..schema import LowbitConfig, scheme_from_name, shorten
from ..takeover.checkpoint import read_quantization
from ..takeover.foreign import ForeignFormat
from .offline_engine import offline_engine, prompt_losses
from .perplexity import Scored, batches, negative_log_likelihood
from .reference_model import ReferenceModel, load_time_config

DTYPES = ("auto", "float32", "bfloat16", "float16")
# Attention of the reference is quadratic in it, and the logits are in float64.
REFERENCE_TOKENS = 512
_POSITIONS = "max_position_embeddings"
LossesOf = Callable[[Iterable[Scored]], Iterator[float]]


@dataclass(frozen=True)
class Target:
    """A model; ``stored`` is its own quantization, ``chosen`` one for a plain model."""

    model: str
    shape: ModelShape
    max_positions: int
    stored: LowbitConfig | ForeignFormat | None
    chosen: LowbitConfig | None

    @classmethod
    def open(cls, model: str, scheme: str | None = None) -> "Target":
        """Read the config of a model.

        Args:
            model: directory of a plain or quantized checkpoint.
            scheme: a plain model is quantized to while loading, None for the float
                model.

        Raises:
            ConfigError, CheckpointError, UnsupportedError: for what cannot be run.
        """
        directory = Path(model)
        if not directory.is_dir():
            what = "is not a directory" if directory.exists() else "does not exist"
            raise CheckpointError(
                f"model {model} {what}; a local checkpoint is evaluated"
            )
        data, stored = read_quantization(model)
        source = f"{model}/config.json"
        shape = ModelShape.from_config(data, source)
        # What transformers assumes where a config does not say.
        key = shape.architecture.keys.get(_POSITIONS, _POSITIONS)
        max_positions = data.get(key, shape.architecture.defaults.get(key, 2048))
        if type(max_positions) is not int:
            raise ConfigError(
                f"{source}: {key} must be an integer, got {shorten(max_positions)}"
            )
        chosen = None
        if scheme is not None:
            if stored is not None:
                raise ConfigError(
                    f"scheme {shorten(scheme)} cannot be chosen: {model} is quantized "
                    f"already, by scheme {stored.scheme.name}"
                )
            chosen = load_time_config(model, scheme_from_name(scheme))
        return cls(model, shape, max_positions, stored, chosen)

    @property
    def scheme(self) -> str:
        """Name of what is run, ``float`` for an unquantized model."""
        config = self.stored or self.chosen
        return "float" if config is None else config.scheme.name

    def check_tokens(self, token_ids: Iterable[int]) -> None:
        """Raise ConfigError when the tokenizer knows more tokens than the model."""
        largest = max(token_ids, default=0)
        if largest >= self.shape.vocab_size:
            raise ConfigError(
                f"{self.model}: its tokenizer gives token {largest}, the model's "
                f"vocab_size is {self.shape.vocab_size}"
            )


@dataclass(frozen=True)
class Scorer:
    """A model that runs.

    Attributes:
        target: what was asked for.
        backend: ``reference`` or ``vllm``.
        dtype: that it computes in, such as ``bfloat16``.
        losses: from sequences to the negative log-likelihood of each, in nats.
    """

    target: Target
    backend: str
    dtype: str
    losses: LossesOf


def check_backend(backend: str, dtype: str) -> None:
    """Raise ConfigError for a backend or dtype that does not exist."""
    for argument, value, supported in (
        ("backend", backend, tuple(BACKENDS)),
        ("dtype", dtype, DTYPES),
    ):
        if value not in supported:
            raise ConfigError(
                f"{argument} {shorten(value)} does not exist; supported: "
                f"{', '.join(supported)}"
            )


@contextmanager
def open_scorer(
    target: Target,
    longest: int,
    backend: str = "reference",
    dtype: str = "auto",
    verbose: bool = False,
) -> Iterator[Scorer]:
    """Run a model for as long as the block lasts.

    ``vllm`` starts an engine in this process, in eager mode, and shuts it down; no
    other may be running.

    Args:
        target: what to run.
        longest: tokens of the longest sequence that will be scored.
        backend: ``reference`` or ``vllm``.
        dtype: ``float32``, ``bfloat16``, ``float16`` or ``auto``, which is float32 by
            the reference and by vLLM what it serves the model in.
        verbose: whether vLLM logs as usual, instead of errors only.

    Raises:
        ConfigError, CheckpointError, UnsupportedError: for a model that cannot run.
        ModuleNotFoundError: where transformers or, if asked for, vLLM is missing.
    """
    check_backend(backend, dtype)
    with BACKENDS[backend](target, longest, dtype, verbose) as (ran_in, losses):
        yield Scorer(target, backend, ran_in, losses)


def reference_memory(
    shape: ModelShape, config: LowbitConfig | None, output: int, longest: int
) -> int:
    """Bytes that the reference takes in float32, at most; without the libraries.

    Args:
        shape: of the model.
        config: how its checkpoint is quantized, None for the float model.
        output: bytes of that checkpoint's tensors.
        longest: tokens of the longest sequence that is scored.
    """
    single, double = 4, 8
    prefix = "model.layers.0."
    # Of a layer's matrices that read the same input, which are one; their rows.
    rows: Counter[tuple[str, int]] = Counter()
    for name, size in shape.tensors().items():
        if name.startswith(prefix) and len(size) == 2:
            rows[name.rsplit(".", 2)[0], size[1]] += size[0]
    matrices = [n * k for (_, k), n in rows.items()]
    tokens = max(longest, REFERENCE_TOKENS)
    scores = 4 * shape.num_heads * longest**2 * double
    logits = 4 * tokens * shape.vocab_size * double
    if config is None:
        weights = sum(map(math.prod, shape.tensors().values())) * single
        return weights + max(2 * max(matrices) * single, scores, logits)
    table = shape.vocab_size * shape.hidden_size
    # A byte for each code.
    held = shape.num_layers * sum(matrices)
    held += 2 * table * (single if config.scheme.vocab_bits == 16 else 1)
    if config.scheme.vocab_bits != 16:
        matrices.append(table)
    group = config.scheme.weights.group_size
    sums = max(n * (k // (group or k)) for (_, k), n in rows.items())
    # Codes in float64, and sums before the groups are added.
    linear = 3 * double * (max(matrices) + tokens * sums)
    # Tensors of the files are split while they are there, then taken one by one.
    return max(2 * output, output + held, held + max(linear, scores, logits))


@contextmanager
def _reference(
    target: Target, longest: int, dtype: str, verbose: bool
) -> Iterator[tuple[str, LossesOf]]:
    dtype = "float32" if dtype == "auto" else dtype
    model = ReferenceModel(target.model, target.chosen, getattr(torch, dtype))

    def losses(sequences: Iterable[Scored]) -> Iterator[float]:
        for group in batches(sequences, REFERENCE_TOKENS):
            lengths = [len(scored.token_ids) for scored in group]
            logits = model(torch.cat([s.token_ids for s in group]), lengths)
            for scored, part in zip(group, logits.split(lengths), strict=True):
                yield negative_log_likelihood(part, scored.token_ids, scored.start)

    yield dtype, losses


@contextmanager
def _vllm(
    target: Target, longest: int, dtype: str, verbose: bool
) -> Iterator[tuple[str, LossesOf]]:
    # vLLM checks a float model's files less.
    if target.stored is None:
        check_plain_checkpoint(target.model, target.shape)
    quantization: dict[str, Any] = {}
    if isinstance(target.stored, ForeignFormat):
        # Its own method would come first, and may run another scheme.
        quantization = {"quantization": "lowbit"}
    if target.chosen is not None:
        choice = json.dumps({"scheme": target.scheme})
        quantization = {
            "quantization": "lowbit",
            "hf_overrides": {"quantization_config_dict_json": choice},
        }
    # Of keys and values in float32: enough for every dtype and scheme.
    shape = target.shape
    token_bytes = shape.num_layers * shape.num_kv_heads * shape.head_dim * 2 * 4
    with offline_engine(
        target.model, longest, token_bytes, verbose, dtype=dtype, **quantization
    ) as llm:
        ran_in = str(llm.model_config.dtype).removeprefix("torch.")
        yield ran_in, lambda sequences: prompt_losses(llm, sequences)


BACKENDS = {"reference": _reference, "vllm": _vllm}
