# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of other tools, served as what they declare."""

import json
import runpy
import shutil
from itertools import cycle
from pathlib import Path
from typing import Any

import pytest
import torch

from vllm_lowbit.calibrate.reference_model import ReferenceModel
from vllm_lowbit.kernels.hadamard_quantize.reference import hadamard_quantize
from vllm_lowbit.kernels.linear_w4a4.reference import accumulators, epilogue

pytestmark = pytest.mark.live

EPS = 1e-3
Probe = runpy.run_path(str(Path(__file__).parent / "probe.py"))["Probe"]


@pytest.fixture(scope="module")
def sequences(model: str, prompts: list[str]) -> list[list[int]]:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    return [tokenizer(prompt)["input_ids"] for prompt in prompts[:6]]


def log_probs(logits: list[torch.Tensor]) -> torch.Tensor:
    return torch.cat(logits).log_softmax(-1)


def expected(reference: ReferenceModel, sequences: list[list[int]]) -> torch.Tensor:
    return log_probs([reference(torch.tensor(ids))[:-1] for ids in sequences])


def relabelled(directory: Path, copy: Path) -> Path:
    """The same weights, declared without quantized activations."""
    shutil.copytree(directory, copy)
    config = json.loads((copy / "config.json").read_text())
    group = config["quantization_config"]["config_groups"]["group_0"]
    assert group.pop("input_activations")["num_bits"] == 4
    (copy / "config.json").write_text(json.dumps(config))
    return copy


@pytest.mark.parametrize(
    ("kind", "arguments", "scheme"),
    [
        ("pack-quantized", {"group_size": 32}, "w4a16-g32"),
        ("pack-quantized", {"symmetric": False, "activations": 8}, "w4a8"),
        ("int-quantized", {"bits": 8, "activations": 8}, "w8a8"),
        ("gptq", {"group_size": 128}, "w4a16-g128"),
        ("gptq_v2", {"symmetric": False, "group_size": 64}, "w4a16-g64"),
        ("awq", {"symmetric": False, "group_size": 128}, "w4a16-g128"),
    ],
)
def test_format(
    foreign_checkpoint: Any,
    served_checkpoint: Any,
    engine: Any,
    score: Any,
    model: str,
    sequences: list[list[int]],
    tmp_path: Path,
    kind: str,
    arguments: dict[str, Any],
    scheme: str,
) -> None:
    directory = foreign_checkpoint(tmp_path, model, kind, **arguments)
    reference = served_checkpoint(directory)
    assert reference.scheme_name == scheme
    with engine(model=str(directory), dtype="float32") as llm:
        served = log_probs(score(llm, sequences))
    assert (served - expected(reference, sequences)).abs().max() < EPS


def check_integers(reference: Any, seen: dict[str, list[Any]]) -> None:
    """4-bit codes, int32 sums and outputs, on the inputs the server gave it."""
    linears = list(reference.linears.values())
    calls = list(zip(seen["input"], seen["linear"], strict=True))
    assert calls and len(calls) % len(linears) == 0
    for linear, ([x], [codes, zero_point, sums, out]) in zip(cycle(linears), calls):
        rows, scale, zeros = hadamard_quantize(x, None, 1, 1, 4, True)
        assert codes.dtype == torch.int8 and sums.dtype == torch.int32
        assert (codes.abs().amax(dim=1) == 7).all()
        assert torch.equal(codes, rows) and torch.equal(zero_point, zeros)
        wanted = accumulators(codes, zeros, linear.weight.codes, None, 1)
        assert torch.equal(sums, wanted)
        finished = epilogue(wanted, scale, linear.weight.scale, None, out.dtype)
        assert torch.equal(out, finished)


@pytest.fixture
def stock_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM chooses its 4-bit CPU kernel everywhere, but builds for AVX2 lack it."""
    from vllm import _custom_ops
    from vllm.platforms import current_platform

    current_platform.import_kernels()

    def product(
        input: torch.Tensor, q_weight: torch.Tensor, scales: torch.Tensor, **_: Any
    ) -> torch.Tensor:
        """``input`` times the dequantized symmetric weight, 16 outputs in a block."""
        words = q_weight.view(len(q_weight), -1, 2, 1) >> torch.arange(0, 32, 4)
        codes = (words % 16 - 8).flatten(2).transpose(0, 1).flatten(1)
        return (input.float() @ (codes * scales.float())).to(input.dtype)

    if not hasattr(torch.ops._C, "cpu_gemm_wna16"):
        monkeypatch.setattr(_custom_ops, "cpu_gemm_wna16", product)


def test_w4a4_is_not_w4a16_as_in_stock_vllm(
    foreign_checkpoint: Any,
    served_checkpoint: Any,
    engine: Any,
    score: Any,
    model: str,
    prompts: list[str],
    sequences: list[list[int]],
    stock_kernel: None,
    tmp_path: Path,
) -> None:
    """The same checkpoint declared W4A4 and W4A16: we run two models, vLLM one."""
    from vllm import SamplingParams

    w4a4 = foreign_checkpoint(tmp_path / "w4a4", model, "pack-quantized", activations=4)
    w4a16 = relabelled(w4a4, tmp_path / "w4a16")
    reference, probe = served_checkpoint(w4a4), Probe()
    with engine(model=str(w4a4), dtype="float32") as llm:
        probe.lowbit_record()
        served = log_probs(score(llm, sequences))
        for undo in probe.undo:
            undo()
    check_integers(reference, probe.seen)
    assert (served - expected(reference, sequences)).abs().max() < EPS
    other = expected(served_checkpoint(w4a16), sequences)
    assert (served - other).abs().max() > 10 * EPS

    parameters = SamplingParams(max_tokens=8, temperature=0, logprobs=5)
    answers = []
    for directory in (w4a4, w4a16):
        with engine(model=str(directory), quantization=None, dtype="bfloat16") as llm:
            assert llm.model_config.quantization == "compressed-tensors"
            requests = llm.generate(prompts[:6], parameters, use_tqdm=False)
        answers.append([(o.token_ids, o.logprobs) for r in requests for o in r.outputs])
    assert answers[0] == answers[1]
