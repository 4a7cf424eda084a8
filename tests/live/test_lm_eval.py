# SPDX-License-Identifier: Apache-2.0
"""lm-eval through its vLLM backend: it runs what is served, and finds what we find."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TASK = ROOT / "tests" / "deploy" / "clients" / "task"
MODEL = ROOT / "models" / "ref-7m"

pytestmark = [pytest.mark.slow, pytest.mark.live]


def test_vllm_backend(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("lm_eval", reason="extra `evaluate`")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    task = tmp_path / "task"
    shutil.copytree(TASK, task)
    text = (task / "sentences.yaml").read_text()
    (task / "sentences.yaml").write_text(text.replace("DATA", str(task / "data.jsonl")))
    arguments = [
        f"pretrained={MODEL}",
        "quantization=lowbit",
        "dtype=float32",
        "enforce_eager=True",
        "max_model_len=256",
        "kv_cache_memory_bytes=134217728",
    ]
    result = subprocess.run(
        [
            *(sys.executable, "-m", "lm_eval", "run", "--model", "vllm"),
            *("--model_args", ",".join(arguments), "--tasks", "sentences"),
            *("--include_path", str(task), "--output_path", str(tmp_path / "out")),
        ],
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert result.returncode == 0, result.stderr[-4000:]
    assert "lowbit qkv_proj: weights int4" in result.stdout + result.stderr
    found = re.search(r"\|sentences\s*\|.*\|acc\s*\|.*?\|\s*([\d.]+)\|", result.stdout)
    assert found is not None, result.stdout[-4000:]

    items = tmp_path / "items.jsonl"
    lines = [json.loads(line) for line in (TASK / "data.jsonl").open()]
    items.write_text(
        "".join(
            json.dumps({"ctx": x["start"], "choices": x["endings"], "gold": 0}) + "\n"
            for x in lines
        )
    )
    ours = subprocess.run(
        [
            *(str(Path(sys.executable).parent / "vllm-lowbit"), "evaluate", str(MODEL)),
            *("--scheme", "w4a4kv4", "--tasks", str(items), "--json"),
        ],
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert ours.returncode == 0, ours.stderr[-4000:]
    answers = json.loads(ours.stdout)
    assert float(found[1]) == pytest.approx(answers["mean"]["accuracy"])
