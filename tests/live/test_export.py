# SPDX-License-Identifier: Apache-2.0
"""Stock vLLM runs an exported checkpoint as what it was calibrated to be."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch

from vllm_lowbit.calibrate.evaluate import evaluate
from vllm_lowbit.calibrate.export import export
from vllm_lowbit.calibrate.offline_engine import offline_engine, prompt_losses
from vllm_lowbit.calibrate.perplexity import (
    Scored,
    mean_perplexity,
    negative_log_likelihood,
    tokenize,
    windows,
)
from vllm_lowbit.calibrate.pipeline import calibrate
from vllm_lowbit.calibrate.recipe import load_recipe
from vllm_lowbit.calibrate.text import default_text

pytestmark = pytest.mark.live

TEXT = Path(__file__).parents[2] / "benchmarks" / "data" / "wikitext-2" / "test.txt"
TOKENS = 4096
BOUND = 5e-3
# The residual stream and value heads are rotated, in the weights.
RECIPE = """
name: for-stock
scheme: {scheme}
transforms: {{residual: hadamard, value: hadamard, down_input: none}}
weights: {{method: gptq}}
data: {{samples: 8, seq_len: 128}}
"""
KERNELS = {"w4a16-g128": "CompressedTensorsWNA16", "w8a8": "CompressedTensorsW8A8Int8"}


@pytest.fixture(scope="module", params=KERNELS)
def exported(
    request: pytest.FixtureRequest, model: str, tmp_path_factory: Any
) -> tuple[str, Path, float]:
    """Scheme, exported checkpoint, and perplexity of the lowbit one."""
    root = tmp_path_factory.mktemp(request.param)
    (root / "recipe.yaml").write_text(RECIPE.format(scheme=request.param))
    recipe = load_recipe(str(root / "recipe.yaml"))
    report = calibrate(model, root / "lowbit", recipe, default_text())
    rotations = report.config.rotations
    folded = [rotations.residual, rotations.v]
    assert [r.apply for r in folded if r is not None] == ["folded", "folded"]
    export(root / "lowbit", root / "out")
    measured = evaluate(str(root / "lowbit"), TEXT, max_tokens=TOKENS)
    return request.param, root / "out", measured.perplexity


def perplexity(losses: Iterable[float], parts: list[torch.Tensor]) -> float:
    predicted = sum(len(window) - 1 for window in parts)
    return mean_perplexity(list(losses), predicted).perplexity


def test_stock_vllm(
    exported: tuple[str, Path, float],
    worker_model: Any,
    export_perplexities: dict[str, Any],
) -> None:
    """In the dtype that it chooses itself."""
    scheme, directory, expected = exported
    if scheme != "w8a8":
        require_packed_kernel()
    parts = windows(tokenize(str(directory), TEXT, TOKENS), 512)
    with offline_engine(str(directory), 512, 1 << 14, False) as llm:
        config = llm.llm_engine.vllm_config
        assert config.quant_config.get_name() == "compressed-tensors"
        layers = worker_model(llm).model.layers
        linears = [
            linear
            for layer in layers
            for linear in (layer.self_attn.qkv_proj, layer.mlp.down_proj)
        ]
        methods = {type(linear.quant_method).__module__ for linear in linears}
        assert {method.partition(".")[0] for method in methods} == {"vllm"}
        assert {type(linear.scheme).__name__ for linear in linears} == {KERNELS[scheme]}
        served = perplexity(prompt_losses(llm, map(Scored, parts)), parts)
    export_perplexities[scheme] = {
        "lowbit checkpoint, reference": expected,
        "exported, stock vLLM": served,
    }
    assert served == pytest.approx(expected, rel=BOUND)


def require_packed_kernel() -> None:
    """Skip where vLLM's build for this CPU lacks it: the one for AVX2 does."""
    from vllm.platforms import current_platform

    current_platform.import_kernels()
    if current_platform.is_cpu():
        try:
            torch.ops._C.cpu_gemm_wna16  # noqa: B018
        except AttributeError as error:
            pytest.skip(f"stock vLLM cannot run W4A16 on this CPU: {error}")


def test_compressed_tensors_itself(exported: tuple[str, Path, float]) -> None:
    """Its own decompression, with activations that are not quantized."""
    from transformers import AutoModelForCausalLM

    _, directory, expected = exported
    parts = windows(tokenize(str(directory), TEXT, TOKENS), 512)
    plain = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    with torch.inference_mode():
        losses = [
            negative_log_likelihood(plain(window[None]).logits[0], window)
            for window in parts
        ]
    assert perplexity(losses, parts) == pytest.approx(expected, rel=BOUND)
