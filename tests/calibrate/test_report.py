# SPDX-License-Identifier: Apache-2.0
"""`vllm-lowbit report`: what is on the page, and that nothing half-written stays."""

import json
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from vllm_lowbit import cli
from vllm_lowbit.calibrate.card import link_report
from vllm_lowbit.calibrate.report import read_calibration
from vllm_lowbit.errors import ConfigError

DATA = Path(__file__).parents[2] / "benchmarks" / "data"
VOID = ("meta", "img")
PICTURES = ["surfaces", "channels", "errors", "activations", "qsur"]


class Page(HTMLParser):
    """Checks that tags are closed in order; collects images and text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.images: list[str] = []
        self.text = ""
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "img":
            self.images.append(str(dict(attrs)["src"]))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def run(*arguments: object, code: int = 0) -> tuple[str, str]:
    """stdout and stderr of the command."""
    result = CliRunner().invoke(cli.app, ["report", *map(str, arguments)])
    assert result.exit_code == code, result.output
    return result.stdout, result.stderr


@pytest.fixture(autouse=True)
def _coarse(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pictures of few cells are drawn sooner."""
    monkeypatch.setattr("vllm_lowbit.calibrate.observe.SAMPLE_TOKENS", 8)
    monkeypatch.setattr("vllm_lowbit.calibrate.observe.SAMPLE_CHANNELS", 8)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory, tiny_model: Any) -> Path:
    directory = tmp_path_factory.mktemp("models") / "base"
    return tiny_model(directory, tokenizer=True)


@pytest.fixture
def checkpoint(tmp_path: Path, base: Path, published_checkpoint: Any) -> Path:
    directory = published_checkpoint(tmp_path / "quantized", base, scheme="w4a4kv4")
    (directory / "README.md").write_text("# Card\n\nText.\n")
    curves = {"<b>step 1</b>": [[0, 2.5], [10, 1.5]]}
    layers = {"model.layers.0.mlp.up_proj": {"output_error": 0.0123}}
    (directory / "calibration.json").write_text(
        json.dumps({"curves": curves, "layers": layers})
    )
    (directory / "recipe.yaml").write_text("name: <script>alert(1)</script>\n")
    return directory


def test_page(checkpoint: Path, base: Path) -> None:
    text, task = DATA / "wikitext-2" / "test.txt", DATA / "blimp" / "passive_1.jsonl"
    options = ("--base", base, "--data", text, "--tasks", task, "--limit", 4)
    sizes = ("--samples", 2, "--seq-len", 32, "--max-tokens", 64)
    stdout, stderr = run(checkpoint, *options, *sizes)
    directory = checkpoint / "report"
    assert stdout == f"{directory / 'index.html'}\n" and stderr == ""
    page = Page((directory / "index.html").read_text())
    assert page.images == [f"{name}.png" for name in [*PICTURES, "curves"]]
    for image in page.images:
        assert (directory / image).read_bytes().startswith(b"\x89PNG")
    for piece in (
        "w4a4kv4, made from base",
        "perplexity of test.txt, 62 tokens in windows of 32",
        "passive_1",
        "layer 1, MLP",
        "some/model",
        "output_error",
        "0.0123",
        "name: <script>alert(1)</script>",
    ):
        assert piece in page.text, piece
    card = (checkpoint / "README.md").read_text()
    assert card.startswith("# Card\n\nText.\n\n## Report\n")
    assert card.count("[report](report/index.html)") == 1


def test_elsewhere_and_without_a_text(
    checkpoint: Path, base: Path, tmp_path: Path
) -> None:
    """Windows of the package's text; the card stays as it is."""
    (checkpoint / "calibration.json").unlink()
    (checkpoint / "recipe.yaml").unlink()
    output = tmp_path / "a b" / "out"
    output.parent.mkdir()
    run(checkpoint, "--base", base, "-o", output, "--samples", 1, "--seq-len", 16)
    page = Page((output / "index.html").read_text())
    assert page.images == [f"{name}.png" for name in PICTURES]
    assert "wikitext-2-train.txt" in page.text and "perplexity of" not in page.text
    assert "report" not in (checkpoint / "README.md").read_text()
    assert sorted(path.name for path in output.parent.iterdir()) == ["out"]


def test_activations_of_16_bits_have_no_picture_of_their_error(
    tmp_path: Path, base: Path, published_checkpoint: Any
) -> None:
    directory = published_checkpoint(tmp_path / "q", base, scheme="w4a16")
    run(directory, "--base", base, "--samples", 1, "--seq-len", 16)
    page = Page((directory / "report" / "index.html").read_text())
    assert page.images == ["surfaces.png", "channels.png", "errors.png", "qsur.png"]


class TestBadInput:
    def test_output_that_exists(self, checkpoint: Path, base: Path) -> None:
        (checkpoint / "report").mkdir()
        (checkpoint / "report" / "x").touch()
        _, stderr = run(checkpoint, "--base", base, code=1)
        directory = checkpoint / "report"
        assert stderr.startswith(f"error: output directory {directory} exists and is")

    def test_nothing_is_left(
        self, checkpoint: Path, base: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def full(*arguments: Any) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr("vllm_lowbit.calibrate.report.write_figures", full)
        before = sorted(checkpoint.iterdir())
        options = ("--base", base, "--samples", 1, "--seq-len", 16)
        _, stderr = run(checkpoint, *options, code=1)
        assert "could not be written: [Errno 28] No space left" in stderr
        assert sorted(checkpoint.iterdir()) == before

    def test_no_matplotlib(
        self, checkpoint: Path, base: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setitem(sys.modules, "matplotlib", None)
        _, stderr = run(checkpoint, "--base", base, code=1)
        assert stderr == (
            "error: the package matplotlib is not installed; this command needs it: "
            "pip install 'vllm-lowbit[report]'\n"
        )

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (("--samples", 0), "samples must be at least 1, got 0"),
            (("--seq-len", 1), "seq_len must be from 2 to max_position_embeddings 256"),
            (("--seq-len", 257), "max_position_embeddings 256 of"),
        ],
    )
    def test_sizes(
        self, checkpoint: Path, base: Path, options: Any, message: str
    ) -> None:
        _, stderr = run(checkpoint, "--base", base, *options, code=1)
        assert message in stderr

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            ("{", "is not JSON: Expecting"),
            ('{"curves": {"a": [[1]]}}', r"key curves\.a\.0\.1: Field required"),
            ('{"curves": [1]}', r"key curves: .* got \[1\]"),
            ('{"layers": {"a": {"b": "c"}}}', r"key layers\.a\.b: .* got 'c'"),
        ],
    )
    def test_calibration_file(self, tmp_path: Path, content: str, message: str) -> None:
        path = tmp_path / "calibration.json"
        path.write_text(content)
        with pytest.raises(ConfigError, match=f"^{path}: {message}"):
            read_calibration(tmp_path)


def test_link_is_added_once(tmp_path: Path) -> None:
    page = tmp_path / "report" / "index.html"
    link_report(tmp_path, page)
    assert not (tmp_path / "README.md").exists()
    (tmp_path / "README.md").write_text("# Card")
    for _ in range(2):
        link_report(tmp_path, page)
    expected = "[report](report/index.html)"
    assert (tmp_path / "README.md").read_text().count(expected) == 1
