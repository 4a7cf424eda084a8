# SPDX-License-Identifier: Apache-2.0
"""The manifest: what it refuses is named by tensor and value."""

from typing import Any

import pytest

from vllm_lowbit.errors import ConfigError
from vllm_lowbit.schema import Manifest

from .documents import DROP, SHA, manifest, put

BAD_MANIFEST = [
    ("format_version", 2, "format_version", "got 2"),
    ("format_version", True, "format_version", "should be a number, got True"),
    ("tensors", [], "tensors", "got []"),
    ("tensors", DROP, "tensors", "Field required"),
    ("tensors/scalar/dtype", "F64", "dtype", "got 'F64'"),
    ("tensors/scalar/dtype", "bf16", "dtype", "got 'bf16'"),
    ("tensors/scalar/shape", [-1], "scalar", "impossible shape [-1]"),
    ("tensors/scalar/shape", [1, 1 << 41], "scalar", "impossible shape"),
    ("tensors/scalar/shape", [1] * 9, "shape", "at most 8 items"),
    ("tensors/scalar/shape", [1.5], "shape.0", "got 1.5"),
    ("tensors/scalar/shape", ["1"], "shape.0", "got '1'"),
    ("tensors/scalar/shape", [True], "shape.0", "got True"),
    ("tensors/scalar/shape", 3, "shape", "got 3"),
    ("tensors/scalar/shape", {"0": 3}, "shape", "got {'0': 3}"),
    ("tensors/scalar/sha256", SHA.upper().replace("0", "A"), "sha256", "got 'AAA"),
    ("tensors/scalar/sha256", SHA[1:], "sha256", "got '000"),
    ("tensors/scalar/sha256", DROP, "sha256", "Field required"),
    ("tensors/scalar/mode", "rw", "mode", "got 'rw'"),
    ("tensors/scalar", None, "scalar", "got None"),
    ("config", [], "config", "got []"),
    ("config", DROP, "config", "Field required"),
]


@pytest.mark.parametrize(("path", "value", "key", "message"), BAD_MANIFEST)
def test_bad_manifest_names_tensor_and_value(
    path: str, value: Any, key: str, message: str
) -> None:
    with pytest.raises(ConfigError) as error:
        Manifest.parse(put(manifest(), path, value), "lowbit_manifest.json")
    text = str(error.value)
    assert text.startswith("lowbit_manifest.json: key ")
    if path.startswith("tensors/"):
        assert "tensors.scalar" in text
    assert key in text
    assert message in text


@pytest.mark.parametrize(
    "file",
    [
        "",
        "model.bin",
        "../model.safetensors",
        "/etc/model.safetensors",
        "a\\b.safetensors",
        ".hidden.safetensors",
        "model.safetensors\n",
        "\u00e9.safetensors",
    ],
)
def test_manifest_file_is_a_plain_safetensors_name(file: str) -> None:
    with pytest.raises(ConfigError) as error:
        Manifest.parse(put(manifest(), "tensors/scalar/file", file), "x")
    assert "key tensors.scalar.file: " in str(error.value)
    assert str(error.value).endswith(f"got {file!r}")
