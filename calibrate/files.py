# SPDX-License-Identifier: Apache-2.0
"""Reading a bounded part of a file a user named, and replacing one as a whole."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from io import TextIOWrapper
from pathlib import Path
from typing import BinaryIO

from ..errors import ConfigError, OutputError


@contextmanager
def _opened(path: Path) -> Iterator[BinaryIO]:
    # Opening a pipe would wait for a writer.
    if os.path.exists(path) and not os.path.isfile(path):
        what = "a directory" if os.path.isdir(path) else "not a regular file"
        raise ConfigError(f"{path}: is {what}")
    if "\0" in str(path):
        raise ConfigError(f"{str(path)!r}: cannot be the name of a file")
    try:
        with path.open("rb") as file:
            yield file
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None


def read_bytes(path: Path, size: int) -> bytes:
    """A whole file of at most ``size`` bytes.

    Raises:
        ConfigError: when it is larger, not a regular file, or cannot be read.
    """
    with _opened(path) as file:
        data = file.read(size + 1)
    if len(data) > size:
        raise ConfigError(f"{path}: is larger than {size} bytes")
    return data


def read_text(path: Path, characters: int) -> str:
    """The first ``characters`` of a UTF-8 file, all of it for -1.

    Raises:
        ConfigError: when it is not a regular file, cannot be read, or is not UTF-8.
    """
    try:
        with _opened(path) as file, TextIOWrapper(file, encoding="utf-8") as text:
            return text.read(characters)
    except UnicodeDecodeError as error:
        byte = error.object[error.start]
        raise ConfigError(
            f"{path}: is not UTF-8 text, found byte 0x{byte:02x}"
        ) from None


def replace_text(path: Path, text: str) -> None:
    """Write a file anew, as a whole: whoever reads it finds the old or the new one.

    Raises:
        OutputError: when it cannot be written; the old one stays.
    """
    staging = path.with_name(f".{path.name}.new")
    try:
        staging.write_text(text, encoding="utf-8")
        os.replace(staging, path)
    except OSError as error:
        with suppress(OSError):
            staging.unlink(missing_ok=True)
        raise OutputError(f"{path} cannot be written: {error.strerror}") from None
