# SPDX-License-Identifier: Apache-2.0
"""Engines inside the test process: the same worker code as a server, in seconds."""

import contextlib
import datetime
import gc
import json
import os
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from vllm_lowbit.architecture import ROUTER
from vllm_lowbit.calibrate.offline_engine import release
from vllm_lowbit.calibrate.reference_model import (
    ReferenceModel,
    Scores,
    load_time_config,
)
from vllm_lowbit.schema import Scheme, scheme_from_name

ROOT = Path(__file__).parents[2]
MODEL = ROOT / "models" / "ref-7m"
RESULTS = ROOT / "benchmarks" / "results"
# Of the pages that vLLM's attention reads.
BLOCK_SIZE = 32
# Of its largest output in float32: its exponentials are approximations.
ATTENTION_EPS = 1e-4
PACKAGES = ("torch", "vllm", "vllm-lowbit")
PROMPTS = [
    "The old house stood at the end of the lane, and",
    "In the morning the rain had stopped. She opened the window and",
    "The history of the county begins with",
    '"I do not believe a word of it," said the doctor,',
    "After the war the company moved its offices to",
    "The river was wide there, and the ferryman",
    "It was nearly midnight when the carriage",
    "The album was released in the United States on",
    "My dear sister, I write to tell you that",
    "The species was first described by",
    "He had walked all day without meeting anyone, when",
    "Towards the end of the season the team",
    "There was no answer. He knocked again, louder, and",
    "The king sent for his three sons and told them",
    "The building was designed in the style of",
    "Nothing is so tiresome as",
    "They sailed from the harbour with a fair wind, but",
    "The novel received mixed reviews from critics, who",
    "A small boy was sitting on the step, eating",
    "The storm formed over the Atlantic on",
]


def _results(name: str, test: str) -> Iterator[dict[str, Any]]:
    """What the tests of one file measured; with LOWBIT_WRITE_RESULTS set, the
    committed result is written anew."""
    measured: dict[str, Any] = {}
    yield measured
    if os.environ.get("LOWBIT_WRITE_RESULTS"):
        environment = {
            "date": datetime.date.today().isoformat(),
            "cpu": torch.backends.cpu.get_cpu_capability(),
            **{package: version(package) for package in PACKAGES},
        }
        command = f"LOWBIT_WRITE_RESULTS=1 .venv/bin/pytest tests/live/test_{test}.py"
        result = {"command": command, "environment": environment, **measured}
        path = RESULTS / f"{name}.json"
        path.write_text(json.dumps(result, indent=2) + "\n")


@pytest.fixture(scope="session")
def agreement() -> Iterator[dict[str, Any]]:
    """Measured by the tests of the reference."""
    yield from _results("agreement", "reference")


@pytest.fixture(scope="session")
def export_perplexities() -> Iterator[dict[str, Any]]:
    """Measured by the tests of exported checkpoints."""
    yield from _results("export", "export")


@pytest.fixture(scope="session")
def model() -> str:
    """Directory of the model that ships with the repository."""
    return str(MODEL)


@pytest.fixture(scope="session")
def prompts() -> list[str]:
    """Twenty prompts of novels and articles."""
    return PROMPTS


