# SPDX-License-Identifier: Apache-2.0
"""`vllm serve` with input that cannot be served: exits, names it, serves nothing."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import pytest

pytestmark = pytest.mark.live

REF_7M = Path(__file__).parents[1] / "models" / "ref-7m"
# The last line a user sees when the error came from a worker process.
WORKER_FAILED = "RuntimeError: Engine core initialization failed. See root cause above."


class Case(NamedTuple):
    """A directory under the models' root, options, and what the output must hold."""

    model: str
    options: list[str]
    message: str
    in_worker: bool = False


def hf_overrides(scheme: str) -> list[str]:
    inner = json.dumps({"scheme": scheme})
    return ["--hf-overrides", json.dumps({"quantization_config_dict_json": inner})]


CASES = {
    "nan": Case(
        "nan",
        [],
        "CheckpointError: tensor model.layers.1.mlp.up_proj.weight holds a non-finite "
        "value (Inf or NaN)",
        in_worker=True,
    ),
    "kv-cache-dtype": Case(
        "sound",
        ["--kv-cache-dtype", "fp8"],
        "UnsupportedError: --kv-cache-dtype fp8 is not supported by lowbit: scheme "
        "w4a4kv4 has its own cache; leave it at auto",
        in_worker=True,
    ),
    "missing-tensor": Case(
        "incomplete",
        [],
        "incomplete: 1 tensors of the model are missing, first "
        "model.layers.0.mlp.up_proj.weight",
    ),
    "scheme": Case(
        "sound",
        hf_overrides("w5a5"),
        "scheme 'w5a5' does not exist; supported: w4a4kv4, w4a4, w4a8kv4, ",
    ),
    "architecture": Case(
        "gpt-neox",
        [],
        "config.json: architectures ['GPTNeoXForCausalLM'] is not supported; "
        "supported: LlamaForCausalLM, MistralForCausalLM, ",
    ),
    # vLLM's own message: it takes a path that does not exist for a hub name.
    "missing-directory": Case("nowhere", [], "nowhere'"),
}


class Outcome(NamedTuple):
    """What a user gets."""

    code: int
    lines: list[str]
    orphans: bool


def serve(model: Path, options: list[str]) -> Outcome:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    fixed = ["--quantization", "lowbit", "--enforce-eager", "--port", port]
    fixed += ["--kv-cache-memory-bytes", str(64 << 20)]
    process = subprocess.Popen(
        [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", str(model)]
        + fixed
        + options,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd="/",
        start_new_session=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )
    try:
        output, _ = process.communicate(timeout=400)
        orphans = group_outlives(process.pid)
    finally:
        if group_outlives(process.pid, patience=0):
            os.killpg(process.pid, signal.SIGKILL)
    return Outcome(process.returncode, output.splitlines(), orphans)


def group_outlives(group: int, patience: float = 10) -> bool:
    """Whether a process group still exists after some seconds."""
    end = time.monotonic() + patience
    while True:
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return False
        if time.monotonic() >= end:
            return True
        time.sleep(0.1)


@pytest.fixture(scope="module")
def models(tmp_path_factory: Any, tiny_model: Any, rewrite: Any) -> Path:
    root = tmp_path_factory.mktemp("models")
    tiny_model(root / "sound", tokenizer=True)
    tiny_model(root / "incomplete", tokenizer=True, shards=2)
    name = "model.layers.0.mlp.up_proj.weight"
    rewrite(root / "incomplete", lambda tensors: tensors.pop(name))
    tiny_model(root / "nan", tokenizer=True)
    name = "model.layers.1.mlp.up_proj.weight"
    rewrite(root / "nan", lambda tensors: tensors[name][3, 5:6].fill_(float("nan")))
    (root / "gpt-neox").mkdir()
    config = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config |= {"intermediate_size": 256, "vocab_size": 4096}
    config |= {"bos_token_id": 0, "eos_token_id": 1, "model_type": "gpt_neox"}
    config |= {"architectures": ["GPTNeoXForCausalLM"]}
    (root / "gpt-neox" / "config.json").write_text(json.dumps(config))
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(REF_7M / file, root / "gpt-neox")
    return root


@pytest.fixture(scope="module")
def outcomes(
    models: Path, request: pytest.FixtureRequest
) -> Iterator[dict[str, Future[Outcome]]]:
    """The selected cases, two at a time: most of a start-up runs on one core."""
    items = (item for item in request.session.items if item.path == request.path)
    selected = {item.callspec.params["case"] for item in items}  # type: ignore
    with ThreadPoolExecutor(max_workers=2) as pool:
        yield {
            name: pool.submit(serve, models / case.model, case.options)
            for name, case in CASES.items()
            if name in selected
        }


@pytest.mark.parametrize("case", CASES)
def test_refused(case: str, outcomes: dict[str, Future[Outcome]]) -> None:
    code, lines, orphans = outcomes[case].result()
    output = "\n".join(lines)
    assert code > 0, output
    assert CASES[case].message in output
    assert "Application startup complete" not in output
    assert not orphans
    # A user who reads the end of the output finds the message, or is sent upwards.
    end = "\n".join(lines[-3:])
    if CASES[case].in_worker:
        assert WORKER_FAILED in end
        place = next(n for n, line in enumerate(lines) if CASES[case].message in line)
        print(f"{case}: {len(lines) - place - 1} lines follow the message")
    else:
        assert CASES[case].message in end
