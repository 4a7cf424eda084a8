# SPDX-License-Identifier: Apache-2.0
"""On what every cell is measured, and that none of it was calibrated on."""

import functools
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
DATA = ROOT / "benchmarks" / "data"
SEQ_LEN = 512
# Name of a text -> file and how many of its tokens, None for all.
TEXTS: dict[str, tuple[Path, int | None]] = {
    "WikiText-2": (DATA / "wikitext-2" / "test.txt", 40_000),
    "novel": (DATA / "novel" / "conrad-nostromo.txt", None),
}
MAIN_TEXT = "WikiText-2"
BLIMP = DATA / "blimp"
PAIRS = 25  # of each paradigm
# Words in a row that two texts of one language hardly share by chance, as in the check
# of Brown et al. (2020), appendix C, for the training text of GPT-3.
NGRAM = 13
# The same for single sentences, all of whose n-grams would have to be shared.
SENTENCE_NGRAM = 5
UNKNOWN = "unk"


def inputs(model: str) -> dict[str, Any]:
    """What the figures of a model follow from, beside the recipe: hashes and sizes."""
    return {
        "model": _sha256(*sorted((ROOT / "models" / model).glob("*.[sj]*"))),
        "calibration": _sha256(calibration_text()),
        "texts": {name: [_sha256(path), n] for name, (path, n) in TEXTS.items()},
        "seq_len": SEQ_LEN,
        "blimp": [_sha256(*sorted(BLIMP.glob("*.jsonl"))), PAIRS],
    }


def calibration_text() -> Path:
    """What every recipe calibrates on."""
    from vllm_lowbit.calibrate.text import default_text

    return default_text()


@functools.cache
def _sha256(*paths: Path) -> str:
    digest = hashlib.sha256()
    for path in paths:
        digest.update(path.read_bytes())
    return digest.hexdigest()


def overlaps() -> dict[str, int]:
    """Count of n-grams of each text, and of BLiMP's sentences, in the calibration text.

    A sentence counts when all of its n-grams are there.
    """
    calibration = calibration_text().read_text(encoding="utf-8")
    known = ngrams(calibration, NGRAM)
    found = {
        name: len(ngrams(path.read_text("utf-8"), NGRAM) & known)
        for name, (path, _) in TEXTS.items()
    }
    known = ngrams(calibration, SENTENCE_NGRAM)
    parts = (ngrams(sentence, SENTENCE_NGRAM) for sentence in _sentences())
    found["BLiMP"] = sum(bool(part) and part <= known for part in parts)
    return found


def _sentences() -> Iterator[str]:
    for path in sorted(BLIMP.glob("*.jsonl")):
        for line in path.read_text("utf-8").splitlines():
            yield from json.loads(line).values()


def ngrams(text: str, n: int) -> set[tuple[str, ...]]:
    """Every ``n`` words in a row of a line, without case and punctuation.

    Left out are those that are mostly the word for an unknown one.
    """
    found = set()
    for line in text.lower().splitlines():
        words = ["".join(filter(str.isalnum, word)) for word in line.split()]
        words = [word for word in words if word]
        found |= set(zip(*(words[i:] for i in range(n)), strict=False))
    return {gram for gram in found if 2 * gram.count(UNKNOWN) < n}
