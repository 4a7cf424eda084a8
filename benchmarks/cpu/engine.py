# SPDX-License-Identifier: Apache-2.0
"""Prefill and decode of one arm, in one engine: every workload, step by step.

The clock is read whenever the engine hands over the tokens of a step. Prefill lasts
until every sequence has its first token. A decode step is the time between two
hand-overs in which each sequence got one token; there are enough of them for a median,
so a long decode ends early, and the seconds of the whole are then computed.

A prefill step takes at most CHUNK tokens, so that of 8 or 32 prompts of 1024 repeats
what a single one does. Sequences of those workloads share their first 1024 tokens,
which are computed once; ``--full`` gives each its own.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from .arms import ARMS, engine_arguments
from .options import Options

REPEAT_SECONDS = 30.0
MAX_RUNS = 5
DECODE_SECONDS = 15.0
MIN_STEPS = 8


@dataclass(frozen=True)
class Workload:
    """A batch of random prompts that arrive together.

    Attributes:
        batch: sequences.
        input_len: tokens of each prompt.
        output_len: tokens to generate.
        shared: all prompts but their last token are one, computed beforehand.
    """

    batch: int
    input_len: int
    output_len: int
    shared: bool = False

    @property
    def name(self) -> str:
        return f"{self.batch} x {self.input_len}/{self.output_len}"


WORKLOADS = (
    Workload(1, 128, 128),
    Workload(8, 128, 128),
    Workload(32, 128, 128),
    Workload(1, 1024, 32),
    Workload(8, 1024, 32, shared=True),
    Workload(32, 1024, 32, shared=True),
)
QUICK = (Workload(1, 128, 12), Workload(8, 128, 12), Workload(4, 256, 12, shared=True))


@dataclass(frozen=True)
class Run:
    """One pass of a workload.

    Attributes:
        prefill: seconds until every sequence had a token.
        steps: seconds of each decode step that was measured.
        seconds: of all of it.
        cached: seconds until every sequence had a token, the prompt being computed;
            None where none was shared.
    """

    prefill: float
    steps: list[float]
    seconds: float
    cached: float | None = None


def measure(name: str, options: Options) -> dict[str, Any]:
    """All workloads of one arm.

    Args:
        name: of the arm.
        options: of this run.

    """
    from vllm import LLM

    arm = ARMS[name]
    model = str(arm.checkpoint(options))
    started = time.perf_counter()
    llm = LLM(
        model,
        skip_tokenizer_init=True,
        enable_prefix_caching=True,
        **engine_arguments(),
        **arm.quantization(),
    )
    start_seconds = time.perf_counter() - started
    run = _Runner(llm, options.model["vocab_size"], options.full)
    run(Workload(1, 128, 4))
    done = []
    for workload in QUICK if options.quick else WORKLOADS:
        chosen = replace(workload, shared=workload.shared and not options.full)
        done.append(_repeat(run, chosen))
        print(done[-1], flush=True)
    return {
        "start_seconds": round(start_seconds, 1),
        "weight_bytes": arm.weight_bytes(options.model),
        "workloads": {row.pop("name"): row for row in done},
    }


def _repeat(run: Callable[[Workload], Run], workload: Workload) -> dict[str, Any]:
    runs: list[Run] = []
    while len(runs) < MAX_RUNS and sum(r.seconds for r in runs) < REPEAT_SECONDS:
        runs.append(run(workload))
    steps = [step for one in runs for step in one.steps]
    step = statistics.median(steps)
    prefills = [one.prefill for one in runs]
    computed = workload.input_len * (1 if workload.shared else workload.batch)
    prefill = statistics.median(prefills)
    whole = prefill * workload.batch if workload.shared else prefill
    whole += (workload.output_len - 1) * step
    return asdict(workload) | {
        "name": workload.name,
        "runs": len(runs),
        "prefill_tokens_per_s": computed / prefill,
        "prefill_seconds": [round(value, 3) for value in prefills],
        "cached_prefill_seconds": [round(r.cached, 3) for r in runs if r.cached],
        "decode_ms": step * 1e3,
        "decode_ms_p10": _quantile(steps, 10) * 1e3,
        "decode_ms_p90": _quantile(steps, 90) * 1e3,
        "decode_steps": len(steps),
        "seconds": whole,
    }


def _quantile(values: list[float], percent: int) -> float:
    ordered = sorted(values)
    return ordered[round((len(ordered) - 1) * percent / 100)]


class _Runner:
    """Runs workloads in an engine, each on prompts never seen before."""

    def __init__(self, llm: Any, vocab_size: int, full: bool) -> None:
        self.llm, self.engine, self.full = llm, llm.llm_engine, full
        self.generator = torch.Generator().manual_seed(0)
        self.vocab_size = vocab_size
        self.requests = 0

    def __call__(self, workload: Workload) -> Run:
        if not workload.shared:
            prompts = [self._tokens(workload.input_len) for _ in range(workload.batch)]
            return self._run(prompts, workload.output_len)
        prefix = self._tokens(workload.input_len)
        first = self._run([prefix], 1)
        prompts = [prefix + self._tokens(1) for _ in range(workload.batch)]
        rest = self._run(prompts, workload.output_len)
        seconds = first.seconds + rest.seconds
        return Run(first.prefill, rest.steps, seconds, rest.prefill)

    def _tokens(self, count: int) -> list[int]:
        high = self.vocab_size
        return torch.randint(2, high, (count,), generator=self.generator).tolist()

    def _run(self, prompts: list[list[int]], output_len: int) -> Run:
        """Seconds of every step, the requests being queued before the clock starts."""
        self.llm.sleep(level=0, mode="abort")
        names = [self._add(prompt, output_len) for prompt in prompts]
        waiting, steps = set(names), []
        self.llm.wake_up(tags=["scheduling"])
        started = last = time.perf_counter()
        first = 0.0
        while self.engine.has_unfinished_requests():
            outputs = self.engine.step()
            now = time.perf_counter()
            produced = {o.request_id: len(o.outputs[0].token_ids) for o in outputs}
            if not waiting and list(produced.values()) == [1] * len(names):
                steps.append(now - last)
            waiting -= {name for name, count in produced.items() if count}
            if not waiting and not first:
                first = now
            if produced:
                last = now
            if first and self._enough(steps, now - first):
                break
        self.engine.abort_request(names)
        return Run(first - started, steps, last - started)

    def _enough(self, steps: list[float], seconds: float) -> bool:
        return not self.full and len(steps) >= MIN_STEPS and seconds > DECODE_SECONDS

    def _add(self, prompt: list[int], output_len: int) -> str:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        self.requests += 1
        name = str(self.requests)
        parameters = SamplingParams(
            max_tokens=output_len,
            temperature=0.0,
            ignore_eos=True,
            detokenize=False,
            output_kind=RequestOutputKind.DELTA,
        )
        self.engine.add_request(name, {"prompt_token_ids": prompt}, parameters)
        return name
