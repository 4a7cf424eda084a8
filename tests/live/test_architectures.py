# SPDX-License-Identifier: Apache-2.0
"""Every architecture serves as its reference: with the flag alone, and calibrated."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from vllm_lowbit.calibrate.pipeline import calibrate
from vllm_lowbit.calibrate.recipe import Recipe
from vllm_lowbit.calibrate.reference_model import ReferenceModel
from vllm_lowbit.calibrate.text import default_text
from vllm_lowbit.schema import scheme_from_name

pytestmark = pytest.mark.live

EPS = 1e-3
# Logits of up to 16 are 1/16 apart in bfloat16.
EPS_BF16 = 0.25
NEW_TOKENS = 40
MODELS: dict[str, dict[str, Any]] = {
    # Shorter than the prompts, and than two pages.
    "mistral": {"architecture": "MistralForCausalLM", "sliding_window": 20},
    "qwen2": {"architecture": "Qwen2ForCausalLM", "hidden_size": 256},
    "qwen3": {"architecture": "Qwen3ForCausalLM", "tie_word_embeddings": True},
    "phi3": {"architecture": "Phi3ForCausalLM", "bos_token_id": 1, "eos_token_id": 2},
    # Caps that scores and logits reach.
    "gemma2": {
        "architecture": "Gemma2ForCausalLM",
        "tie_word_embeddings": True,
        "sliding_window": 20,
        "query_pre_attn_scalar": 48,
        "attn_logit_softcapping": 2.0,
        "final_logit_softcapping": 12.0,
    },
    "gemma3": {
        "architecture": "Gemma3ForCausalLM",
        "tie_word_embeddings": True,
        "sliding_window": 20,
        "sliding_window_pattern": 2,
        "query_pre_attn_scalar": 48,
    },
    "opt": {"architecture": "OPTForCausalLM", "tie_word_embeddings": True},
    "gpt2": {"architecture": "GPT2LMHeadModel", "tie_word_embeddings": True},
    "mixtral": {"architecture": "MixtralForCausalLM", "num_local_experts": 4},
    "qwen3_moe": {
        "architecture": "Qwen3MoeForCausalLM",
        "num_experts": 6,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 96,
        "norm_topk_prob": True,
    },
}
# Every transform, the scales of queries and keys among them, and a clip ratio for every
# input.
LEARNED: dict[str, Any] = {
    "transforms": {"value": "learned", "scales": "learned"},
    "learn": {"steps": 3, "tokens_per_step": 64, "scale_lr": 0.1, "clip_lr": 0.05},
    "activations": {"clip": "learned", "clip_ratio": 0.85},
    "weights": {"method": "gptq"},
    "data": {"samples": 8, "seq_len": 64},
}
# Every transform that a mixture of experts has.
FIXED = {
    "transforms": {
        "residual": "hadamard",
        "value": "hadamard",
        "key": "hadamard",
        "down_input": "hadamard",
        "equalize": True,
    },
    "weights": {"method": "gptaq", "act_order": True},
    "data": LEARNED["data"],
}


@pytest.fixture(scope="module", params=MODELS)
def plain(
    request: pytest.FixtureRequest, tmp_path_factory: Any, tiny_model: Any, rewrite: Any
) -> Path:
    """A servable float32 model whose norms are not 1 and biases not 0."""
    directory = tiny_model(
        tmp_path_factory.mktemp(request.param),
        dtype="float32",
        tokenizer=True,
        **{"initializer_range": 0.1, **MODELS[request.param]},
    )

    def spread(tensors: dict[str, torch.Tensor]) -> None:
        generator = torch.Generator().manual_seed(1)
        for tensor in tensors.values():
            if tensor.dim() == 1:
                tensor.uniform_(0.5, 1.5, generator=generator)

    rewrite(directory, spread)
    return directory


@pytest.fixture
def check(engine: Any, score: Any, prompts: list[str]) -> Any:
    """``check(reference, directory, **arguments)``: tokens and log-probabilities."""

    def run(reference: ReferenceModel, directory: Path, **arguments: Any) -> None:
        from vllm import SamplingParams

        exact = reference.dtype == torch.float32
        parameters = SamplingParams(
            max_tokens=NEW_TOKENS, temperature=0, ignore_eos=True
        )
        with engine(
            model=str(directory),
            dtype=str(reference.dtype).removeprefix("torch."),
            max_model_len=256,
            **{"block_size": 16, **arguments},
        ) as llm:
            outputs = llm.generate(prompts[:6], parameters, use_tqdm=False)
            sequences = [
                [*o.prompt_token_ids, *o.outputs[0].token_ids] for o in outputs
            ]
            served = score(llm, sequences)
        largest = 0.0
        for output, ids, logits in zip(outputs, sequences, served, strict=True):
            expected = reference(torch.tensor(ids))[:-1]
            apart = logits.log_softmax(-1) - expected.log_softmax(-1)
            assert apart.abs().max() < (EPS if exact else EPS_BF16)
            start = len(output.prompt_token_ids)
            chosen = expected[start - 1 :].argmax(-1).tolist()
            assert ids[start:] == chosen or not exact
            largest = max(largest, float(expected.abs().max()))
        assert largest > 1

    return run


def test_with_the_flag_alone(check: Any, served_reference: Any, plain: Path) -> None:
    check(served_reference("w4a4kv4", directory=str(plain)), plain)


@pytest.mark.parametrize("plain", ["qwen2", "gemma3", "opt", "gpt2"], indirect=True)
def test_bfloat16(check: Any, served_reference: Any, plain: Path) -> None:
    """Biases, norms and the embedding's scale are rounded where the server rounds."""
    check(served_reference("w4a4kv4", torch.bfloat16, str(plain)), plain)


