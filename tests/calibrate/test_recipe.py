# SPDX-License-Identifier: Apache-2.0
"""Recipes: texts round-trip, names and paths are found, overrides are checked."""

import os
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from vllm_lowbit.calibrate.recipe import (
    MAX_SEED,
    Recipe,
    built_in_recipes,
    load_recipe,
    parse_recipe,
)
from vllm_lowbit.errors import ConfigError
from vllm_lowbit.schema import SCHEME_NAMES

RECIPES = Path(__file__).parents[2] / "calibrate" / "recipes"
TRANSFORM = st.sampled_from(["hadamard", "none"])
ROTATION = st.sampled_from(["hadamard", "learned", "none"])
GPTQ = st.fixed_dictionaries(
    {},
    optional={
        "method": st.just("gptq"),
        "damping": st.floats(0, 1, exclude_min=True),
        "block_size": st.integers(1, 4096),
        "act_order": st.booleans(),
    },
)
GPTAQ = st.fixed_dictionaries(
    {"method": st.just("gptaq")},
    optional={"correction": st.floats(0.01, 1), "act_order": st.booleans()},
)
RATE = st.floats(1e-6, 1)
REFINE = st.just({"scope": "none"}) | st.fixed_dictionaries(
    {"scope": st.sampled_from(["model", "layer"])},
    optional={"steps": st.integers(1, 100), "code_rate": RATE, "norm_rate": RATE},
)
DOCUMENTS = st.fixed_dictionaries(
    {},
    optional={
        "name": st.from_regex(r"\A[A-Za-z0-9][A-Za-z0-9._-]{0,63}\Z"),
        "scheme": st.sampled_from(SCHEME_NAMES) | st.just("w3a16-g128"),
        "transforms": st.fixed_dictionaries(
            {},
            optional={
                "residual": ROTATION,
                "value": ROTATION,
                "key": TRANSFORM,
                "down_input": TRANSFORM,
                "attn_input": TRANSFORM,
                "mlp_input": TRANSFORM,
                "equalize": st.booleans(),
                "smooth": st.none(),
                "scales": st.sampled_from(["learned", "none"]),
            },
        ),
        "weights": GPTQ | GPTAQ | st.just({"method": "rtn"}),
        "refine": REFINE,
        "activations": st.fixed_dictionaries(
            {"symmetric": st.booleans()},
            optional={
                "clip": st.sampled_from(["fixed", "learned"]),
                "clip_ratio": st.sampled_from([0.5, 0.9, 1.0]),
            },
        )
        | st.just({"clip": "searched"}),
        "vocab_bits": st.sampled_from([8, 16]),
        "data": st.fixed_dictionaries(
            {},
            optional={
                "samples": st.integers(1, 1 << 16),
                "seq_len": st.integers(2, 1 << 17),
            },
        ),
        "seed": st.integers(0, MAX_SEED),
    },
)


def test_defaults() -> None:
    recipe = parse_recipe(b"scheme: w4a4kv4", "r.yaml")
    assert recipe == Recipe()
    assert recipe.weights.method == "gptq"
    assert recipe.transforms.residual == "hadamard"
    assert (recipe.data.samples, recipe.data.seq_len, recipe.seed) == (128, 512, 0)


METHODS = {
    "gptaq": "gptaq",
    "gptq": "gptq",
    "lowbit": "gptq",
    "omniquant": "omniquant",
    "quarot": "rtn",
    "quarot-gptq": "gptq",
    "rtn": "rtn",
    "smoothquant": "rtn",
}
PLAIN = ("rtn", "gptq", "gptaq", "smoothquant", "omniquant")


@pytest.mark.parametrize("name", METHODS)
def test_built_in(name: str) -> None:
    recipe = load_recipe(name)
    assert name in built_in_recipes()
    assert recipe.name == name
    assert recipe.weights.method == METHODS[name]
    kind = "none" if name in PLAIN else "hadamard"
    transforms = recipe.transforms
    assert transforms.equalize == recipe.weights.act_order == (name == "lowbit")
    assert transforms.smooth == (0.5 if name == "smoothquant" else None)
    for where in ("residual", "value", "key", "down_input"):
        assert getattr(transforms, where) == kind
    assert load_recipe(str(RECIPES / f"{name}.yaml")) == recipe


@given(document=DOCUMENTS)
def test_round_trip(document: dict[str, object]) -> None:
    """A recipe's text gives it back, and says the same to any other YAML parser."""
    if not document:
        return
    recipe = parse_recipe(yaml.safe_dump(document).encode(), "r.yaml")
    text = recipe.text()
    again = parse_recipe(text.encode(), "r.yaml")
    assert again == recipe
    assert again.text() == text
    assert again.sha256() == recipe.sha256()
    assert Recipe.model_validate(yaml.safe_load(text)) == recipe
    assert recipe.override() == recipe


@given(first=DOCUMENTS, second=DOCUMENTS)
def test_equal_recipes_have_equal_texts(
    first: dict[str, object], second: dict[str, object]
) -> None:
    a, b = (Recipe.model_validate(document) for document in (first, second))
    assert (a == b) == (a.text() == b.text()) == (a.sha256() == b.sha256())


