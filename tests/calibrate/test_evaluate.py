# SPDX-License-Identifier: Apache-2.0
"""`vllm-lowbit evaluate` by the reference: what is measured, and bad input."""

import json
import math
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from vllm_lowbit import cli
from vllm_lowbit.calibrate import evaluate as module
from vllm_lowbit.calibrate.evaluate import Evaluation, evaluate
from vllm_lowbit.calibrate.perplexity import (
    mean_perplexity,
    negative_log_likelihood,
    perplexity,
    tokenize,
    windows,
)
from vllm_lowbit.calibrate.reference_model import ReferenceModel, load_time_config
from vllm_lowbit.errors import CheckpointError, ConfigError, LowbitError
from vllm_lowbit.schema import scheme_from_name

TEXT = Path(__file__).parents[2] / "benchmarks" / "data" / "wikitext-2" / "test.txt"
KEYS = ["perplexity", "tokens", "scheme", "backend", "dtype", "seq_len", "data"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, tiny_model: Any) -> str:
    """A random model of 256 positions, with a tokenizer."""
    return str(tiny_model(tmp_path_factory.mktemp("model"), tokenizer=True))


@pytest.fixture(scope="module")
def lowbit(
    tmp_path_factory: pytest.TempPathFactory, model: str, published_checkpoint: Any
) -> str:
    directory = tmp_path_factory.mktemp("lowbit")
    return str(published_checkpoint(directory, model, scheme="w3a16"))


def run(*arguments: object, code: int = 0) -> tuple[str, str]:
    """stdout and stderr of the command."""
    result = CliRunner().invoke(cli.app, ["evaluate", *map(str, arguments)])
    assert result.exit_code == code, result.output
    return result.stdout, result.stderr


class TestPieces:
    def test_windows_do_not_overlap(self) -> None:
        ids = torch.arange(9)
        assert [w.tolist() for w in windows(ids, 4)] == [[0, 1, 2, 3], [4, 5, 6, 7]]
        assert [len(w) for w in windows(ids, 7)] == [7, 2]
        assert [len(w) for w in windows(ids, 100)] == [9]

    def test_loss_of_a_window(self) -> None:
        """The first token is not predicted, the last logits predict nothing."""
        logits = torch.tensor([[0.0, 0.0], [0.0, math.log(3)], [9.0, -9.0]])
        loss = negative_log_likelihood(logits, torch.tensor([0, 1, 0]))
        assert loss == pytest.approx(math.log(2) + math.log(4), rel=1e-7)

    def test_perplexity_is_the_exponential_of_the_mean(self) -> None:
        result = mean_perplexity(iter([math.log(2) * 3, math.log(8)]), 4)
        assert result.perplexity == pytest.approx(2**1.5, rel=1e-15)
        assert result.tokens == 4

    @pytest.mark.parametrize("loss", [math.nan, math.inf, 1e6])
    def test_no_finite_perplexity(self, loss: float) -> None:
        with pytest.raises(LowbitError, match=r"the mean loss is .* nats per token"):
            mean_perplexity([loss], 1)

    def test_tokens_of_a_text(self, model: str) -> None:
        some = tokenize(model, TEXT, 100)
        assert len(some) == 100 and some.dtype == torch.int64
        assert len(tokenize(model, TEXT)) > 100_000


