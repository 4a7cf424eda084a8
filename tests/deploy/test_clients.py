# SPDX-License-Identifier: Apache-2.0
"""Programs that people use, against a real server behind a real front door."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest

from vllm_lowbit.deploy.front_door import FrontDoor, read_keys, render

pytestmark = pytest.mark.live
KEY = "client-0123456789-ABCDEFGHIJ"
HERE = Path(__file__).parent
PROMPT = "The old house"


@pytest.fixture(scope="module")
def door(
    server: SimpleNamespace,
    program: Any,
    running: Any,
    wait_for: Any,
    free_port: Any,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[SimpleNamespace]:
    """nginx in front of the server; ``url``, ``key`` and the model's ``name``."""
    directory = tmp_path_factory.mktemp("door")
    keys = directory / "keys"
    keys.write_text(f"tests {KEY}\n")
    keys.chmod(0o600)
    listen = f"127.0.0.1:{free_port()}"
    config = FrontDoor.model_validate(
        {
            "listen": listen,
            "upstreams": [f"127.0.0.1:{server.port}"],
            "keys_file": str(keys),
            "runtime_dir": str(directory / "run"),
            "access_log": str(directory / "access.log"),
        }
    )
    path = render(config, read_keys(keys), directory / "conf")
    command = [program("nginx", "nginx"), "-c", path]
    with running(command, directory / "log") as process:
        wait_for(process, f"http://{listen}/health", directory / "log", 30)
        yield SimpleNamespace(url=f"http://{listen}", key=KEY, name=server.name)


def run(command: list[Any], seconds: int = 300, **environment: str) -> str:
    result = subprocess.run(
        [str(word) for word in command],
        capture_output=True,
        text=True,
        timeout=seconds,
        env={**os.environ, **environment},
    )
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    return result.stdout


def test_openai_python(door: SimpleNamespace) -> None:
    from openai import AuthenticationError, NotFoundError, OpenAI

    client = OpenAI(base_url=f"{door.url}/v1", api_key=door.key, max_retries=0)
    assert [model.id for model in client.models.list()] == [door.name]
    request = {"model": door.name, "max_tokens": 8, "temperature": 0}
    whole = client.completions.create(prompt=PROMPT, **request)
    stream = client.completions.create(prompt=PROMPT, stream=True, **request)
    assert "".join(c.choices[0].text for c in stream) == whole.choices[0].text != ""
    message = {"role": "user", "content": PROMPT}
    chat = client.chat.completions.create(messages=[message], **request)
    assert chat.choices[0].message.content and chat.usage.completion_tokens == 8
    answer = client.responses.create(
        model=door.name, input=PROMPT, max_output_tokens=16
    )
    assert answer.output_text

    stranger = client.with_options(api_key="wrong-0123456789-ABCDEFGHIJ")
    with pytest.raises(AuthenticationError, match="A key is missing or not known"):
        stranger.models.list()
    with pytest.raises(NotFoundError, match="There is no such route"):
        client.embeddings.create(model=door.name, input=PROMPT)


def test_nothing_else_is_open(door: SimpleNamespace) -> None:
    headers = {"Authorization": f"Bearer {door.key}"}
    for path in ("metrics", "version", "docs", "v1/../metrics", "load", "ping"):
        assert httpx.get(f"{door.url}/{path}", headers=headers).status_code == 404
    body = {"model": door.name, "prompt": PROMPT}
    assert httpx.post(f"{door.url}/tokenize", json=body).status_code == 404
    body["prompt"] = "x" * (1 << 20)
    answer = httpx.post(f"{door.url}/v1/completions", json=body, headers=headers)
    assert answer.status_code == 413