@pytest.mark.usefixtures("short_default_text")
def test_calibrated(
    check: Any, served_checkpoint: Any, plain: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    config = json.loads((plain / "config.json").read_text())
    recipe = FIXED if "num_experts_per_tok" in config else LEARNED
    calibrate(str(plain), out, Recipe.model_validate(recipe), default_text(), "cpu")
    reference = served_checkpoint(out)
    ratios = reference.config.scheme.activations.kept()
    assert len(set(ratios)) > 2 or recipe is FIXED
    check(reference, out, quantization=None)


@pytest.mark.parametrize("plain", ["mistral", "gemma2"], indirect=True)
def test_a_cache_of_16_bits(check: Any, served_reference: Any, plain: Path) -> None:
    """vLLM's own attention gets the same window, queries and keys."""
    choice = {"quantization_config_dict_json": json.dumps({"scheme": "w4a4"})}
    reference = served_reference("w4a4", directory=str(plain))
    # The smallest page of vLLM's attention on a CPU.
    check(reference, plain, hf_overrides=choice, block_size=32)


@pytest.mark.parametrize("plain", ["mixtral", "qwen2"], indirect=True)
def test_activations_per_group(check: Any, served_reference: Any, plain: Path) -> None:
    """Also of experts, whose inputs are quantized once and sent to several."""
    scheme = "w4a4kv4-g64-ag64"
    choice = json.dumps({"scheme": scheme})
    reference = served_reference(scheme, directory=str(plain))
    check(reference, plain, hf_overrides={"quantization_config_dict_json": choice})


@pytest.mark.parametrize("plain", ["gpt2"], indirect=True)
def test_an_8_bit_vocabulary(check: Any, served_reference: Any, plain: Path) -> None:
    """The head reads the codes of the embedding, whatever both are called."""
    choice = json.dumps({"scheme": "w4a4kv4", "vocab_bits": 8})
    scheme = scheme_from_name("w4a4kv4", vocab_bits=8)
    reference = served_reference(scheme, directory=str(plain))
    overrides = {"quantization_config_dict_json": choice}
    check(reference, plain, hf_overrides=overrides)
