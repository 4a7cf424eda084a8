# SPDX-License-Identifier: Apache-2.0
"""One real `vllm serve`, compiled and in bfloat16: its kernels, clients and truth."""

import concurrent.futures
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
import torch
from safetensors.torch import load_file

from vllm_lowbit.calibrate.reference_model import ReferenceModel, load_time_config
from vllm_lowbit.kernels.hadamard_quantize.reference import hadamard_quantize
from vllm_lowbit.kernels.kv4_store.layout import bytes_per_token
from vllm_lowbit.kernels.kv4_store.reference import kv4_store
from vllm_lowbit.kernels.linear_w4a4.reference import accumulators, epilogue
from vllm_lowbit.schema import scheme_from_name
from vllm_lowbit.threads import SPIN_COUNT, TURNS

pytestmark = pytest.mark.live

NAME = "ref-7m"
# Compiling takes minutes where another process has the cores.
READY_SECONDS = 480
LINEARS = 4  # per layer: qkv, o, gate_up, down


@pytest.fixture(scope="module")
def server(
    model: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[SimpleNamespace]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = tmp_path_factory.mktemp("server") / "log"
    command = [
        str(Path(sys.executable).parent / "vllm"),
        *("serve", model, "--quantization", "lowbit"),
        *("--served-model-name", NAME, "--host", "127.0.0.1", "--port", str(port)),
        *("--kv-cache-memory-bytes", str(64 << 20), "--max-model-len", "1024"),
        *("--worker-extension-cls", "probe.Probe"),
    ]
    environment = {
        **os.environ,
        "VLLM_SERVER_DEV_MODE": "1",
        "PYTHONPATH": str(Path(__file__).parent),
    }
    with log.open("w") as out:
        process = subprocess.Popen(
            command, stdout=out, stderr=out, env=environment, process_group=0
        )
    url = f"http://127.0.0.1:{port}"
    try:
        _wait(process, url, log)
        yield SimpleNamespace(url=url, log=log, pid=process.pid)
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(timeout=30)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)


def _wait(process: subprocess.Popen, url: str, log: Path) -> None:
    deadline = time.monotonic() + READY_SECONDS
    while time.monotonic() < deadline:
        assert process.poll() is None, log.read_text()[-4000:]
        try:
            if httpx.get(f"{url}/health", timeout=5).status_code == 200:
                return
        except httpx.TransportError:
            time.sleep(0.5)
    raise AssertionError(f"not ready in {READY_SECONDS} s: {log.read_text()[-4000:]}")


@pytest.fixture(scope="module")
def client(server: SimpleNamespace) -> Any:
    from openai import OpenAI

    return OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


@pytest.fixture(scope="module")
def recorded(
    server: SimpleNamespace, client: Any, prompts: list[str], tmp_path_factory: Any
) -> dict[str, torch.Tensor]:
    """What the worker saw during the prefill of one prompt of over 128 tokens."""
    path = tmp_path_factory.mktemp("probe") / "seen.safetensors"

    def call(method: str, *args: str) -> None:
        body = {"method": method, "args": args}
        httpx.post(
            f"{server.url}/collective_rpc", json=body, timeout=60
        ).raise_for_status()

    call("lowbit_record")
    client.completions.create(model=NAME, prompt=" ".join(prompts), max_tokens=1)
    call("lowbit_save", str(path))
    return load_file(path)


def test_codes_and_accumulators_are_the_reference(
    recorded: dict[str, torch.Tensor], model: str
) -> None:
    """Every linear and its output, bit for bit, on the inputs the server gave it."""
    config = load_time_config(model, scheme_from_name("w4a4kv4"))
    linears = list(ReferenceModel(model, config).linears.values())
    assert len(linears) == 6 * LINEARS
    for i, linear in enumerate(linears):
        x = recorded[f"input.{i}.0"]
        assert x.dtype == torch.bfloat16
        grid, weight = linear.activations, linear.weight
        codes, scale, zero_point = hadamard_quantize(
            x, weight.input_scale, linear.order, linear.stride, grid.bits, False
        )
        assert codes.unique().numel() == 16
        assert torch.equal(recorded[f"linear.{i}.0"], codes)
        assert torch.equal(recorded[f"linear.{i}.1"], zero_point)
        acc = accumulators(codes, zero_point, weight.codes, None, 1)
        assert torch.equal(recorded[f"linear.{i}.2"], acc)
        out = epilogue(acc, scale, weight.scale, None, torch.bfloat16)
        assert torch.equal(recorded[f"linear.{i}.3"], out)


def test_pages_in_the_live_cache_are_the_reference_packing(
    recorded: dict[str, torch.Tensor],
) -> None:
    pages = recorded["pages"].view(torch.uint8)
    key, value = recorded["kv.0.0"], recorded["kv.1.0"]
    block_size = pages.shape[2]
    full = len(key) // block_size
    assert full >= 1
    expected = torch.zeros(full, *pages.shape[1:], dtype=torch.uint8)
    slots = torch.arange(full * block_size)
    kv4_store(key[: len(slots)], value[: len(slots)], expected, slots, True)
    for page in expected:
        matches = (pages == page).flatten(1).all(dim=1)
        assert int(matches.sum()) == 1