def test_text_is_fixed() -> None:
    """The hash is written into checkpoints: the text may not change by accident."""
    assert load_recipe("quarot").text() == (
        "# Recipe of vllm-lowbit calibrate, every key filled in.\n"
        "name: quarot\n"
        "scheme: w4a4kv4\n"
        "transforms:\n"
        "  residual: hadamard\n"
        "  value: hadamard\n"
        "  key: hadamard\n"
        "  down_input: hadamard\n"
        "  attn_input: none\n"
        "  mlp_input: none\n"
        "  equalize: false\n"
        "  scales: none\n"
        "weights:\n"
        "  method: rtn\n"
        "activations:\n"
        "  symmetric: false\n"
        "vocab_bits: 16\n"
        "data:\n"
        "  samples: 128\n"
        "  seq_len: 512\n"
        "seed: 0\n"
    )
    tiny = Recipe.model_validate({"weights": {"damping": 1e-05}})
    assert "  damping: 1.0e-05\n" in tiny.text()


class TestOverride:
    def test_every_value(self) -> None:
        recipe = load_recipe("quarot-gptq").override(
            scheme="w2a16-g64", samples=7, seq_len=9, seed=3, vocab_bits=8
        )
        assert recipe.scheme == "w2a16-g64"
        assert (recipe.data.samples, recipe.data.seq_len) == (7, 9)
        assert (recipe.seed, recipe.vocab_bits) == (3, 8)
        assert recipe.transforms == load_recipe("quarot-gptq").transforms

    def test_zero_is_a_value(self) -> None:
        assert Recipe(seed=5).override(seed=0).seed == 0

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"scheme": "w5"}, "key scheme: .*'w5' does not exist; supported: w4a4kv4"),
            ({"samples": 0}, "key data.samples: .*greater than or equal to 1, got 0"),
            ({"seq_len": 1}, "key data.seq_len: .*got 1"),
            ({"seed": -1}, "key seed: .*got -1"),
            ({"seed": 1 << 63}, "key seed: .*got 9223372036854775808"),
            ({"vocab_bits": 4}, "key vocab_bits: Input should be 8 or 16, got 4"),
        ],
    )
    def test_bad_value(self, change: dict[str, object], message: str) -> None:
        with pytest.raises(ConfigError, match=f"^recipe: {message}"):
            load_recipe("rtn").override(**change)  # type: ignore[arg-type]


def test_frozen() -> None:
    recipe = Recipe()
    with pytest.raises(ValidationError, match="frozen"):
        recipe.seed = 1
    with pytest.raises(ValidationError, match="frozen"):
        recipe.data.samples = 1


class TestLoad:
    @pytest.mark.parametrize(
        ("name", "message"),
        [
            ("qarot", "recipe 'qarot' does not exist; did you mean quarot? built in: "),
            ("gtpq", "did you mean gptq?"),
            (
                "nothing",
                "; built in: gptaq, gptq, lowbit, lowbit-best, omniquant, ostquant, ",
            ),
            ("", "recipe '' does not exist"),
            ("x" * 10000, "xxx... does not exist"),
            ("a\nb", "recipe 'a\\nb' does not exist"),
        ],
    )
    def test_unknown_name(self, name: str, message: str) -> None:
        with pytest.raises(ConfigError) as error:
            load_recipe(name)
        assert message in str(error.value)
        assert "\n" not in str(error.value)
        assert str(error.value).endswith("any other is the path of a .yaml file")

    def test_path_in_any_form(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(tmp_path)
        for name in ("a.yaml", "a.yml", "plain", "recipe.txt"):
            Path(name).write_text("seed: 5")
            assert load_recipe(name).seed == 5
            assert load_recipe(f"./{name}").seed == 5
            assert load_recipe(str(tmp_path / name)).seed == 5

    def test_built_in_name_wins_over_a_file(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(tmp_path)
        Path("quarot").write_text("seed: 5")
        assert load_recipe("quarot").seed == 0
        assert load_recipe("./quarot").seed == 5

    def test_file_is_named_in_errors(self, tmp_path: Path) -> None:
        path = tmp_path / "mine.yaml"
        path.write_text("# mine\nseed: x\n")
        with pytest.raises(ConfigError) as error:
            load_recipe(str(path))
        assert str(error.value).startswith(f"{path}:2: key seed: ")

    @pytest.mark.parametrize(
        ("name", "message"),
        [
            ("missing.yaml", "missing.yaml: cannot be read: No such file"),
            ("no/such", "no/such: cannot be read: No such file"),
            ("folder.yaml", "folder.yaml: is a directory"),
            ("pipe.yaml", "pipe.yaml: is not a regular file"),
            ("large.yaml", "large.yaml: is larger than 65536 bytes"),
            ("nul\x00.yaml", "'nul\\x00.yaml': cannot be the name of a file"),
            ("x" * 5000 + ".yaml", "cannot be read: File name too long"),
            ("loop.yaml", "cannot be read: Too many levels of symbolic links"),
        ],
    )
    def test_what_is_no_file(
        self,
        name: str,
        message: str,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        monkeypatch.chdir(tmp_path)
        Path("folder.yaml").mkdir()
        os.mkfifo("pipe.yaml")
        Path("large.yaml").write_bytes(b"#" * 65537)
        Path("loop.yaml").symlink_to("loop.yaml")
        with pytest.raises(ConfigError) as error:
            load_recipe(name)
        assert message in str(error.value)

    def test_largest_file(self, tmp_path: Path) -> None:
        path = tmp_path / "a.yaml"
        path.write_bytes(b"seed: 5\n".ljust(65536, b"\n"))
        assert load_recipe(str(path)).seed == 5

    def test_editors_of_windows(self, tmp_path: Path) -> None:
        """A byte order mark and carriage returns."""
        path = tmp_path / "a.yaml"
        path.write_bytes("\ufeffseed: 5\r\nscheme: w4a4\r\n".encode())
        assert load_recipe(str(path)).seed == 5
