# SPDX-License-Identifier: Apache-2.0
"""Dockerfiles and the script they call; no container engine is needed."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
IMAGES = ROOT / "deploy" / "images"
DOCKERFILES = sorted(IMAGES.glob("*.Dockerfile"))
INSTALL = IMAGES / "install.sh"


def instructions(path: Path) -> list[tuple[str, str]]:
    """Instruction and arguments, continued lines joined."""
    text = re.sub(r"^#.*\n", "", path.read_text(), flags=re.MULTILINE)
    lines = re.sub(r"\\\n\s*", "", text).splitlines()
    return [(word, rest) for word, _, rest in (x.partition(" ") for x in lines) if word]


def tool(name: str) -> str:
    return str(Path(sys.executable).parent / name)


def test_there_is_one_for_each() -> None:
    assert [path.stem for path in DOCKERFILES] == ["cpu", "cuda", "ray"]


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.stem)
class TestDockerfile:
    def test_hadolint(self, path: Path) -> None:
        result = subprocess.run(
            [tool("hadolint"), "--failure-threshold", "info", path],
            capture_output=True,
            text=True,
        )
        assert result.returncode == 0, result.stdout

    def test_base_is_pinned(self, path: Path) -> None:
        words = instructions(path)
        defaults = dict(r.split("=", 1) for w, r in words if w == "ARG" and "=" in r)
        bases = [rest for word, rest in words if word == "FROM"]
        assert bases
        for base in bases:
            base = re.sub(r"\$\{(\w+)\}", lambda m: defaults[m[1]], base)
            assert re.search(r":v?\d+\.\d+\.\d+", base), base

    def test_runs_as_a_user_with_a_number(self, path: Path) -> None:
        """Kubernetes cannot tell that a name is not root's."""
        words = [word for word, _ in instructions(path)]
        user = [rest for word, rest in instructions(path) if word == "USER"][-1]
        assert re.fullmatch(r"[1-9]\d*:[1-9]\d*", user)
        assert "RUN" not in words[len(words) - words[::-1].index("USER") :]

    def test_only_this_plugin_is_loaded(self, path: Path) -> None:
        settings = " ".join(rest for word, rest in instructions(path) if word == "ENV")
        assert "VLLM_PLUGINS=lowbit" in settings
        # The development endpoints of vLLM run code for whoever asks.
        assert "VLLM_SERVER_DEV_MODE" not in path.read_text()

    def test_the_script_does_the_work(self, path: Path) -> None:
        runs = [rest for word, rest in instructions(path) if word == "RUN"]
        assert any(f"{INSTALL.relative_to(ROOT)} {path.stem}" in run for run in runs)
        assert not any("pip" in run for run in runs)


def test_context_has_what_the_build_reads() -> None:
    allowed = {
        line[1:]
        for line in (ROOT / ".dockerignore").read_text().splitlines()
        if line.startswith("!")
    }
    assert all((ROOT / name).exists() for name in allowed)
    assert {"pyproject.toml", "setup.py", "vllm_lowbit", "kernels"} <= allowed
    assert not allowed & {".git", ".venv", "tests", "models"}


class TestInstall:
    def test_shellcheck(self) -> None:
        result = subprocess.run(
            [tool("shellcheck"), INSTALL, ROOT / ".ci" / "run"],
            capture_output=True,
            text=True,
        )
        assert result.returncode == 0, result.stdout

    @pytest.mark.parametrize(
        "args", [[], ["cpu"], ["gpu"], ["cuda", "x"], ["ray", "x"]]
    )
    def test_usage(self, args: list[str]) -> None:
        result = subprocess.run([INSTALL, *args], capture_output=True, text=True)
        assert result.returncode == 2
        assert result.stderr.endswith("install.sh cpu PREFIX | cuda | ray\n")

    def test_compiler_is_missed_first(self, tmp_path: Path) -> None:
        result = subprocess.run(
            [INSTALL, "cpu", tmp_path / "new"],
            capture_output=True,
            text=True,
            env={**os.environ, "CXX": "/nonexistent/c++"},
        )
        assert result.returncode == 1 and not (tmp_path / "new").exists()
        assert "error: /nonexistent/c++ is missing" in result.stderr

    def test_existing_folder_is_left_alone(self, tmp_path: Path) -> None:
        result = subprocess.run(
            [INSTALL, "cpu", tmp_path], capture_output=True, text=True
        )
        assert result.returncode == 1
        assert f"error: {tmp_path} exists" in result.stderr

    @pytest.mark.parametrize(
        ("what", "message"),
        [
            ("cuda", "error: there is no vLLM in this Python"),
            ("ray", "error: there is no vllm-lowbit in "),
        ],
    )
    def test_on_nothing(self, tmp_path: Path, what: str, message: str) -> None:
        subprocess.run(
            [sys.executable, "-m", "venv", "--without-pip", tmp_path / "empty"],
            check=True,
        )
        result = subprocess.run(
            [INSTALL, what],
            capture_output=True,
            text=True,
            env={**os.environ, "PYTHON": str(tmp_path / "empty" / "bin" / "python")},
        )
        assert result.returncode == 1
        assert message in result.stderr

    @pytest.mark.slow
    def test_cpu(self, tmp_path: Path) -> None:
        """The step of the CPU image as it stands: minutes, and downloads vLLM."""
        prefix = tmp_path / "vllm"
        result = subprocess.run(
            [INSTALL, "cpu", prefix], capture_output=True, text=True, cwd="/"
        )
        assert result.returncode == 0, result.stderr
        assert "vllm" in result.stdout and "cpu" in result.stdout
        code = (
            "import vllm_lowbit.deploy.front_door as door\n"
            "assert door.TEMPLATE.exists() and 'site-packages' in door.__file__"
        )
        subprocess.run([prefix / "bin" / "python", "-c", code], cwd="/", check=True)
        found = subprocess.run(
            [prefix / "bin" / "vllm", "--version"], capture_output=True, text=True
        )
        assert "0.32" in found.stdout, found.stderr
