# SPDX-License-Identifier: Apache-2.0
"""Calibration windows: which ones a seed chooses, and what a text must be."""

import hashlib
import os
import re
import shutil
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vllm_lowbit.calibrate import text as text_module
from vllm_lowbit.calibrate.files import read_text
from vllm_lowbit.calibrate.perplexity import tokenize
from vllm_lowbit.calibrate.text import calibration_windows, default_text, token_ids
from vllm_lowbit.errors import ConfigError

ROOT = Path(__file__).parents[2]
GOLDEN = [[392, 942, 404, 87], [819, 989, 691, 932]]
TEST_SPLIT = ROOT / "benchmarks" / "data" / "wikitext-2" / "test.txt"


@pytest.fixture(scope="module", autouse=True)
def text() -> None:
    """The default is the whole of it here."""


@pytest.fixture(scope="module")
def model(
    tiny_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> str:
    return str(tiny_model(tmp_path_factory.mktemp("model"), tokenizer=True))


@pytest.fixture(scope="module")
def novel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A short text that is not plain ASCII."""
    path = tmp_path_factory.mktemp("text") / "novel.txt"
    lines = [f"Line {i} of a short novel – with a dash.\n" for i in range(400)]
    path.write_text("".join(lines), encoding="utf-8")
    return path


def ranked(windows: int, seed: int) -> list[int]:
    """Every window, the first chosen first; stated a second time on purpose."""
    return sorted(
        range(windows),
        key=lambda i: hashlib.sha256(f"{seed}:{i}".encode()).hexdigest(),
    )


@pytest.mark.parametrize(("samples", "seq_len", "seed"), [(5, 16, 0), (1, 33, 7)])
def test_windows_are_those_of_smallest_hash(
    model: str, novel: Path, samples: int, seq_len: int, seed: int
) -> None:
    ids = torch.tensor(token_ids(model, novel.read_text(encoding="utf-8")))
    count = len(ids) // seq_len
    chosen = sorted(ranked(count, seed)[:samples])
    expected = torch.stack([ids[i * seq_len : (i + 1) * seq_len] for i in chosen])
    windows = calibration_windows(model, novel, samples, seq_len, seed)
    assert windows.dtype == torch.int64
    assert windows.shape == (samples, seq_len)
    assert torch.equal(windows, expected)


def test_choice_is_fixed() -> None:
    """Another release must choose the same windows; see the test above."""
    assert [ranked(1000, seed)[:4] for seed in (0, 1)] == GOLDEN


def test_fewer_samples_are_a_subset(model: str, novel: Path) -> None:
    few, many = (
        {tuple(row) for row in calibration_windows(model, novel, n, 16, 3).tolist()}
        for n in (8, 64)
    )
    assert few < many


def test_all_windows_in_the_order_of_the_text(model: str, novel: Path) -> None:
    ids = token_ids(model, novel.read_text(encoding="utf-8"))
    count = len(ids) // 16
    windows = calibration_windows(model, novel, count, 16, 5)
    assert windows.flatten().tolist() == ids[: count * 16]


def test_default_text_is_used_from_start_to_end(model: str) -> None:
    ids = token_ids(model, default_text().read_text(encoding="utf-8"))
    assert len(ids) > 128 * 2048
    position = {tuple(ids[i : i + 512]): i for i in range(0, len(ids) - 511, 512)}
    windows = calibration_windows(model, default_text(), 128, 512, 0)
    places = [position[tuple(row)] / len(ids) for row in windows.tolist()]
    assert places == sorted(places)
    assert places[0] < 0.05
    assert places[-1] > 0.95


def test_only_a_part_of_a_large_file_is_read(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What lies behind the limit is not even decoded."""
    monkeypatch.setattr(text_module, "MIN_CHARACTERS", 3000)
    path = tmp_path / "large.txt"
    path.write_bytes("Of – words. ".encode() * 10000 + b"\xff")
    windows = calibration_windows(model, path, 2, 16, 0)
    path.write_text("Of – words. " * 250, encoding="utf-8")
    assert torch.equal(windows, calibration_windows(model, path, 2, 16, 0))
    path.write_bytes("Of – words. ".encode() * 10000 + b"\xff")
    with pytest.raises(ConfigError, match="is not UTF-8 text, found byte 0xff"):
        calibration_windows(model, path, 2000, 16, 0)


def test_too_short(model: str, novel: Path) -> None:
    tokens = len(token_ids(model, novel.read_text(encoding="utf-8")))
    fits = tokens // 16
    with pytest.raises(ConfigError) as error:
        calibration_windows(model, novel, fits + 1, 16, 0)
    assert str(error.value) == (
        f"{novel}: has {tokens} tokens, {fits + 1} windows of 16 need "
        f"{16 * (fits + 1)}; it holds {fits}: use fewer or shorter samples, or a "
        "longer text"
    )
    assert len(calibration_windows(model, novel, fits, 16, 0)) == fits


class TestNoText:
    @pytest.mark.parametrize(
        ("name", "message"),
        [
            ("missing", "missing: cannot be read: No such file or directory"),
            ("folder", "folder: is a directory"),
            ("pipe", "pipe: is not a regular file"),
            ("empty", "empty: is empty"),
            ("blank", "blank: is empty"),
            ("latin", "latin: is not UTF-8 text, found byte 0xe9"),
            ("utf16", "utf16: is not UTF-8 text, found byte 0xff"),
            ("cut", "cut: is not UTF-8 text, found byte 0xe2"),
            ("word", "word: has 1 tokens, 4 windows of 8 need 32; it holds 0"),
        ],
    )
    def test_is_named(
        self, model: str, tmp_path: Path, name: str, message: str
    ) -> None:
        (tmp_path / "folder").mkdir()
        os.mkfifo(tmp_path / "pipe")
        contents = {
            "empty": b"",
            "blank": b" \n\t\n",
            "latin": "café au lait".encode("latin-1"),
            "utf16": "words".encode("utf-16"),
            "cut": "words –".encode()[:-1],
            "word": b"the",
        }
        for file, content in contents.items():
            (tmp_path / file).write_bytes(content)
        with pytest.raises(ConfigError) as error:
            calibration_windows(model, tmp_path / name, 4, 8, 0)
        assert str(error.value).startswith(f"{tmp_path}/{message}")

    @pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
    def test_no_permission(self, model: str, tmp_path: Path) -> None:
        path = tmp_path / "secret.txt"
        path.write_text("words")
        path.chmod(0)
        with pytest.raises(ConfigError, match="cannot be read: Permission denied"):
            calibration_windows(model, path, 1, 2, 0)


class TestNoTokenizer:
    def test_missing(self, model: str, novel: Path, tmp_path: Path) -> None:
        shutil.copy(Path(model) / "config.json", tmp_path)
        with pytest.raises(ConfigError) as error:
            calibration_windows(str(tmp_path), novel, 1, 16, 0)
        assert (
            str(error.value) == f"{tmp_path}: has no tokenizer, such as tokenizer.json"
        )

    @pytest.mark.parametrize("content", ["", "{", "{}", "[]", '{"model": 3}', "\x00"])
    def test_broken(
        self, model: str, novel: Path, tmp_path: Path, content: str
    ) -> None:
        for name in ("config.json", "tokenizer_config.json"):
            shutil.copy(Path(model) / name, tmp_path)
        (tmp_path / "tokenizer.json").write_text(content)
        with pytest.raises(ConfigError) as error:
            calibration_windows(str(tmp_path), novel, 1, 16, 0)
        message = str(error.value)
        assert message.startswith(f"{tmp_path}: its tokenizer cannot be loaded: ")
        assert "\n" not in message


def test_tokenize_reads_the_same_tokens(model: str, novel: Path) -> None:
    ids = token_ids(model, novel.read_text(encoding="utf-8"))
    assert tokenize(model, novel, 100).tolist() == ids[:100]
    assert tokenize(model, novel, len(ids)).tolist() == ids
    with pytest.raises(ConfigError, match=f"has {len(ids)} tokens, 1000000 were asked"):
        tokenize(model, novel, 1_000_000)


@given(content=st.text(st.characters(exclude_categories=["Cs"]), max_size=60))
def test_read_text_is_a_prefix(
    tmp_path_factory: pytest.TempPathFactory, content: str
) -> None:
    path = tmp_path_factory.getbasetemp() / "prefix.txt"
    path.write_text(content, encoding="utf-8", newline="")
    whole = path.read_text(encoding="utf-8")
    assert read_text(path, -1) == whole
    for count in (0, 1, 7, len(whole), len(whole) + 1):
        assert read_text(path, count) == whole[:count]


class TestDefaultText:
    def test_is_articles_from_start_to_end(self) -> None:
        content = default_text().read_bytes()
        assert 1_000_000 < len(content) < 1_300_000
        text = content.decode()
        titles = re.findall(r"^ = [^=\n]+ = $", text, re.MULTILINE)
        assert f"the first {len(titles)} articles" in (
            default_text().with_name("SOURCE.txt").read_text()
        )
        assert text.startswith(f" \n{titles[0]}\n")
        assert text.endswith("\n \n")

    def test_shares_no_paragraph_with_the_evaluation_text(self) -> None:
        """Perplexities of calibrated checkpoints would be too good."""
        calibration, test = (
            set(path.read_text(encoding="utf-8").splitlines())
            for path in (default_text(), TEST_SPLIT)
        )
        assert not [line for line in calibration & test if len(line) > 80]

    def test_licence_is_stated(self) -> None:
        source = default_text().with_name("SOURCE.txt").read_text()
        assert "CC BY-SA 3.0" in source
        assert "Merity" in source


def test_files_beside_the_code_reach_the_wheel() -> None:
    """An editable install finds them in any case."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    patterns = project["tool"]["setuptools"]["package-data"]["vllm_lowbit.calibrate"]
    folder = ROOT / "calibrate"
    packed = {path for pattern in patterns for path in folder.glob(pattern)}
    files = {
        p for p in folder.rglob("*") if p.is_file() and "__pycache__" not in p.parts
    }
    assert {p for p in files - packed if p.suffix != ".py"} == set()
