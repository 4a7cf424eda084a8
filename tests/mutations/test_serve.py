# SPDX-License-Identifier: Apache-2.0
"""`vllm serve` of a wrong checkpoint ends before it is ever healthy, and says why."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import httpx
import pytest

from .catalogue import CATALOGUE
from .mutation import VARIANTS, Mutation, Q, prepare

pytest.importorskip("vllm")
pytestmark = pytest.mark.live

SECONDS = 240
# How the worker prints ours, and how the front end does, inside one of pydantic's.
ERRORS = ("vllm_lowbit.errors.", "Value error, ")
Q_OF_NEXT = Q.replace("layers.0", "layers.1")
# By kind; two of them, one found by the front end and one by the worker, by default.
DEFAULT = (
    "deleted tensor; rotated; model.layers.0.input_layernorm.weight",
    "bit flip; rotated; model.embed_tokens.weight; bit 6",
)
SLOW = (
    "extra tensor; rotated; lm_head.input_scale; manifest agrees",
    "wrong dtype; tied; lm_head.input_scale; torch.float16; manifest agrees",
    "impossible scale; grouped; model.embed_tokens.weight_scale; nan; manifest agrees",
    "impossible code; tied; model.layers.1.mlp.up_proj.weight_packed; manifest agrees",
    "not finite; rotated; model.norm.weight; nan; manifest agrees",
    f"swapped data; sharded; {Q}.weight_packed; {Q_OF_NEXT}.weight_packed",
    "broken file; sharded; model-00002-of-00002.safetensors; cut in the data",
    "wrong index; sharded; model.safetensors.index.json; missing",
    "impossible key; rotated; order; rotations/o_input/order 3; manifest agrees",
    "other function; rotated; quantization_config.rotations.k; rotations/k null",
)


def _chosen() -> list[Any]:
    by_name = {mutation.name: mutation for mutation in CATALOGUE}
    return [
        pytest.param(by_name[name], id=name, marks=[pytest.mark.slow] * (name in SLOW))
        for name in (*DEFAULT, *SLOW)
    ]


@pytest.mark.parametrize("mutation", _chosen())
def test_server_does_not_start(
    mutation: Mutation,
    tiny_model: Any,
    published_checkpoint: Any,
    write_manifest: Any,
    tmp_path: Path,
) -> None:
    variant, directory = VARIANTS[mutation.variant], tmp_path / "checkpoint"
    plain = tiny_model(tmp_path / "plain", tokenizer=True, **variant.model)
    published_checkpoint(directory, plain, **variant.checkpoint)
    prepare(directory, mutation, write_manifest)
    code, healthy, log = _serve(directory, tmp_path / "log")
    assert not healthy, log[-4000:]
    assert code != 0, log[-4000:]
    lines = [line for line in log.splitlines() if any(e in line for e in ERRORS)]
    assert any(map(mutation.is_named, lines)), lines or log[-4000:]


def _serve(directory: Path, log: Path) -> tuple[int, bool, str]:
    """Exit code, whether it was ever healthy, and all that it printed."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        str(Path(sys.executable).parent / "vllm"),
        *("serve", str(directory), "--host", "127.0.0.1", "--port", str(port)),
        *("--max-model-len", "256", "--enforce-eager"),
        *("--kv-cache-memory-bytes", str(64 << 20)),
    ]
    with log.open("w") as out:
        process = subprocess.Popen(
            command,
            stdout=out,
            stderr=out,
            env={**os.environ, "VLLM_CPU_OMP_THREADS_BIND": "nobind"},
            process_group=0,
        )
    healthy, deadline = False, time.monotonic() + SECONDS
    try:
        while process.poll() is None and not healthy:
            assert time.monotonic() < deadline, log.read_text()[-4000:]
            healthy = _is_healthy(port)
            time.sleep(0.2)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        code = process.wait()
    return code, healthy, log.read_text()


def _is_healthy(port: int) -> bool:
    try:
        response = httpx.get(f"http://127.0.0.1:{port}/health", timeout=2)
    except httpx.TransportError:
        return False
    return response.status_code == 200
