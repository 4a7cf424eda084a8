# SPDX-License-Identifier: Apache-2.0
"""Perplexity of a float or quantized model, by the reference or by vLLM itself."""

import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..architecture import LlamaShape
from ..checkpoint import check_plain_checkpoint
from ..errors import CheckpointError, ConfigError
from ..schema import LowbitConfig, scheme_from_name, shorten
from ..takeover.checkpoint import read_quantization
from ..takeover.foreign import ForeignFormat
from .offline_engine import offline_engine, prompt_losses
from .perplexity import mean_perplexity, negative_log_likelihood, tokenize, windows
from .reference_model import ReferenceLlama, load_time_config

LossesOf = Callable[[list[torch.Tensor]], Iterator[float]]
DTYPES = ("auto", "float32", "bfloat16", "float16")


@dataclass(frozen=True)
class Evaluation:
    """What was measured, and on what.

    Attributes:
        perplexity: exp of the mean negative log-likelihood.
        tokens: predicted tokens.
        scheme: name of what was run, ``float`` for an unquantized model.
        backend: ``reference`` or ``vllm``.
        dtype: that was computed in, such as ``bfloat16``.
        seq_len: tokens of a window.
        data: the text file.
        model: the checkpoint.
    """

    perplexity: float
    tokens: int
    scheme: str
    backend: str
    dtype: str
    seq_len: int
    data: str
    model: str


@dataclass(frozen=True)
class _Target:
    """A model; ``stored`` is its own quantization, ``chosen`` one for a plain model."""

    model: str
    shape: LlamaShape
    max_positions: int
    stored: LowbitConfig | ForeignFormat | None
    chosen: LowbitConfig | None

    @property
    def scheme(self) -> str:
        config = self.stored or self.chosen
        return "float" if config is None else config.scheme.name


def evaluate(
    model: str,
    data: Path,
    seq_len: int = 512,
    max_tokens: int | None = None,
    backend: str = "reference",
    scheme: str | None = None,
    dtype: str = "auto",
    progress: Callable[[int, int], object] = lambda done, total: None,
    verbose: bool = False,
) -> Evaluation:
    """Perplexity of a text, in windows that do not overlap.

    Every window is scored on its own; its first token is not predicted. The backend
    ``vllm`` starts an engine in this process, in eager mode, and shuts it down; no
    other may be running.

    Args:
        model: directory of a plain or quantized checkpoint, with its tokenizer.
        data: UTF-8 text.
        seq_len: tokens of a window.
        max_tokens: of the text, from its start; None is all of it.
        backend: ``reference`` or ``vllm``.
        scheme: a plain model is quantized to while loading, None for the float model.
        dtype: ``float32``, ``bfloat16``, ``float16`` or ``auto``, which is float32 by
            the reference and by vLLM what it serves the model in.
        progress: called with the windows done and their number.
        verbose: whether vLLM logs as usual, instead of errors only.

    Raises:
        ConfigError: for an argument or a text that cannot be used.
        CheckpointError, UnsupportedError: for a model that cannot.
        ModuleNotFoundError: where transformers or, if asked for, vLLM is missing.
    """
    if backend not in BACKENDS:
        raise ConfigError(_no_such("backend", backend, BACKENDS))
    if dtype not in DTYPES:
        raise ConfigError(_no_such("dtype", dtype, DTYPES))
    target = _target(model, scheme)
    _check_lengths(target, seq_len, max_tokens)
    parts = windows(_token_ids(target, data, max_tokens), seq_len)
    losses: list[float] = []
    with BACKENDS[backend](target, seq_len, dtype, verbose) as (ran_in, losses_of):
        progress(0, len(parts))
        for loss in losses_of(parts):
            losses.append(loss)
            progress(len(losses), len(parts))
    result = mean_perplexity(losses, sum(len(window) - 1 for window in parts))
    return Evaluation(
        perplexity=result.perplexity,
        tokens=result.tokens,
        scheme=target.scheme,
        backend=backend,
        dtype=ran_in,
        seq_len=seq_len,
        data=str(data),
        model=model,
    )


def _target(model: str, scheme: str | None) -> _Target:
    directory = Path(model)
    if not directory.is_dir():
        what = "is not a directory" if directory.exists() else "does not exist"
        raise CheckpointError(f"model {model} {what}; a local checkpoint is evaluated")
    data, stored = read_quantization(model)
    source = f"{model}/config.json"
    shape = LlamaShape.from_config(data, source)
    # What transformers assumes where a config does not say.
    max_positions = data.get("max_position_embeddings", 2048)
    if type(max_positions) is not int:
        raise ConfigError(
            f"{source}: max_position_embeddings must be an integer, got "
            f"{shorten(max_positions)}"
        )
    chosen = None
    if scheme is not None:
        if stored is not None:
            raise ConfigError(
                f"scheme {shorten(scheme)} cannot be chosen: {model} is quantized "
                f"already, by scheme {stored.scheme.name}"
            )
        chosen = load_time_config(model, scheme_from_name(scheme))
    return _Target(model, shape, max_positions, stored, chosen)


def _check_lengths(target: _Target, seq_len: int, max_tokens: int | None) -> None:
    if not 2 <= seq_len <= target.max_positions:
        raise ConfigError(
            f"seq_len must be from 2 to max_position_embeddings "
            f"{target.max_positions} of {target.model}, got {seq_len}"
        )
    if max_tokens is not None and max_tokens < 2:
        raise ConfigError(f"max_tokens must be at least 2, got {max_tokens}")


def _token_ids(target: _Target, data: Path, max_tokens: int | None) -> torch.Tensor:
    ids = tokenize(target.model, data, max_tokens)
    if len(ids) < 2:
        raise ConfigError(f"{data} has {len(ids)} tokens, at least 2 are needed")
    if int(ids.max()) >= target.shape.vocab_size:
        raise ConfigError(
            f"{target.model}: its tokenizer gives token {int(ids.max())}, the model's "
            f"vocab_size is {target.shape.vocab_size}"
        )
    return ids


def _no_such(argument: str, value: str, supported: Iterable[str]) -> str:
    return (
        f"{argument} {shorten(value)} does not exist; supported: {', '.join(supported)}"
    )


@contextmanager
def _reference(
    target: _Target, seq_len: int, dtype: str, verbose: bool
) -> Iterator[tuple[str, LossesOf]]:
    dtype = "float32" if dtype == "auto" else dtype
    model = ReferenceLlama(target.model, target.chosen, getattr(torch, dtype))

    def losses_of(parts: list[torch.Tensor]) -> Iterator[float]:
        for window in parts:
            yield negative_log_likelihood(model(window), window)

    yield dtype, losses_of


@contextmanager
def _vllm(
    target: _Target, seq_len: int, dtype: str, verbose: bool
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
        target.model, seq_len, token_bytes, verbose, dtype=dtype, **quantization
    ) as llm:
        ran_in = str(llm.model_config.dtype).removeprefix("torch.")
        yield ran_in, lambda parts: prompt_losses(llm, parts)


BACKENDS = {"reference": _reference, "vllm": _vllm}