class _ServedReference(ReferenceModel):
    """The reference with vLLM's own norm, activation, RoPE, router and attention over
    a 16-bit cache in between.

    They are not ours, and a last bit of theirs can flip a code. Router and attention
    are close to the reference's own, or a test that uses this fails.
    """

    def _add_norm(
        self, x: torch.Tensor, residual: torch.Tensor, name: str
    ) -> tuple[torch.Tensor, torch.Tensor]:
        from vllm import ir

        if self.own.layer_norm:
            return super()._add_norm(x, residual, name)
        weight = self._served_gain(name)
        x = x.to(self.dtype)
        if not residual.any():
            return self._norm(x, name), x.float()
        normed, residual = ir.ops.fused_add_rms_norm(
            x, residual.to(self.dtype), weight, self.eps, None
        )
        return normed.float(), residual.float()

    def _normed(self, x: torch.Tensor, name: str) -> torch.Tensor:
        from vllm import ir

        if self.own.layer_norm:
            weight, bias = (
                self.tensors[f"{name}.{kind}"].to(self.dtype)
                for kind in ("weight", "bias")
            )
            return torch.nn.functional.layer_norm(
                x.to(self.dtype), x.shape[-1:], weight, bias, self.eps
            ).float()
        weight = self._served_gain(name)
        return ir.ops.rms_norm(x.to(self.dtype), weight, self.eps, None).float()

    def _served_gain(self, name: str) -> torch.Tensor:
        """Of a norm, in the dtype that vLLM has it in."""
        gain = self._gain(name)
        return gain if self.own.norm_offset else gain.to(self.dtype)

    def _activated(self, out: torch.Tensor) -> torch.Tensor:
        from vllm.model_executor.layers.activation import (
            GeluAndMul,
            NewGELU,
            SiluAndMul,
        )

        if self.own.activation == "relu":
            return super()._activated(out)
        gate_up = out.to(self.dtype)
        if self.own.activation == "gelu_new":
            return NewGELU.forward_native(None, gate_up).float()
        if self.own.activation == "silu":
            return SiluAndMul.forward_native(gate_up).float()
        tanh = SimpleNamespace(approximate="tanh")
        return GeluAndMul.forward_native(tanh, gate_up).float()

    def _routed(
        self, h: torch.Tensor, prefix: str
    ) -> tuple[torch.Tensor, torch.Tensor]:
        from vllm.model_executor.layers.fused_moe.router.cpu_router import (
            select_experts,
        )
        from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm

        router = self.tensors[f"{prefix}{ROUTER}.weight"].to(self.dtype)
        layer = torch.nn.Module()
        layer.weight = torch.nn.Parameter(router, requires_grad=False)
        dispatch_cpu_unquantized_gemm(layer, remove_weight=False)
        logits = layer.cpu_linear(h.to(self.dtype), layer.weight, None)
        weights, chosen = select_experts(
            h, logits, self.shape.experts_per_token, False, self.shape.renormalize
        )
        chosen = chosen.long()
        shares, own = (
            torch.zeros_like(logits).scatter(-1, indices, of_choice.to(self.dtype))
            for of_choice, indices in ((weights, chosen), super()._routed(h, prefix))
        )
        torch.testing.assert_close(shares, own)
        return weights, chosen

    def _rope(
        self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
    ) -> torch.Tensor:
        from vllm import _custom_ops as ops

        half = x.shape[-1] // 2
        table = torch.cat((cos[:, :half], sin[:, :half]), -1).to(self.dtype)
        rotated = x.flatten(1).to(self.dtype).clone()
        positions = torch.arange(len(x))
        ops.rotary_embedding(
            positions, rotated, rotated.clone(), x.shape[-1], table, True
        )
        return rotated.view_as(x).float()

    def _attend(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, of_scores: Scores
    ) -> torch.Tensor:
        from vllm import _custom_ops as ops
        from vllm import envs
        from vllm.v1.attention.backends.cpu_attn import _get_attn_isa

        own = super()._attend(q, k, v, of_scores)
        if self.config.scheme.kv_cache.bits == 4:
            return own
        q, k, v = (t.to(self.dtype).contiguous() for t in (q, k, v))
        (tokens, num_heads, head_dim), num_kv_heads = q.shape, k.shape[1]
        isa = _get_attn_isa(self.dtype, BLOCK_SIZE, head_dim)
        blocks = -(-tokens // BLOCK_SIZE)
        pages = q.new_zeros(blocks, num_kv_heads, 2 * BLOCK_SIZE, head_dim)
        key_cache, value_cache = pages.chunk(2, dim=2)
        slots = torch.arange(tokens)
        ops.cpu_attn_reshape_and_cache(k, v, key_cache, value_cache, slots, isa)
        starts = torch.tensor([0, tokens], dtype=torch.int32)
        window = -1 if of_scores.window is None else of_scores.window
        scheduled = ops.cpu_attn_get_scheduler_metadata(
            num_reqs=1,
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            seq_lens=starts[1:],
            dtype=self.dtype,
            query_start_loc=starts,
            causal=True,
            sliding_window_size=window,
            isa=isa,
            enable_kv_split=envs.VLLM_CPU_ATTN_SPLIT_KV,
        )
        out = torch.empty_like(q)
        ops.cpu_attention_with_kv_cache(
            query=q,
            key_cache=key_cache,
            value_cache=value_cache,
            output=out,
            query_start_loc=starts,
            seq_lens=starts[1:],
            scale=of_scores.scale,
            causal=True,
            alibi_slopes=None,
            sliding_window=window,
            block_table=torch.arange(blocks, dtype=torch.int32).unsqueeze(0),
            softcap=of_scores.cap or 0,
            scheduler_metadata=scheduled,
            s_aux=None,
        )
        out = out.float()
        assert (out - own).abs().max() < ATTENTION_EPS * own.abs().max()
        return out


@pytest.fixture(scope="session")
def served_reference(model: str) -> Any:
    """``served_reference(scheme, dtype, directory)``: the reference of an eager server
    of a plain checkpoint."""

    def build(
        scheme: str | Scheme,
        dtype: torch.dtype = torch.float32,
        directory: str = model,
    ) -> ReferenceModel:
        if isinstance(scheme, str):
            scheme = scheme_from_name(scheme)
        config = load_time_config(directory, scheme)
        return _ServedReference(directory, config, dtype)

    return build


@pytest.fixture(scope="session")
def served_checkpoint() -> Any:
    """``served_checkpoint(directory, dtype)``: the same of a lowbit checkpoint."""
    return lambda directory, dtype=torch.float32: _ServedReference(
        str(directory), None, dtype
    )


@contextlib.contextmanager
def _frozen_heap() -> Iterator[None]:
    """vLLM collects garbage several times an engine: not among what was here before."""
    gc.freeze()
    try:
        with pytest.MonkeyPatch.context() as patch:
            for name in ("freeze", "unfreeze"):
                patch.setattr(gc, name, lambda: None)
            yield
    finally:
        gc.unfreeze()


@contextlib.contextmanager
def _engine(multiprocessing: bool = False, **arguments: Any) -> Iterator[Any]:
    from vllm import LLM

    settings = {
        "model": str(MODEL),
        "quantization": "lowbit",
        "kv_cache_memory_bytes": 64 << 20,
        "enforce_eager": True,
        "max_model_len": 1024,
        "disable_log_stats": True,
    }
    set_num_threads, threads = torch.set_num_threads, torch.get_num_threads()
    llm = None
    apart = str(int(multiprocessing))
    with _frozen_heap():
        try:
            with pytest.MonkeyPatch.context() as patch:
                patch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", apart)
                llm = LLM(**{**settings, **arguments})
            yield llm
        finally:
            release(llm)
            torch.set_num_threads = set_num_threads  # the CPU worker disables it
            torch.set_num_threads(threads)


def _worker_model(llm: Any) -> torch.nn.Module:
    """The model object of an engine whose worker lives in this process."""
    executor = llm.llm_engine.engine_core.engine_core.model_executor
    return executor.driver_worker.worker.model_runner.model


def _score(llm: Any, sequences: list[list[int]]) -> list[torch.Tensor]:
    """Logits ``[tokens - 1, vocabulary]`` of each sequence, given its own tokens."""
    from vllm import SamplingParams

    model, seen = _worker_model(llm), []
    compute = type(model).compute_logits

    def record(hidden_states: torch.Tensor) -> torch.Tensor:
        logits = compute(model, hidden_states)
        seen.append(logits.float().clone())
        return logits

    model.compute_logits = record
    scored = []
    parameters = SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=0)
    for ids in sequences:
        seen.clear()
        llm.generate([{"prompt_token_ids": ids}], parameters, use_tqdm=False)
        scored.append(next(rows for rows in seen if len(rows) == len(ids) - 1))
    del model.compute_logits
    return scored


@pytest.fixture(scope="session")
def worker_model() -> Any:
    """``worker_model(llm)``: the model object inside an engine."""
    return _worker_model


@pytest.fixture(scope="session")
def score() -> Any:
    """``score(llm, sequences)``: teacher-forced logits of each sequence."""
    return _score


@pytest.fixture(scope="session")
def engine() -> Any:
    """``engine(**arguments)``: context manager of an offline engine of ref-7m."""
    return _engine