class TestReference:
    @pytest.mark.parametrize("scheme", [None, "w4a4kv4", "w3a16-g64"])
    def test_plain_model(self, model: str, scheme: str | None) -> None:
        config = scheme and load_time_config(model, scheme_from_name(scheme))
        expected = perplexity(
            ReferenceModel(model, config or None), tokenize(model, TEXT, 150), 64
        )
        found = evaluate(model, TEXT, 64, 150, scheme=scheme)
        assert found == Evaluation(
            perplexity=expected.perplexity,
            tokens=150 - 3,
            scheme=scheme or "float",
            backend="reference",
            dtype="float32",
            seq_len=64,
            data=str(TEXT),
            model=model,
        )

    def test_lowbit_checkpoint(self, lowbit: str, model: str) -> None:
        found = evaluate(lowbit, TEXT, 64, 128)
        reference = ReferenceModel(lowbit)
        expected = perplexity(reference, tokenize(model, TEXT, 128), 64)
        assert found.perplexity == expected.perplexity
        assert found.scheme == reference.scheme_name == "w3a16"

    def test_dtype(self, model: str) -> None:
        """In bfloat16 the reference rounds, and says so."""
        rounded, exact = (
            evaluate(model, TEXT, 64, 128, dtype=dtype)
            for dtype in ("bfloat16", "auto")
        )
        assert (rounded.dtype, exact.dtype) == ("bfloat16", "float32")
        assert rounded.perplexity != exact.perplexity
        assert rounded.perplexity == pytest.approx(exact.perplexity, rel=0.05)

    def test_whole_text_and_progress(self, model: str, tmp_path: Path) -> None:
        text = tmp_path / "text"
        text.write_text(TEXT.read_text()[:2000])
        seen: list[tuple[int, int]] = []
        found = evaluate(model, text, 128, progress=lambda *n: seen.append(n))
        count = len(tokenize(model, text))
        parts = -(-count // 128)
        assert found.tokens == count - parts
        assert seen == [(done, parts) for done in range(parts + 1)]

    def test_longest_window(self, model: str) -> None:
        assert evaluate(model, TEXT, 256, 256).tokens == 255


class TestCommand:
    def test_json(self, model: str) -> None:
        options = ("--data", TEXT, "--seq-len", 32, "--max-tokens", 64)
        stdout, stderr = run(model, *options, "--scheme", "w4a4", "--json")
        assert stderr == ""
        found = json.loads(stdout)
        assert list(found) == [*KEYS, "model"]
        assert found == asdict(evaluate(model, TEXT, 32, 64, scheme="w4a4"))

    def test_text(self, model: str) -> None:
        stdout, _ = run(model, "--data", TEXT, "--seq-len", 32, "--max-tokens", 64)
        first, second = stdout.splitlines()
        assert first.startswith("perplexity ")
        assert first.endswith(" over 62 predicted tokens")
        assert second == (
            f"{model}: scheme float, backend reference, float32, windows of 32 tokens "
            f"of {TEXT}"
        )

    def test_stdout_is_the_result_alone(
        self, monkeypatch: pytest.MonkeyPatch, model: str
    ) -> None:
        """Whatever else is printed, by vLLM for instance, goes to stderr."""

        def chatty(*arguments: Any) -> Evaluation:
            print("INFO loading")
            return Evaluation(1.0, 2, "float", "vllm", "float32", 3, "a", "b")

        monkeypatch.setattr(module, "evaluate", chatty)
        stdout, stderr = run(model, "--data", TEXT, "--json")
        assert json.loads(stdout)["perplexity"] == 1.0
        assert stderr == "INFO loading\n"


class TestData:
    @pytest.mark.parametrize(
        ("content", "message"),
        [
            (None, "cannot be read: No such file or directory"),
            (b"", "has 0 tokens, at least 2 are needed"),
            (b"a", "has 1 tokens, at least 2 are needed"),
            (b"caf\xe9 au lait", "is not UTF-8 text, found byte 0xe9"),
        ],
    )
    def test_unusable(
        self, model: str, tmp_path: Path, content: bytes | None, message: str
    ) -> None:
        text = tmp_path / "text"
        if content is not None:
            text.write_bytes(content)
        stdout, stderr = run(model, "--data", text, "--seq-len", 8, code=1)
        assert stdout == ""
        assert stderr.startswith(f"error: {text}")
        assert message in stderr

    def test_directory(self, model: str, tmp_path: Path) -> None:
        _, stderr = run(model, "--data", tmp_path, "--seq-len", 8, code=1)
        assert stderr == f"error: {tmp_path}: is a directory\n"

    def test_shorter_than_asked(self, model: str, tmp_path: Path) -> None:
        text = tmp_path / "text"
        text.write_text("The old house stood at the end of the lane.")
        count = len(tokenize(model, text))
        options = ("--data", text, "--seq-len", 8, "--max-tokens", count)
        run(model, *options)
        _, stderr = run(model, *options[:-1], count + 1, code=1)
        expected = f"error: {text} has {count} tokens, {count + 1} were asked for\n"
        assert stderr == expected


class TestArguments:
    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"seq_len": 1}, "seq_len must be from 2 to max_position_embeddings 256"),
            ({"seq_len": 257}, "max_position_embeddings 256 of {model}, got 257"),
            ({"max_tokens": 1}, "max_tokens must be at least 2, got 1"),
            ({"backend": "hf"}, "backend 'hf' does not exist; supported: reference, v"),
            ({"dtype": "int8"}, "dtype 'int8' does not exist; supported: auto, float3"),
            ({"scheme": "w5a5"}, "scheme 'w5a5' does not exist; supported: w4a4kv4"),
            ({"scheme": ""}, "scheme '' does not exist"),
        ],
    )
    @pytest.mark.parametrize("backend", ["reference", "vllm"])
    def test_refused(
        self, model: str, arguments: dict[str, Any], message: str, backend: str
    ) -> None:
        settings = {"seq_len": 64, "backend": backend, **arguments}
        with pytest.raises(ConfigError) as error:
            evaluate(model, TEXT, **settings)
        assert message.format(model=model) in str(error.value)

    @pytest.mark.parametrize("backend", ["reference", "vllm"])
    def test_scheme_for_a_lowbit_checkpoint(self, lowbit: str, backend: str) -> None:
        with pytest.raises(ConfigError) as error:
            evaluate(lowbit, TEXT, 64, 128, backend, scheme="w4a4")
        assert str(error.value) == (
            f"scheme 'w4a4' cannot be chosen: {lowbit} is quantized already, by "
            "scheme w3a16"
        )

    def test_model(self, tmp_path: Path) -> None:
        with pytest.raises(CheckpointError, match="does not exist; a local checkpoint"):
            evaluate("some/model", TEXT)
        with pytest.raises(CheckpointError, match="is not a directory; a local check"):
            evaluate(__file__, TEXT)
        with pytest.raises(ConfigError, match=r"config\.json: cannot be read as JSON"):
            evaluate(str(tmp_path), TEXT)

    def test_config_of_a_model(self, model: str, tmp_path: Path) -> None:
        copy = Path(shutil.copytree(model, tmp_path / "copy"))
        config = json.loads((copy / "config.json").read_text())
        for change, message in (
            ({"max_position_embeddings": "many"}, "must be an integer, got 'many'"),
            ({"vocab_size": 100}, "the model's vocab_size is 100"),
            ({"quantization_config": {"quant_method": "fp8"}}, "quantized by 'fp8'"),
        ):
            (copy / "config.json").write_text(json.dumps({**config, **change}))
            with pytest.raises(ConfigError, match=message):
                evaluate(str(copy), TEXT, 64, 128)

    def test_no_tokenizer(self, model: str, tmp_path: Path) -> None:
        copy = Path(shutil.copytree(model, tmp_path / "copy"))
        for path in copy.glob("tokenizer*"):
            path.unlink()
        with pytest.raises(ConfigError, match="has no tokenizer"):
            evaluate(str(copy), TEXT, 64, 128)

    @pytest.mark.parametrize("backend", ["reference", "vllm"])
    def test_broken_weights(
        self, model: str, tmp_path: Path, rewrite: Any, backend: str
    ) -> None:
        copy = Path(shutil.copytree(model, tmp_path / "copy"))
        path = rewrite(copy, lambda tensors: tensors.pop("model.norm.weight"))
        with pytest.raises(
            CheckpointError, match=r"missing, first model\.norm\.weight"
        ):
            evaluate(str(copy), TEXT, 64, 128, backend)
        path.write_bytes(path.read_bytes()[:-1])
        with pytest.raises(CheckpointError, match="not a whole safetensors file"):
            evaluate(str(copy), TEXT, 64, 128, backend)
