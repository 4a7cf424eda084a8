# SPDX-License-Identifier: Apache-2.0
"""A lowbit checkpoint serves itself, without a flag: the reference that reads it."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from vllm_lowbit.schema import ClipRatios, Scheme, scheme_from_name

pytestmark = pytest.mark.live

EPS = 1e-3
HEAD = {"order": 64, "block": 64}
ROTATIONS = {
    "attn_input": {"apply": "online", "order": 128, "block": 256},
    "v": {"apply": "folded", **HEAD},
    "o_input": {"apply": "online", "order": 4, "block": 256},
    "mlp_input": {"apply": "online", "order": 256, "block": 256},
    "down_input": {"apply": "online", "order": 384, "block": 384},
    "max_tensor_parallel_size": 1,
}
KEYS = {"k": {"apply": "online", **HEAD}}
# Another for every input of the six layers.
RATIOS = ClipRatios(
    attn_input=(0.8, 0.9, 1.0, 0.85, 0.7, 0.95),
    o_input=(0.95, 0.7, 0.85, 1.0, 0.9, 0.8),
    mlp_input=(0.65, 0.75, 0.8125, 0.9375, 0.975, 0.5),
    down_input=(1.0, 0.95, 0.9, 0.85, 0.8, 0.75),
)


@pytest.fixture
def differences(engine: Any, score: Any, model: str, prompts: list[str]) -> Any:
    """``differences(reference, directory, **arguments)``: of the log-probabilities a
    server in the reference's dtype gives to the reference's, and the largest logit."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    sequences = [tokenizer(prompt)["input_ids"] for prompt in prompts[:6]]

    def compare(
        reference: Any, directory: Path, **arguments: Any
    ) -> tuple[torch.Tensor, float]:
        dtype = str(reference.dtype).removeprefix("torch.")
        with engine(model=str(directory), dtype=dtype, **arguments) as llm:
            served = torch.cat(score(llm, sequences))
        expected = [reference(torch.tensor(ids))[:-1] for ids in sequences]
        apart = served.log_softmax(-1) - torch.cat(expected).log_softmax(-1)
        return apart, float(served.abs().max())

    return compare


@pytest.mark.parametrize(
    ("scheme", "vocab_bits", "rotations"),
    [
        ("w4a4kv4", 16, {**ROTATIONS, **KEYS}),
        ("w4a4kv4", 8, {}),
        (scheme_from_name("w4a4").with_clip_ratios(RATIOS), 16, ROTATIONS),
        ("w4a16-g128", 8, ROTATIONS),
        ("w4a4kv4-g64-ag64", 16, {**ROTATIONS, **KEYS}),
        ("w2a16-g64", 16, {}),
        ("w6a6", 16, ROTATIONS),
        ("w3a16", 8, {"v": ROTATIONS["v"]}),
    ],
)
def test_scheme(
    differences: Any,
    served_checkpoint: Any,
    lowbit_checkpoint: Any,
    model: str,
    tmp_path: Path,
    scheme: str | Scheme,
    vocab_bits: int,
    rotations: dict[str, Any],
) -> None:
    if isinstance(scheme, str):
        scheme = scheme_from_name(scheme, vocab_bits=vocab_bits)
    chosen = scheme.model_dump()
    directory = lowbit_checkpoint(tmp_path, model, chosen, vocab_bits, **rotations)
    reference = served_checkpoint(directory)
    assert reference.scheme_name == scheme.name
    # None: the checkpoint itself says how it is quantized.
    apart, _ = differences(reference, directory, quantization=None)
    assert apart.abs().max() < EPS


@pytest.mark.parametrize(
    ("vocab_bits", "dtype"), [(16, "float32"), (8, "float32"), (8, "bfloat16")]
)
def test_online_residual(
    differences: Any,
    served_checkpoint: Any,
    lowbit_checkpoint: Any,
    tiny_model: Any,
    rewrite: Any,
    tmp_path: Path,
    vocab_bits: int,
    dtype: str,
) -> None:
    """Embedding and head share one matrix: the rotation runs around it."""
    plain = tiny_model(
        tmp_path / "plain",
        dtype=dtype,
        tokenizer=True,
        hidden_size=384,
        initializer_range=0.1,
        tie_word_embeddings=True,
    )
    rewrite(plain, lambda tensors: tensors["model.norm.weight"].uniform_(0.5, 1.5))
    directory = lowbit_checkpoint(
        tmp_path / "lowbit",
        plain,
        "w4a4kv4",
        vocab_bits,
        residual={"apply": "online", "order": 384, "block": 384, "sign_seed": 5},
        **KEYS,
    )
    reference = served_checkpoint(directory, getattr(torch, dtype))
    apart, largest_logit = differences(
        reference, directory, quantization=None, max_model_len=256
    )
    assert apart.abs().max() < EPS
    assert largest_logit > 1


def test_vocabulary_of_8_bits_by_the_flag_alone(
    differences: Any, served_reference: Any, model: str
) -> None:
    choice = json.dumps({"scheme": "w4a4kv4", "vocab_bits": 8})
    apart, _ = differences(
        served_reference(scheme_from_name("w4a4kv4", vocab_bits=8)),
        Path(model),
        hf_overrides={"quantization_config_dict_json": choice},
    )
    assert apart.abs().max() < EPS
