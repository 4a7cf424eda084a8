# SPDX-License-Identifier: Apache-2.0
"""Text files as tokens, and the windows a model is calibrated on."""

import heapq
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch

from ..errors import ConfigError
from ..schema import shorten
from .files import read_text

# No tokenizer's tokens are longer on average.
CHARACTERS_PER_TOKEN = 32
# Larger files are cut here unless more is asked for: tokenizing takes seconds and about
# 150 bytes of memory per character.
MIN_CHARACTERS = 4 << 20
_DATA = Path(__file__).parent / "data"
_TOKENIZER_FILES = ("tokenizer*", "vocab*", "*.model", "*.tiktoken")


def default_text() -> Path:
    """The text calibration uses when none is given: a part of WikiText-2's train split.

    ``data/SOURCE.txt`` says where it is from and its licence.
    """
    return _DATA / "wikitext-2-train.txt"


def calibration_windows(
    model: str, text: Path, samples: int, seq_len: int, seed: int
) -> torch.Tensor:
    """Windows of a text, chosen by a seed: int64 ``[samples, seq_len]``.

    The text is tokenized as one and cut into windows that do not overlap; those of
    the smallest SHA-256 of ``SEED:INDEX`` are taken, in the order of the text. So the
    choice depends on no library, and fewer samples are a subset of more. Of a text of
    more than 4 Mi characters only the first 4 Mi are read, or 32 for every token asked
    for if that is more.

    Args:
        model: directory with the tokenizer.
        text: UTF-8 file.
        samples: windows.
        seq_len: tokens of a window.
        seed: of the choice.

    Raises:
        ConfigError: for a text that cannot be read or is too short, or no tokenizer.
    """
    needed = samples * seq_len
    characters = max(MIN_CHARACTERS, CHARACTERS_PER_TOKEN * needed)
    content = read_text(text, characters)
    if not content.strip():
        raise ConfigError(f"{text}: is empty")
    ids = token_ids(model, content)
    windows = len(ids) // seq_len
    if windows < samples:
        raise ConfigError(
            f"{text}: has {len(ids)} tokens, {samples} windows of {seq_len} need "
            f"{needed}; it holds {windows}: use fewer or shorter samples, or a longer "
            "text"
        )

    def rank(index: int) -> bytes:
        return sha256(f"{seed}:{index}".encode()).digest()

    chosen = sorted(heapq.nsmallest(samples, range(windows), key=rank))
    return torch.tensor(ids[: windows * seq_len]).view(windows, seq_len)[chosen]


def token_ids(model: str, content: str) -> list[int]:
    """Tokens of a text, with the special tokens the tokenizer puts around one.

    Args:
        model: directory or hub name of the tokenizer.
        content: the text.

    Raises:
        ConfigError: when there is no tokenizer, or it cannot be loaded.
    """
    return encode(load_tokenizer(model), content)


def encode(tokenizer: Any, content: str) -> list[int]:
    """As :func:`token_ids`, with a tokenizer of :func:`load_tokenizer`."""
    encoded = tokenizer(content, verbose=False, return_attention_mask=False)
    ids: list[int] = encoded["input_ids"]
    return ids


def load_tokenizer(model: str) -> Any:
    """The tokenizer of a model, as transformers has it.

    Args:
        model: directory or hub name.

    Raises:
        ConfigError: when there is none, or it cannot be loaded.
    """
    from transformers import AutoTokenizer

    directory = Path(model)
    if directory.is_dir() and not any(
        any(directory.glob(pattern)) for pattern in _TOKENIZER_FILES
    ):
        raise ConfigError(f"{model}: has no tokenizer, such as tokenizer.json")
    try:
        return AutoTokenizer.from_pretrained(model)
    except Exception as error:  # a broken file raises whatever its parser does
        reason = str(error).strip().partition("\n")[0]
        raise ConfigError(
            f"{model}: its tokenizer cannot be loaded: {type(error).__name__}: "
            f"{shorten(reason)}"
        ) from None
