# SPDX-License-Identifier: Apache-2.0
"""`evaluate` by vLLM: what the reference measures, again and again in a process."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from vllm_lowbit.calibrate.choices import read_tasks, tokenize_tasks
from vllm_lowbit.calibrate.evaluate import Evaluation, evaluate
from vllm_lowbit.calibrate.perplexity import Scored
from vllm_lowbit.calibrate.scoring import Target, open_scorer
from vllm_lowbit.errors import CheckpointError

pytestmark = pytest.mark.live

DATA = Path(__file__).parents[2] / "benchmarks" / "data"
TEXT, BLIMP = DATA / "wikitext-2" / "test.txt", DATA / "blimp"
VARIABLES = ("VLLM_ENABLE_V1_MULTIPROCESSING", "VLLM_ALLOW_LONG_MAX_MODEL_LEN")


@pytest.mark.parametrize(("scheme", "bound"), [(None, 1e-3), ("w4a4kv4", 5e-3)])
def test_backends_agree(model: str, scheme: str | None, bound: float) -> None:
    """Four windows; the last is shorter."""
    found: dict[str, Evaluation] = {
        backend: evaluate(model, TEXT, 512, 2000, backend, scheme, "float32")
        for backend in ("reference", "vllm")
    }
    served, expected = found["vllm"], found["reference"]
    assert served.perplexity == pytest.approx(expected.perplexity, rel=bound)
    assert served.tokens == expected.tokens == 2000 - 4
    assert served.scheme == expected.scheme == (scheme or "float")
    assert (served.backend, served.dtype) == ("vllm", "float32")


def test_choices(model: str) -> None:
    """Sentences of all lengths, several in a batch."""
    target = Target.open(model)
    tasks = read_tasks(sorted(BLIMP.glob("*island*.jsonl")), 4)
    sequences = [scored for part in tokenize_tasks(target, tasks) for scored in part]
    # A context is seen and not scored.
    sequences += [Scored(s.token_ids, len(s.token_ids) - 2) for s in sequences[:8]]
    longest = max(len(scored.token_ids) for scored in sequences)
    losses = {}
    for backend in ("reference", "vllm"):
        with open_scorer(target, longest, backend, "float32") as scorer:
            losses[backend] = list(scorer.losses(sequences))
    assert len(losses["vllm"]) == len(sequences) > 40
    assert losses["vllm"] == pytest.approx(losses["reference"], rel=1e-3)


def test_nothing_is_left(tiny_model: Any, rewrite: Any, tmp_path: Path) -> None:
    """After an engine that works, one that does not start, and the next."""
    before = {name: os.environ.get(name) for name in VARIABLES}
    threads, set_num_threads = torch.get_num_threads(), torch.set_num_threads
    sound = tiny_model(tmp_path / "sound", tokenizer=True)
    broken = tiny_model(tmp_path / "broken", tokenizer=True)
    name = "model.layers.0.mlp.up_proj.weight"
    rewrite(broken, lambda tensors: tensors[name].fill_(torch.nan))

    # Windows as long as the model can see, in the dtype it is served in.
    first = evaluate(str(sound), TEXT, 256, 600, "vllm")
    assert first.dtype == "bfloat16"
    with pytest.raises(CheckpointError, match=f"{name} holds a non-finite value"):
        evaluate(str(broken), TEXT, 256, 600, "vllm", "w4a4")
    assert evaluate(str(sound), TEXT, 256, 600, "vllm") == first

    assert torch.get_num_threads() == threads
    assert torch.set_num_threads is set_num_threads
    assert {name: os.environ.get(name) for name in VARIABLES} == before


def test_lowbit_checkpoint(
    model: str, published_checkpoint: Any, tmp_path: Path
) -> None:
    """Served as it is: no option names its scheme."""
    directory = str(published_checkpoint(tmp_path, model, scheme="w4a16kv4"))
    served, expected = (
        evaluate(directory, TEXT, 256, 600, backend, dtype="float32")
        for backend in ("vllm", "reference")
    )
    assert served.scheme == expected.scheme == "w4a16kv4"
    assert served.perplexity == pytest.approx(expected.perplexity, rel=5e-3)
