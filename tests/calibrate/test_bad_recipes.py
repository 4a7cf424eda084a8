# SPDX-License-Identifier: Apache-2.0
"""Recipes that are wrong: each mistake is named with its file and line, quickly."""

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_lowbit.calibrate.recipe import parse_recipe
from vllm_lowbit.errors import ConfigError


def error_of(text: str | bytes) -> str:
    data = text.encode() if isinstance(text, str) else text
    with pytest.raises(ConfigError) as error:
        parse_recipe(data, "r.yaml")
    message = str(error.value)
    message.encode()
    assert "\n" not in message
    assert len(message) < 2000
    return message


BAD = [
    # Keys that are not there.
    ("a: 1", 1, "key a does not exist; "),
    ("seed: 0\nshceme: w4a4", 2, "key shceme does not exist; did you mean scheme?"),
    ("Scheme: w4a4", 1, "did you mean scheme? known: name, scheme, transforms"),
    ("transforms:\n  residul: none", 2, "did you mean residual? known: residual,"),
    ("\n\ntransforms:\n\n  values: none", 5, "key transforms.values does not exist"),
    ("damping: 0.1", 1, "key damping does not exist; did you mean weights.damping?"),
    ("samples: 8", 1, "did you mean data.samples?"),
    ("residual: none", 1, "did you mean transforms.residual?"),
    ("weights:\n  method: gptq\n  dampin: 1", 3, "did you mean damping?"),
    ("data:\n  sample: 1", 2, "did you mean samples? known: samples, seq_len"),
    ("1: 2", 1, "key 1 does not exist"),
    ("~: 2", 1, "key '~' does not exist"),
    ("'two words': 2", 1, "key 'two words' does not exist"),
    ("<<: {seed: 1}", 1, "key '<<' does not exist"),
    ('"\\ud800": 1', 1, "'\\ud800' is not text"),
    ('seed: 1\nscheme: "\\udfff"', 2, "'\\udfff' is not text"),
    (f"{'k' * 1000}: 1", 1, "kkk..."),
    # Keys twice.
    ("seed: 0\nscheme: w4a4\nseed: 0", 3, "key seed is there twice, first on line 1"),
    ("data:\n  samples: 1\n  'samples': 2", 3, "data.samples is there twice, first on"),
    # Values of another type.
    ("scheme: 4", 1, "key scheme: Input should be a valid string, got 4"),
    ("scheme:", 1, "key scheme: Input should be a valid string, got None"),
    ("scheme: [w4a4]", 1, "got ['w4a4']"),
    ("scheme: {a: 1}", 1, "got {'a': 1}"),
    ("seed: 1.0", 1, "key seed: Input should be a valid integer, got 1.0"),
    ("seed: '1'", 1, "got '1'"),
    ("seed: true", 1, "got True"),
    ("seed: 1_000", 1, "got '1_000'"),
    ("seed: 0x10", 1, "got '0x10'"),
    ("seed: 1:30", 1, "got '1:30'"),
    ("seed: 2024-01-01", 1, "got '2024-01-01'"),
    (f"seed: {'9' * 5000}", 1, "key seed: "),
    ("transforms: hadamard", 1, "key transforms: must hold keys and values, got 'h"),
    ("seed: 1\nweights:\n", 2, "key weights: must hold keys and values, got None"),
    ("data: [1, 2]", 1, "key data: must hold keys and values, got [1, 2]"),
    ("transforms:\n  equalize: yes", 2, "valid boolean, got 'yes'"),
    ("transforms:\n  equalize: 1", 2, "valid boolean, got 1"),
    ("transforms:\n  key: true", 2, "should be 'hadamard' or 'none', got True"),
    ("transforms:\n  residual: null", 2, "got None"),
    ("weights:\n  damping: '0.1'", 2, "valid number, got '0.1'"),
    ("activations:\n  symmetric: no", 2, "valid boolean, got 'no'"),
    ("activations: {symmetric: on}", 1, "valid boolean, got 'on'"),
    # Values out of range.
    ("name: a b", 1, "key name: String should match pattern"),
    ("name: ''", 1, "key name: "),
    ("name: ../x", 1, "got '../x'"),
    ("scheme: w5a5", 1, "key scheme: scheme 'w5a5' does not exist; supported: w4a4"),
    ("scheme: w4a16-g100", 1, "group_size"),
    ("transforms:\n  key: fourier", 2, "'hadamard' or 'none', got 'fourier'"),
    (
        "weights:\n  method: awq",
        2,
        "key weights.method: Input should be 'rtn', 'gptq', 'gptaq' or 'omniquant'",
    ),
    ("weights:\n  damping: 0", 2, "greater than 0, got 0"),
    ("weights:\n  damping: -1e-3", 2, "greater than 0, got -0.001"),
    ("weights:\n  damping: 1.001", 2, "less than or equal to 1, got 1.001"),
    ("weights:\n  damping: 1e999", 2, "got inf"),
    ("weights:\n  damping: .nan", 2, "got '.nan'"),
    ("weights:\n  block_size: 0", 2, "greater than or equal to 1, got 0"),
    ("weights:\n  block_size: 4097", 2, "less than or equal to 4096, got 4097"),
    ("vocab_bits: 4", 1, "key vocab_bits: Input should be 8 or 16, got 4"),
    ("data:\n  samples: 0", 2, "key data.samples: "),
    ("data:\n  samples: 65537", 2, "less than or equal to 65536, got 65537"),
    ("data:\n  seq_len: 1", 2, "greater than or equal to 2, got 1"),
    ("data:\n  seq_len: 131073", 2, "less than or equal to 131072, got 131073"),
    ("seed: -1", 1, "greater than or equal to 0, got -1"),
    (f"seed: {1 << 63}", 1, "less than or equal to 9223372036854775807"),
    # Keys that would do nothing.
    (
        "weights:\n  method: rtn\n  damping: 0.01",
        3,
        "damping: has no effect with method",
    ),
    ("weights:\n  block_size: 1\n  method: rtn", 2, "block_size: has no effect"),
    ("weights: {method: rtn, act_order: false}", 1, "act_order: has no effect"),
    ("weights:\n  correction: 0.5", 2, "no effect with method gptq, remove it or use"),
    (
        "weights: {method: omniquant, damping: 0.1}",
        1,
        "no effect with method omniquant",
    ),
    ("omniquant:\n  epochs: 3", 1, "no effect with weights.method gptq, remove it or"),
    ("refine:\n  steps: 3", 2, "refine.steps: has no effect with scope none"),
    ("refine: {scope: none, batch: 3}", 1, "refine.batch: has no effect with scope"),
    ("refine: {scope: layer, top_k: 3}", 1, "top_k: has no effect with scope layer"),
    ("transforms:\n  equalize: true\n  smooth: 0.5", 3, "scales that equalize sets"),
    (
        "activations:\n  clip: searched\n  clip_ratio: 0.9",
        1,
        "clip_ratio has no effect with clip searched where nothing is learned",
    ),
    (
        "weights: {method: omniquant}\nomniquant:\n  input_clip_rate: 0.1",
        2,
        "input_clip_rate has no effect with activations.clip fixed",
    ),
    (
        "transforms: {smooth: 0.5}\nactivations: {clip: learned}",
        2,
        "clip learned is not supported with transforms.smooth",
    ),
    ("activations: {clip: best}", 1, "'fixed', 'searched' or 'learned', got 'best'"),
    ("activations: {clip: learned, clip_ratio: 0.4}", 1, "or equal to 0.5, got 0.4"),
    ("activations: {clip: learned}\nlearn: {clip_lr: 0}", 2, "than 0, got 0"),
    ("learn:\n  extra_weight_bits: 1", 2, "effect with quantize_weights true only"),
    # Values of the training sections.
    ("transforms: {smooth: 1.5}", 1, "transforms.smooth: Input should be less than"),
    ("refine: {scope: all}", 1, "'none', 'model' or 'layer', got 'all'"),
    ("refine: {scope: model, step: 3}", 1, "did you mean steps? known: scope,"),
    ("refine: {scope: model, code_rate: 0}", 1, "greater than 0, got 0"),
    ("weights: {method: omniquant}\nomniquant: {let: 1}", 2, "valid boolean, got 1"),
    (
        "weights: {method: omniquant}\nomniquant: {extra_weight_bits: 1}",
        2,
        "omniquant.extra_weight_bits: is for rounding gptq or gptaq",
    ),
    (
        "weights: {method: omniquant}\nomniquant: {rounding: awq}",
        2,
        "omniquant.rounding: Input should be 'rtn', 'gptq' or 'gptaq', got 'awq'",
    ),
    (
        "transforms: {value: learned}\nlearn: {extra_weight_bits: 5}",
        2,
        "extra_weight_bits: Input should be less than or equal to 4, got 5",
    ),
    # Not a mapping.
    ("", 1, "the file is empty"),
    ("# only a comment\n", 1, "the file is empty"),
    ("---\n...\n", 2, "the file must hold keys and values, not one value"),
    ("\n\nquarot", 3, "the file must hold keys and values, not one value"),
    ("- seed: 1", 1, "the file must hold keys and values, not a list"),
    ("? [seed]\n: 1", 1, "a key must be a word, not a list or a mapping"),
    ("seed: 1\n? {a: b}\n: 1", 2, "a key must be a word"),
    # Not plain YAML.
    ("seed: 1\n\tscheme: w4a4", 2, "\\t"),
    ("seed: 1\n  scheme: w4a4", 2, "mapping values are not allowed here"),
    ("seed: 1\nscheme: 'w4a4", 2, "end of stream"),
    ("seed: [1", 1, "expected ',' or ']'"),
    ("seed: 1\n}", 2, "expected"),
    ("seed: 1\n---\nseed: 2", 2, "expected a single document"),
    ("seed: &a 1", 1, "anchors and aliases are not supported"),
    ("data: &a {samples: 1}\ntransforms: *a", 1, "anchors and aliases are not"),
    ("seed: 1\nscheme: *a", 2, "anchors and aliases are not supported"),
    ("seed: !!int '1'", 1, "the tag 'tag:yaml.org,2002:int' is not supported"),
    ("seed: !!python/object/apply:os.getcwd []", 1, "the tag 'tag:yaml.org,2002:pyth"),
    ("seed: ! 1", 1, "the tag '!' is not supported"),
    ("%YAML 2.0\n---\nseed: 1", 1, "incompatible YAML document"),
    ('scheme: "\\UFFFFFFFF"', 1, "not YAML: "),
    ("seed: 1\nscheme: \x00", 2, "the character '\\x00' is not allowed in YAML"),
    ("seed: 1\nscheme: \x1b[31m", 2, "the character '\\x1b' is not allowed in YAML"),
    (b"seed: 1\nname: \xff\xfe", 2, "not UTF-8 text, found byte 0xff"),
    ("scheme: w4a4".encode("utf-16"), 1, "not UTF-8 text, found byte 0xff"),
    (bytes(range(256)), 2, "not UTF-8 text, found byte 0x80"),
    (b"\x93NUMPY\x01\x00v\x00{'descr': '<f4'", 1, "not UTF-8 text, found byte 0x93"),
]


