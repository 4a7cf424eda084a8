# SPDX-License-Identifier: Apache-2.0
"""The served model is the reference model, and not one of its easier variants."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from vllm_lowbit.calibrate.perplexity import tokenize
from vllm_lowbit.calibrate.reference_model import ReferenceModel

pytestmark = pytest.mark.live

TEXT = Path(__file__).parents[2] / "benchmarks" / "data" / "wikitext-2" / "test.txt"

# Largest difference of a log-probability to the reference's. In bfloat16 the logits
# themselves, up to 16 in magnitude, are 1/16 apart.
EPS = {torch.float32: 1e-3, torch.bfloat16: 0.25}


@pytest.fixture(scope="module")
def reference(served_reference: Any) -> ReferenceModel:
    return served_reference("w4a4kv4")


def _expected(
    reference: ReferenceModel, sequences: list[list[int]]
) -> list[torch.Tensor]:
    return [reference(torch.tensor(ids))[:-1] for ids in sequences]


def _compare(
    served: list[torch.Tensor], expected: list[torch.Tensor]
) -> tuple[float, list[float], int]:
    """Largest log-probability difference, the reference's top-2 gap wherever the
    argmax differs, and the number of positions."""
    noise, gaps, positions = 0.0, [], 0
    for a, b in zip(served, expected, strict=True):
        a, b = a.log_softmax(-1), b.log_softmax(-1)
        noise = max(noise, float((a - b).abs().max()))
        first, second = b.topk(2).values.unbind(-1)
        gaps += (first - second)[a.argmax(-1) != b.argmax(-1)].tolist()
        positions += len(b)
    return noise, gaps, positions


@pytest.fixture(scope="module")
def greedy(engine: Any, score: Any, prompts: list[str]) -> Any:
    """What the float32 eager server generates, and its logits on that."""
    from vllm import SamplingParams

    parameters = SamplingParams(max_tokens=64, temperature=0, ignore_eos=True)
    with engine(dtype="float32") as llm:
        outputs = llm.generate(prompts, parameters, use_tqdm=False)
        starts = [len(o.prompt_token_ids) for o in outputs]
        sequences = [[*o.prompt_token_ids, *o.outputs[0].token_ids] for o in outputs]
        return SimpleNamespace(
            starts=starts, sequences=sequences, logits=score(llm, sequences)
        )


@pytest.fixture(scope="module")
def expected(reference: ReferenceModel, greedy: Any) -> list[torch.Tensor]:
    return _expected(reference, greedy.sequences)


def _differences(
    served: list[torch.Tensor], expected: list[torch.Tensor]
) -> torch.Tensor:
    """Largest log-probability difference of each position ``[positions]``."""
    a, b = (torch.cat(rows).log_softmax(-1) for rows in (served, expected))
    return (a - b).abs().amax(dim=-1)


def _summary(noise: float, gaps: list[float], positions: int) -> dict[str, Any]:
    return {
        "largest log-probability difference": noise,
        "positions": positions,
        "argmax differs at": len(gaps),
        "largest top-2 gap of the reference there": max(gaps, default=0.0),
    }


def test_float32_eager_is_the_reference(
    served_reference: Any,
    greedy: Any,
    expected: list[torch.Tensor],
    agreement: dict[str, Any],
) -> None:
    """64 greedy tokens on 20 prompts, and the logits of every position."""
    for start, ids, logits in zip(
        greedy.starts, greedy.sequences, expected, strict=True
    ):
        assert ids[start:] == logits[start - 1 :].argmax(-1).tolist()

    eps = EPS[torch.float32]
    differences = {"w4a4kv4": _differences(greedy.logits, expected)}
    for scheme in ("w4a16kv4", "w4a4"):
        easier = _expected(served_reference(scheme), greedy.sequences)
        differences[scheme] = _differences(greedy.logits, easier)
    agreement["float32 eager"] = {
        f"{scheme} reference": {
            "largest log-probability difference": float(values.max()),
            "median over positions": float(values.median()),
        }
        for scheme, values in differences.items()
    }
    assert differences["w4a4kv4"].max() < eps
    assert (differences["w4a16kv4"] > 10 * eps).float().mean() > 0.9
    assert (differences["w4a4"] > 10 * eps).float().mean() > 0.9


def test_float32_compiled_differs_only_within_its_noise(
    engine: Any,
    score: Any,
    greedy: Any,
    expected: list[torch.Tensor],
    agreement: dict[str, Any],
) -> None:
    """Where the argmax differs, the reference hardly preferred its own."""
    with engine(dtype="float32", enforce_eager=False) as llm:
        served = score(llm, greedy.sequences)
    noise, gaps, positions = _compare(served, expected)
    agreement["float32 compiled"] = _summary(noise, gaps, positions)
    assert len(gaps) <= 0.02 * positions
    assert all(gap < 2 * noise for gap in gaps)


def test_bfloat16_eager_is_the_reference(
    engine: Any,
    score: Any,
    served_reference: Any,
    greedy: Any,
    agreement: dict[str, Any],
) -> None:
    """Up to the last bit of its logits."""
    reference = served_reference("w4a4kv4", torch.bfloat16)
    with engine(dtype="bfloat16") as llm:
        served = score(llm, greedy.sequences)
    mirrored = _expected(reference, greedy.sequences)
    noise, gaps, positions = _compare(served, mirrored)
    agreement["bfloat16 eager"] = _summary(noise, gaps, positions)
    assert noise < EPS[torch.bfloat16]
    assert len(gaps) <= 0.02 * positions
    assert all(gap < 2 * noise for gap in gaps)


def test_bfloat16_compiled_loses_nothing(
    engine: Any,
    score: Any,
    model: str,
    served_reference: Any,
    agreement: dict[str, Any],
) -> None:
    """A compiled bfloat16 server wanders off, but predicts a text as well.

    One element that rounds to the other bfloat16 neighbour can flip a 4-bit code, a
    whole step, which flips more in the next layer: two bfloat16 servers whose norms
    add in another order differ like two draws of the quantization error. So tokens
    are not compared; the mean loss on a text must agree.
    """
    text = tokenize(model, TEXT, 8192).tolist()
    sequences = [text[i : i + 512] for i in range(0, len(text), 512)]
    with engine(dtype="bfloat16", enforce_eager=False) as llm:
        served = score(llm, sequences)
    expected = _expected(served_reference("w4a4kv4"), sequences)
    noise, gaps, positions = _compare(served, expected)
    losses = [_loss(rows, sequences) for rows in (served, expected)]
    agreement["bfloat16 compiled, WikiText-2, against float32"] = {
        **_summary(noise, gaps, positions),
        "mean loss served": round(losses[0], 4),
        "mean loss of the reference": round(losses[1], 4),
    }
    assert all(gap < 2 * noise for gap in gaps)
    assert abs(losses[0] - losses[1]) < 0.01


def _loss(logits: list[torch.Tensor], sequences: list[list[int]]) -> float:
    """Mean negative log-likelihood of the sequences' own tokens."""
    targets = torch.cat([torch.tensor(ids[1:]) for ids in sequences])
    return float(torch.nn.functional.cross_entropy(torch.cat(logits), targets))
