# SPDX-License-Identifier: Apache-2.0
"""Every scheme serves what its name says: the reference of that scheme."""

import json
from typing import Any

import pytest
import torch

from vllm_lowbit.calibrate.reference_model import ReferenceModel

pytestmark = pytest.mark.live

# w4a4kv4 has a file of its own, test_reference.py.
SCHEMES = (
    *("w4a4", "w4a8kv4", "w4a16kv4", "w4a16-g128", "w2a16-g64", "w6a6", "w8a8"),
    "w4a4kv4-g128-ag128",
)
EPS = 1e-3


@pytest.mark.parametrize("scheme", SCHEMES)
def test_scheme_chosen_by_override(
    engine: Any,
    score: Any,
    served_reference: Any,
    model: str,
    prompts: list[str],
    scheme: str,
) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    sequences = [tokenizer(prompt)["input_ids"] for prompt in prompts[:6]]
    choice = {"quantization_config_dict_json": json.dumps({"scheme": scheme})}
    with engine(dtype="float32", hf_overrides=choice) as llm:
        served = score(llm, sequences)
    reference = served_reference(scheme)
    plain = ReferenceModel(model, None)
    apart = []
    for ids, logits in zip(sequences, served, strict=True):
        log_probs = logits.log_softmax(-1)
        expected, float_model = (
            r(torch.tensor(ids))[:-1].log_softmax(-1) for r in (reference, plain)
        )
        assert (log_probs - expected).abs().max() < EPS
        apart.append(float((log_probs - float_model).abs().max()))
    assert max(apart) > 10 * EPS