@pytest.mark.parametrize(("text", "line", "message"), BAD)
def test_bad_recipe_names_file_and_line(
    text: str | bytes, line: int, message: str
) -> None:
    found = error_of(text)
    assert found.startswith(f"r.yaml:{line}: ")
    assert message in found


def test_every_problem_is_named_in_order() -> None:
    message = error_of("seed: -1\ndata:\n  samples: 0\n  x: 1\nscheme: w5\n")
    problems = [part for part in message.split("; ") if part.startswith("r.yaml:")]
    assert [problem.split(": ")[0] for problem in problems] == [
        "r.yaml:1",
        "r.yaml:3",
        "r.yaml:4",
        "r.yaml:5",
    ]


def test_many_problems_are_bounded() -> None:
    message = error_of("".join(f"key{i}: 1\n" for i in range(3000)))
    assert message.count("r.yaml:") == 8


BOMBS = {
    "deep lists": b"[" * 65000,
    "deep mappings": b"{a: " * 16000,
    "deep blocks": b"\n".join(b" " * i + b"a:" for i in range(350)),
    "deep dashes": b"- " * 32000,
    "questions": b"? " * 32000,
    "aliases": b"a: &a [x,x]\n"
    + b"".join(b"%c: &%c [*%c,*%c]\n" % (c + 1, c + 1, c, c) for c in range(97, 121)),
    "many keys": b"".join(b"k%d: 1\n" % i for i in range(6000)),
    "long scalar": b"seed: '" + b"x" * 65000 + b"'",
    "long list": b"seed: [" + b"1," * 32000 + b"]",
    "comments": b"#" * 65000 + b"\n- 1",
    "directives": b"%FOO bar\n" * 7000,
    "escapes": b'name: "' + b"\\x41" * 16000 + b'"',
    "tags": b"!!str " * 10000,
    "huge integer": b"seed: " + b"9" * 65000,
    "huge version": b"%YAML 1." + b"9" * 60000 + b"\n---\na: 1",
}


@pytest.mark.parametrize("name", BOMBS)
def test_bombs_are_refused_quickly(name: str) -> None:
    start = time.process_time()
    error_of(BOMBS[name])
    assert time.process_time() - start < 5


@given(data=st.binary(max_size=200) | st.text(max_size=100).map(lambda t: t.encode()))
def test_any_bytes_raise_only_config_errors(data: bytes) -> None:
    try:
        parse_recipe(data, "r.yaml")
    except ConfigError as error:
        assert str(error).startswith("r.yaml:")


@given(
    st.lists(st.sampled_from(list("{}[]:,-?&*!|>'\"%@`#\n\t aseed0~\\U")), max_size=40)
)
def test_yaml_shaped_text_raises_only_config_errors(characters: list[str]) -> None:
    try:
        parse_recipe("".join(characters).encode(), "r.yaml")
    except ConfigError as error:
        assert str(error).startswith("r.yaml:")
