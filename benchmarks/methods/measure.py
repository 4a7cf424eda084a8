# SPDX-License-Identifier: Apache-2.0
"""One cell: calibrate, then measure by the reference and by vLLM."""

import math
import resource
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from vllm_lowbit.calibrate.choices import Score, read_tasks, score_tasks, tokenize_tasks
from vllm_lowbit.calibrate.evaluate import text_perplexity, text_windows
from vllm_lowbit.calibrate.pipeline import calibrate
from vllm_lowbit.calibrate.scoring import Target, open_scorer

from .cells import FLAG, Cell
from .protocol import BLIMP, MAIN_TEXT, PAIRS, ROOT, SEQ_LEN, TEXTS, calibration_text

# Beyond this difference vLLM measures again, in float32.
SERVED_BOUND = 0.005


def measure(cell: Cell) -> dict[str, Any]:
    """What methods.json keeps of a cell: perplexities, accuracy, seconds.

    Perplexities and BLiMP are the reference model's, in float32; ``served`` is vLLM's
    perplexity of the first text in the dtype it serves in, eager. Of an ablation there
    are perplexities only.
    """
    result: dict[str, Any] = {"threads": torch.get_num_threads()}
    with tempfile.TemporaryDirectory() as directory:
        model, scheme = str(ROOT / "models" / cell.model), None
        recipe = cell.resolve()
        if recipe is not None:
            output = Path(directory) / "checkpoint"
            started = time.monotonic()
            calibrate(model, output, recipe, calibration_text())
            result["calibration_seconds"] = round(time.monotonic() - started, 1)
            model = str(output)
        elif cell.method == FLAG:
            scheme = cell.scheme
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        result["peak_mib"] = round(peak / 1024)
        target = Target.open(model, scheme)
        result |= _by_reference(target, blimp=not cell.overrides)
        if cell.is_served:
            result |= _by_vllm(target, result["perplexity"][MAIN_TEXT])
    return result


def _by_reference(target: Target, blimp: bool) -> dict[str, Any]:
    result: dict[str, Any] = {"perplexity": {}}
    with open_scorer(target, SEQ_LEN) as scorer:
        for name, (path, tokens) in TEXTS.items():
            parts = text_windows(target, path, SEQ_LEN, tokens)
            found = text_perplexity(scorer, parts, SEQ_LEN, name)
            result["perplexity"][name] = round(found.perplexity, 5)
        if blimp:
            tasks = read_tasks([BLIMP], PAIRS)
            answers = score_tasks(scorer, tasks, tokenize_tasks(target, tasks))
            result["blimp"] = _short(answers.mean)
    return result


def _short(score: Score) -> dict[str, float]:
    values = asdict(score)
    del values["task"]
    return {key: round(value, 5) for key, value in values.items()}


def _by_vllm(target: Target, expected: float) -> dict[str, float]:
    path, tokens = TEXTS[MAIN_TEXT]
    parts = text_windows(target, path, SEQ_LEN, tokens)

    def served(dtype: str) -> float:
        with open_scorer(target, SEQ_LEN, "vllm", dtype) as scorer:
            found = text_perplexity(scorer, parts, SEQ_LEN, MAIN_TEXT)
        return round(found.perplexity, 5)

    result = {"served": served("auto")}
    if abs(math.log(result["served"] / expected)) > SERVED_BOUND:
        result["served_float32"] = served("float32")
    return result
