# SPDX-License-Identifier: Apache-2.0
"""What is installed under which name, and how `deploy/serve.py` treats mistakes."""

import importlib
import json
import os
import runpy
import shlex
import socket
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from importlib import metadata
from pathlib import Path

import huggingface_hub
import pytest

import vllm_lowbit

ROOT = Path(__file__).resolve().parents[1]
MODEL = ROOT / "models" / "ref-7m"
SERVE = ROOT / "deploy" / "serve.py"


def serve(*args: object, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the launcher from outside of the checkout."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith("VLLM_")}
    return subprocess.run(
        [sys.executable, str(SERVE), *map(str, args)],
        capture_output=True,
        text=True,
        timeout=60,
        cwd="/",
        env={**clean, **environment},
    )


def planned(*args: object, **environment: str) -> list[str]:
    """The words of the command the launcher would run."""
    result = serve(*args, "--dry-run", "--port", free_port(), **environment)
    assert result.returncode == 0, result.stderr
    return shlex.split(result.stdout)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.mark.parametrize(
    ("group", "name", "value"),
    [
        ("vllm.general_plugins", "lowbit", "vllm_lowbit:register"),
        (
            "vllm.stat_logger_plugins",
            "lowbit",
            "vllm_lowbit.metrics:LowbitStatLogger",
        ),
        ("console_scripts", "vllm-lowbit", "vllm_lowbit.cli:app"),
    ],
)
def test_entry_point(group: str, name: str, value: str) -> None:
    found = metadata.distribution("vllm-lowbit").entry_points.select(group=group)
    assert [(e.name, e.value) for e in found] == [(name, value)]
    assert callable(found[name].load())


def test_version_is_that_of_the_distribution() -> None:
    assert vllm_lowbit.__version__ == metadata.version("vllm-lowbit")


@pytest.mark.parametrize("name", ["kernels", "calibrate", "deploy"])
def test_top_level_folder_is_a_subpackage(name: str) -> None:
    module = importlib.import_module(f"vllm_lowbit.{name}")
    assert Path(str(module.__file__)).parts[-2:] == (name, "__init__.py")


def test_kernels_does_not_pose_as_the_hub_package() -> None:
    """`kernels` at the top level would be imported by transformers as its own."""
    code = "import importlib.util; print(importlib.util.find_spec('kernels'))"
    found = subprocess.check_output([sys.executable, "-c", code], cwd="/", text=True)
    assert str(ROOT) not in found
    assert str(ROOT) not in sys.path


def test_import_loads_no_framework() -> None:
    """vLLM swallows what an import of a plugin raises: keep the import trivial."""
    code = (
        "import sys, vllm_lowbit\n"
        "print({'torch', 'triton', 'vllm', 'transformers', 'numpy'} & set(sys.modules))"
    )
    found = subprocess.check_output([sys.executable, "-c", code], cwd="/", text=True)
    assert found.strip() == "set()"


def test_every_source_folder_reaches_the_wheel() -> None:
    """Each folder with modules is a package by itself; a missing __init__.py would
    leave it out of the wheel while an editable install still finds it."""
    for name in ("vllm_lowbit", "kernels", "calibrate", "deploy"):
        for source in (ROOT / name).rglob("*.py"):
            assert (source.parent / "__init__.py").exists(), source


def test_installation_without_a_compiler(tmp_path: Path) -> None:
    result = subprocess.run(
        [sys.executable, "setup.py", "-q", "build_ext", "--build-lib", str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=ROOT,
        env={**os.environ, "CXX": "/nonexistent/c++ -pipe"},
    )
    assert result.returncode == 1
    assert result.stderr.splitlines()[-1] == (
        "vllm-lowbit compiles its CPU kernels at installation, and the C++ compiler "
        "'/nonexistent/c++' was not found. Install the package g++ (Debian, Ubuntu: "
        "apt-get install g++; Fedora: dnf install gcc-c++) or set CXX."
    )
    assert "Traceback" not in result.stderr
    assert not list(tmp_path.iterdir())


class TestServe:
    def test_plain_model_gets_the_flag(self) -> None:
        command = planned(MODEL, "--max-model-len", "512")
        assert [Path(w).name for w in command if Path(w).name == "vllm"] == ["vllm"]
        assert command[command.index("--quantization") + 1] == "lowbit"
        assert command[command.index("--host") + 1] == "127.0.0.1"
        assert command[-2:] == ["--max-model-len", "512"]

    def test_quantized_model_decides_for_itself(self, tmp_path: Path) -> None:
        config = {"quantization_config": {"quant_method": "lowbit"}}
        (tmp_path / "config.json").write_text(json.dumps(config))
        assert "--quantization" not in planned(tmp_path)

    def test_options_of_the_caller_win(self) -> None:
        command = planned(MODEL, "--quantization=fp8", "--host", "0.0.0.0")
        assert "lowbit" not in command
        assert command.count("--host") == 1

    @pytest.mark.skipif(
        not metadata.version("vllm").endswith("+cpu"), reason="CPU build only"
    )
    def test_cpu_build_uses_every_core_and_bounds_the_cache(self) -> None:
        command = planned(MODEL)
        name, _, cores = command[0].partition("=")
        assert name == "VLLM_CPU_OMP_THREADS_BIND"
        spans = [span.split("-") for span in cores.split(",")]
        used = {c for s in spans for c in range(int(s[0]), int(s[-1]) + 1)}
        assert used == os.sched_getaffinity(0)
        assert "--kv-cache-memory-bytes" in command
        assert "=" not in planned(MODEL, VLLM_CPU_OMP_THREADS_BIND="nobind")[0]
        assert "=" not in planned(MODEL, "-tp", "2")[0]

    @pytest.mark.parametrize("model", ["./missing", "../missing", "/no/such/model"])
    def test_missing_model(self, model: str) -> None:
        result = serve(model, "--port", free_port())
        assert result.returncode == 2
        assert f"model directory '{model}' does not exist" in result.stderr

    def test_name_that_the_hub_has_not(self, tmp_path: Path) -> None:
        """Before vLLM is started; without a hub, when it is not cached."""

        class Hub(BaseHTTPRequestHandler):
            def do_HEAD(self) -> None:
                self.send_response(404)
                self.send_header("X-Error-Code", "RepoNotFound")
                self.end_headers()

        with HTTPServer(("127.0.0.1", 0), Hub) as hub:
            threading.Thread(target=hub.serve_forever, daemon=True).start()
            online = {
                "HF_HUB_OFFLINE": "0",
                "HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}",
            }
            for environment, reason in (
                (online, "404"),
                ({"HF_HUB_OFFLINE": "1"}, "HF_HUB_OFFLINE"),
            ):
                home = str(tmp_path)
                result = serve(
                    "no/such", "--port", free_port(), HF_HOME=home, **environment
                )
                assert result.returncode == 2, result.stderr
                last = result.stderr.splitlines()[-1]
                assert "model 'no/such' is not a directory, and the hub does" in last
                assert reason in last
            hub.shutdown()

    def test_name_that_the_hub_has(
        self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        """Is asked for once, by its revision; what is of other stores is not."""
        look_up = runpy.run_path(str(SERVE))["hub_config"]
        asked: list[tuple[str, ...]] = []

        def download(*words: str, revision: str) -> str:
            asked.append((*words, revision))
            return str(tmp_path / "config.json")

        monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
        assert look_up("org/name", []) == tmp_path / "config.json"
        look_up("org/name", ["--revision=abc", "--seed", "1"])
        assert asked == [
            ("org/name", "config.json", None),
            ("org/name", "config.json", "abc"),
        ]
        assert look_up("s3://bucket/model", []) is None
        assert look_up("org/name:Q4_K_M", []) is None
        assert look_up("org/name", ["--hf-config-path", "other"]) is None
        assert len(asked) == 2

    @pytest.mark.parametrize("quantized", [True, False])
    def test_what_the_hub_has_quantized_stays_so(
        self, tmp_path: Path, quantized: bool
    ) -> None:
        build = runpy.run_path(str(SERVE))["build_command"]
        config = tmp_path / "config.json"
        config.write_text('{"quantization_config": {}}' if quantized else "{}")
        command = build("org/name", config, 8000, True, [])
        assert ("--quantization" in command) != quantized

    @pytest.mark.parametrize(
        ("config", "message"),
        [
            (None, "has no config.json"),
            ("{", "is not a JSON object"),
            ("3", "is not a JSON object"),
        ],
    )
    def test_bad_model(self, tmp_path: Path, config: str | None, message: str) -> None:
        if config is not None:
            (tmp_path / "config.json").write_text(config)
        result = serve(tmp_path, "--port", free_port())
        assert result.returncode == 2
        assert message in result.stderr

    def test_port_in_use(self) -> None:
        with socket.create_server(("127.0.0.1", 0)) as taken:
            port = taken.getsockname()[1]
            result = serve(MODEL, "--port", port)
        assert result.returncode == 2
        assert f"cannot listen on 127.0.0.1:{port}: Address already" in result.stderr

    @pytest.mark.parametrize("port", ["0", "65536", "http"])
    def test_impossible_port(self, port: str) -> None:
        result = serve(MODEL, "--port", port)
        assert result.returncode == 2
        assert "Traceback" not in result.stderr
        assert port in result.stderr
