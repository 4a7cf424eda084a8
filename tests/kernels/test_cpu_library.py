# SPDX-License-Identifier: Apache-2.0
"""Which compiled kernels run: the instruction set, and what a missing build means."""

import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from vllm_lowbit.cli import app
from vllm_lowbit.kernels.cpu import library
from vllm_lowbit.kernels.dispatch import TABLE, select
from vllm_lowbit.kernels.hadamard.cpu import transform

COMPILED = [row.operator for row in TABLE if row.backend == "cpu"]
SANITIZER = "libasan" in os.environ.get("LD_PRELOAD", "")


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As in a new process without settings."""
    caches = (
        *(library.missing, library.isas, library.default_isa),
        *(library._library, library._functions_of),
    )
    for name in (library.ISA_VARIABLE, library.PATH_VARIABLE):
        monkeypatch.delenv(name, raising=False)
    for cache in caches:
        cache.cache_clear()
    yield
    for cache in caches:
        cache.cache_clear()


def environment() -> str:
    """What ``vllm-lowbit env`` prints, in one line."""
    result = CliRunner(env={"COLUMNS": "200"}).invoke(app, ["env"])
    assert result.exit_code == 0, result.output
    return " ".join(result.output.split())


def test_an_installation_has_compiled_kernels() -> None:
    """Without them every other test of them would be passed over."""
    assert library.missing() is None
    assert set(library.isas()) <= {"avx512", "avx2", "portable"}
    assert library.isas()[-1] == "portable"


def test_best_instruction_set_is_taken(fresh: None) -> None:
    assert library.default_isa() == library.isas()[0]
    assert f"CPU kernels {library.isas()[0]}, here: " in environment()


def test_another_instruction_set_by_name(
    fresh: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """What is slower than need be is said, once."""
    monkeypatch.setenv(library.ISA_VARIABLE, "portable")
    with caplog.at_level(logging.WARNING, logger=library.logger.name):
        for _ in range(3):
            transform(torch.ones(1, 4), None, 4, 1)
    [record] = caplog.records
    assert record.levelname == "WARNING"
    assert "CPU kernels use portable: slower than" in record.getMessage()
    assert library.default_isa() == "portable"
    assert "CPU kernels portable, here: " in environment()


def test_no_warning_with_avx512(
    fresh: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(library, "isas", lambda: ("avx512", "avx2", "portable"))
    assert library.default_isa() == "avx512"
    assert not caplog.records


@pytest.mark.parametrize("name", ["neon", "", "AVX2"])
def test_unknown_instruction_set(
    fresh: None, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setenv(library.ISA_VARIABLE, name)
    message = f"LOWBIT_CPU_ISA='{name}' does not run on this CPU; supported here: "
    with pytest.raises(ValueError, match=message + ".*portable"):
        transform(torch.ones(1, 4), None, 4, 1)
    assert message in environment()


def test_forced_instruction_sets_nest() -> None:
    before = library.functions()
    with library.force_isa("portable"):
        inner = library.functions()
        with pytest.raises(KeyError), library.force_isa(library.isas()[0]):
            assert library.functions() is library._functions_of(library.isas()[0])
            raise KeyError
        assert library.functions() is inner is library._functions_of("portable")
    assert library.functions() is before
    with pytest.raises(ValueError, match="'neon' does not run here"):
        library.force_isa("neon")
    with pytest.raises(ValueError, match="no CPU kernels for 'neon'; compiled: "):
        library._functions_of("neon")


def test_without_a_build_the_portable_backend_runs(
    fresh: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(library, "PATH", tmp_path / "native.so")
    reason = "native.so was not built; reinstall vllm-lowbit with g++ installed"
    assert library.missing() == reason
    for operator in COMPILED:
        assert select(operator, "cpu").backend == "generic"
        row = next(r for r in TABLE if (r.operator, r.backend) == (operator, "cpu"))
        assert row.reason_against("cpu", {}) == reason
    printed = environment()
    assert f"CPU kernels none: {reason}" in printed
    assert printed.count(f"out: {reason}") == len(COMPILED)


def test_a_build_that_does_not_load(
    fresh: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(library, "PATH", tmp_path / "native.so")
    library.PATH.write_text("no library")
    assert str(library.missing()).startswith("native.so does not load: ")
    assert select("hadamard", "cpu").backend == "generic"


def run(code: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | variables,
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_operators_of_a_process_without_a_build() -> None:
    """Registered operators and layers take the portable functions."""
    code = (
        "import torch\n"
        "from vllm_lowbit.kernels import implementations, ops\n"
        "for name in ('hadamard', 'hadamard_quantize', 'linear_tiled'):\n"
        "    print(implementations.implementation(name).__module__)\n"
        "out = torch.ops.lowbit.hadamard(torch.eye(2), None, 2, 1)\n"
        "print(round(float(out.square().sum())))\n"
    )
    result = run(code, **{library.PATH_VARIABLE: "/nonexistent/native.so"})
    assert result.returncode == 0, result.stderr
    *modules, total = result.stdout.split()
    assert total == "2"
    assert not [module for module in modules if module.endswith(".cpu")]


@pytest.mark.skipif(not SANITIZER, reason="for make asan")
def test_sanitizer_sees_an_overrun(isa: str) -> None:
    """That the kernels under test are those with the sanitizer, of every kind."""
    code = (
        "import torch\n"
        "from ctypes import byref\n"
        "from vllm_lowbit.kernels.cpu import library\n"
        "from vllm_lowbit.kernels.hadamard.cpu import arguments\n"
        f"with library.force_isa('{isa}'):\n"
        "    x, y = torch.ones(2, 64), torch.ones(127)\n"
        "    library.functions().hadamard(byref(arguments(64, 1, False)),\n"
        "        x.data_ptr(), 0, None, 2, 64, y.data_ptr())\n"
    )
    result = run(code)
    assert result.returncode != 0
    assert "AddressSanitizer: heap-buffer-overflow" in result.stderr
