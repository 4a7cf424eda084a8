# SPDX-License-Identifier: Apache-2.0
"""What the model card of a base model says, for the card of what is made from it."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from .files import read_text
from .strict_yaml import parse_mapping

CARD = "README.md"
_FRONT_MATTER = re.compile(
    r"\A\ufeff?\s*---[ \t]*\n(.*?)^---[ \t]*$", re.DOTALL | re.MULTILINE
)
_MAX_FRONT_MATTER = 1 << 18


@dataclass(frozen=True)
class BaseMetadata:
    """What the base model's card says of it; None where it says nothing."""

    license: str | None = None
    license_name: str | None = None
    license_link: str | None = None
    language: tuple[str, ...] | None = None
    pipeline_tag: str | None = None


def base_metadata(model_dir: Path) -> BaseMetadata:
    """Metadata from the front matter of a model's README.md.

    What is absent, malformed or of another type is None.
    """
    try:
        text = read_text(model_dir / CARD, _MAX_FRONT_MATTER)
        found = _FRONT_MATTER.match(text)
        data = parse_mapping(found[1].encode(), CARD)[0] if found else {}
    except ConfigError:
        return BaseMetadata()
    return BaseMetadata(
        license=_string(data.get("license")),
        license_name=_string(data.get("license_name")),
        license_link=_string(data.get("license_link")),
        language=_strings(data.get("language")),
        pipeline_tag=_string(data.get("pipeline_tag")),
    )


def _string(value: Any) -> str | None:
    return value if isinstance(value, str) and value.strip() else None


def _strings(value: Any) -> tuple[str, ...] | None:
    """One string or a list of them."""
    values = value if isinstance(value, list) else [value]
    return tuple(values) if values and all(map(_string, values)) else None