def test_curl(door: SimpleNamespace, program: Any) -> None:
    body = {"model": door.name, "prompt": PROMPT, "max_tokens": 4}
    command = [program("curl", "curl"), "-sS", f"{door.url}/v1/completions"]
    command += ["-H", f"Authorization: Bearer {door.key}"]
    command += ["-H", "Content-Type: application/json", "-d", json.dumps(body)]
    answer = json.loads(run(command))
    assert answer["usage"]["completion_tokens"] == 4 and answer["choices"][0]["text"]


@pytest.mark.slow
def test_openai_npm(door: SimpleNamespace, program: Any, tmp_path: Path) -> None:
    node, npm = program("node", "nodejs"), program("npm", "npm")
    for name in ("package.json", "client.mjs"):
        shutil.copy(HERE / "clients" / name, tmp_path)
    run([npm, "install", "--silent", "--no-audit", "--prefix", tmp_path])
    found = json.loads(
        run(
            [node, tmp_path / "client.mjs", door.name],
            OPENAI_BASE_URL=f"{door.url}/v1",
            OPENAI_API_KEY=door.key,
        )
    )
    assert found["models"] == [door.name]
    assert found["streamed"] == found["whole"] != ""
    assert found["chat"] and found["refused"] == 401


@pytest.mark.slow
def test_langchain(door: SimpleNamespace) -> None:
    openai = pytest.importorskip("langchain_openai", reason="extra `clients`")
    chat = openai.ChatOpenAI(
        model=door.name,
        base_url=f"{door.url}/v1",
        api_key=door.key,
        max_completion_tokens=8,
        temperature=0,
    )
    answer = chat.invoke(PROMPT)
    assert answer.content and answer.usage_metadata["output_tokens"] == 8
    chunks = [chunk.content for chunk in chat.stream(PROMPT)]
    assert "".join(chunks) == answer.content
    assert len(chat.batch([PROMPT, "In the morning"])) == 2


@pytest.mark.slow
def test_vllm_bench_serve(door: SimpleNamespace, tmp_path: Path) -> None:
    vllm = Path(sys.executable).parent / "vllm"
    run(
        [
            *(vllm, "bench", "serve", "--base-url", door.url, "--model", door.name),
            *("--tokenizer", HERE.parents[1] / "models" / "ref-7m"),
            *("--dataset-name", "random", "--random-input-len", 64),
            *("--random-output-len", 16, "--num-prompts", 20, "--request-rate", 5),
            *("--save-result", "--result-filename", tmp_path / "result.json"),
        ],
        600,
        OPENAI_API_KEY=door.key,
    )
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["completed"] == 20 and result["total_output_tokens"] == 320


@pytest.mark.slow
def test_lm_eval(door: SimpleNamespace, tmp_path: Path) -> None:
    """Log-likelihoods of a local task, through /v1/completions with a tokenizer."""
    pytest.importorskip("lm_eval", reason="extra `clients`")
    tokenizer = HERE.parents[1] / "models" / "ref-7m"
    arguments = ",".join(
        [
            f"model={door.name}",
            f"base_url={door.url}/v1/completions",
            f"tokenizer={tokenizer}",
            "num_concurrent=2,max_retries=1,tokenized_requests=False",
        ]
    )
    task = tmp_path / "task"
    shutil.copytree(HERE / "clients" / "task", task)
    text = (task / "sentences.yaml").read_text()
    (task / "sentences.yaml").write_text(text.replace("DATA", str(task / "data.jsonl")))
    output = run(
        [
            *(sys.executable, "-m", "lm_eval", "run", "--model", "local-completions"),
            *("--model_args", arguments, "--tasks", "sentences"),
            *("--include_path", task, "--output_path", tmp_path / "out"),
        ],
        600,
        OPENAI_API_KEY=door.key,
        HF_DATASETS_CACHE=str(tmp_path / "cache"),
    )
    found = re.search(r"\|sentences\s*\|.*\|acc\s*\|.*?\|\s*([\d.]+)\|", output)
    # A trained model prefers the written endings to shuffled ones.
    assert found is not None, output
    assert float(found[1]) >= 0.75