def test_log_tells_what_runs(server: SimpleNamespace) -> None:
    lines = re.findall(r"lowbit (\w+): (.*)", server.log.read_text())
    classes = dict(lines)
    assert len(lines) == len(classes) == 6
    for role in ("qkv_proj", "o_proj", "gate_up_proj", "down_proj"):
        assert "weights int4" in classes[role]
        assert "activations int4" in classes[role]
        assert "backend cpu" in classes[role]
    assert classes["vocabulary"].startswith("embedding and head unquantized, no")
    assert "KV cache int4" in classes["attention"]
    assert "backend cpu" in classes["attention"]


def test_idle_threads_of_the_worker_sleep(server: SimpleNamespace) -> None:
    started = b"".join(
        (directory / "environ").read_bytes()
        for directory in _descendants(server.pid)
        if b"VLLM::Worker" in (directory / "cmdline").read_bytes()
    )
    assert f"{SPIN_COUNT}={TURNS}".encode() in started.split(b"\0")


def _descendants(pid: int) -> list[Path]:
    """Folders of all processes below one."""
    tasks = Path(f"/proc/{pid}/task").glob("*/children")
    children = [int(child) for task in tasks for child in task.read_text().split()]
    below = [folder for child in children for folder in _descendants(child)]
    return [Path(f"/proc/{child}") for child in children] + below


def test_metrics(server: SimpleNamespace) -> None:
    text = httpx.get(f"{server.url}/metrics", timeout=10).text
    info = re.search(r"^vllm_lowbit_info\{(.*)\} 1\.0$", text, re.MULTILINE)
    assert info is not None
    labels = dict(re.findall(r'(\w+)="([^"]*)"', info[1]))
    assert labels.pop("rotation").startswith("attn_input:online,k:online,v:folded")
    assert labels == {
        "model_name": NAME,
        "engine": "0",
        "weights": "int4",
        "activations": "int4",
        "kv": "int4",
        "vocabulary": "unquantized",
        "backend": "cpu",
        "checkpoint": "plain",
    }
    pattern = r"^vllm_lowbit_(\w+)\{(.*)\} (\S+)$"
    found = {m[1]: m for m in re.finditer(pattern, text, re.MULTILINE)}
    assert float(found["kv_bytes_per_token"][3]) == 6 * 2 * bytes_per_token(64)
    assert float(found["kv_capacity_ratio"][3]) == 256 / bytes_per_token(64)
    assert 'rank="0"' in found["load_seconds"][2]
    assert 0 < float(found["load_seconds"][3]) < 300


def test_completion_streaming_and_logprobs(client: Any) -> None:
    request = {"model": NAME, "prompt": "The old house", "max_tokens": 16}
    whole = client.completions.create(**request, temperature=0, logprobs=3)
    choice = whole.choices[0]
    assert whole.usage.completion_tokens == 16
    assert len(choice.logprobs.tokens) == 16
    assert all(value <= 0 for value in choice.logprobs.token_logprobs)
    stream = client.completions.create(**request, temperature=0, stream=True)
    chunks = [chunk.choices[0].text for chunk in stream]
    assert len(chunks) > 4
    assert "".join(chunks) == choice.text


def test_chat(client: Any) -> None:
    request = {
        "model": NAME,
        "messages": [{"role": "user", "content": "The old house stood empty."}],
        "max_tokens": 12,
        "temperature": 0,
    }
    answer = client.chat.completions.create(**request, logprobs=True, top_logprobs=2)
    assert answer.choices[0].message.content
    assert len(answer.choices[0].logprobs.content) == 12
    stream = client.chat.completions.create(**request, stream=True)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in stream)
    assert text == answer.choices[0].message.content


def test_several_choices(client: Any) -> None:
    result = client.completions.create(
        model=NAME, prompt="The old", max_tokens=8, n=3, temperature=1.0, seed=1
    )
    assert sorted(choice.index for choice in result.choices) == [0, 1, 2]
    assert len({choice.text for choice in result.choices}) > 1


def test_concurrent_requests(client: Any, prompts: list[str]) -> None:
    """Each answer belongs to its own prompt: it starts with it."""

    def ask(prompt: str) -> str:
        result = client.completions.create(
            model=NAME, prompt=prompt, max_tokens=8, temperature=0, echo=True
        )
        return result.choices[0].text

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(ask, prompts))
    for prompt, answer in zip(prompts, answers, strict=True):
        assert answer.startswith(prompt)
        assert len(answer) > len(prompt)


def test_bad_requests_are_the_clients_fault(
    server: SimpleNamespace, client: Any
) -> None:
    request = {"model": NAME, "prompt": "The old house", "max_tokens": 8}
    canary = client.completions.create(**request, temperature=0).choices[0].text
    bodies = [
        b"{",
        json.dumps({**request, "max_tokens": -1}).encode(),
        json.dumps({**request, "prompt": [1 << 40]}).encode(),
        json.dumps({**request, "prompt": "word " * 5000}).encode(),
        json.dumps({**request, "model": "other"}).encode(),
        json.dumps({**request, "temperature": -2}).encode(),
    ]
    for body in bodies:
        response = httpx.post(
            f"{server.url}/v1/completions",
            content=body,
            headers={"Content-Type": "application/json"},
            timeout=30,
        )
        assert 400 <= response.status_code < 500, (body[:80], response.text)
    assert client.completions.create(**request, temperature=0).choices[0].text == canary
