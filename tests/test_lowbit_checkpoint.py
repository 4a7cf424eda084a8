# SPDX-License-Identifier: Apache-2.0
"""Lowbit checkpoints: whole ones pass, each defect is refused by file and tensor."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from vllm_lowbit.architecture import ModelShape
from vllm_lowbit.errors import CheckpointError, ConfigError
from vllm_lowbit.kernels.grid import IntGrid
from vllm_lowbit.kernels.packing import pack
from vllm_lowbit.lowbit_checkpoint import (
    HEAD_SCALE,
    PackedWeight,
    expected_tensors,
    read_config,
)
from vllm_lowbit.manifest import require_headers
from vllm_lowbit.schema import SCHEME_NAMES, LowbitConfig, Weights, scheme_from_name
from vllm_lowbit.verification import Verification

Q_PROJ, DOWN_PROJ = "model.layers.1.self_attn.q_proj", "model.layers.0.mlp.down_proj"
NORM, BIAS = "model.layers.0.input_layernorm.weight", f"{Q_PROJ}.bias"
EMBEDDING = "model.embed_tokens"
ONLINE = {"apply": "online", "order": 128, "block": 128, "sign_seed": 1}
# Arguments of the model and of the checkpoint.
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "default": ({}, {}),
    "grouped": ({}, {"scheme": "w4a16-g128", "vocab_bits": 8}),
    "asymmetric": ({"attention_bias": True}, {"scheme": "w2a16-g64"}),
    "planes": ({}, {"scheme": "w3a16"}),
    "tied": (
        {"tie_word_embeddings": True},
        {"scheme": "w6a6", "vocab_bits": 8, "residual": ONLINE},
    ),
}


@pytest.fixture(scope="module")
def originals(
    tmp_path_factory: Any, tiny_model: Any, lowbit_checkpoint: Any
) -> dict[str, Path]:
    """Sound checkpoints, built once and copied by each test that changes one."""
    root = tmp_path_factory.mktemp("lowbit")
    return {
        name: lowbit_checkpoint(
            root / name, tiny_model(root / f"{name}-plain", **model), **checkpoint
        )
        for name, (model, checkpoint) in CASES.items()
    }


@pytest.fixture
def copy(originals: dict[str, Path], tmp_path: Path) -> Callable[[str], Path]:
    return lambda name: Path(shutil.copytree(originals[name], tmp_path / name))


def check(directory: Path) -> None:
    data, config = read_config(str(directory))
    assert config is not None
    shape = ModelShape.from_config(data, "config.json")
    require_headers(directory, shape, config)
    Verification(directory).finish()


@pytest.fixture
def refused(write_manifest: Callable[[Path], None]) -> Callable[..., None]:
    """``refused(directory, *named)``, the manifest agreeing with the changed files."""
    return partial(_refused, write_manifest)


def _refused(write_manifest: Any, directory: Path, *named: object) -> None:
    write_manifest(directory)
    with pytest.raises(CheckpointError) as error:
        check(directory)
    for name in named:
        assert str(name) in str(error.value)


@pytest.mark.parametrize("name", CASES)
def test_whole_checkpoint(name: str, originals: dict[str, Path]) -> None:
    check(originals[name])


@pytest.mark.parametrize("name", CASES)
def test_every_tensor_is_needed(
    name: str, copy: Any, rewrite: Any, refused: Any
) -> None:
    directory, kinds = copy(name), {}

    def sort(tensors: dict[str, torch.Tensor]) -> None:
        kinds.update({n.rpartition(".")[2]: n for n in reversed(tensors)})

    path = rewrite(directory, sort)
    whole = path.read_bytes()
    if name == "tied":
        kinds["input_scale"] = HEAD_SCALE
    for tensor in kinds.values():
        path.write_bytes(whole)
        rewrite(directory, lambda tensors, name=tensor: tensors.pop(name))
        refused(directory, directory, f"tensor {tensor} is in none of the files")


@pytest.mark.parametrize(
    ("case", "name"),
    [
        ("default", f"{Q_PROJ}.weight"),
        ("default", f"{Q_PROJ}.weight_zero_point"),
        ("default", HEAD_SCALE),
        ("default", BIAS),
        ("tied", "lm_head.weight"),
        ("tied", "lm_head.weight_packed"),
        ("grouped", f"{EMBEDDING}.weight"),
        ("default", "model.layers.0.self_attn.rotary_emb.inv_freq"),
    ],
)
def test_extra_tensor(
    case: str, name: str, copy: Any, rewrite: Any, refused: Any
) -> None:
    directory = copy(case)
    path = rewrite(directory, lambda tensors: tensors.update({name: torch.ones(3)}))
    refused(directory, f"{path}: tensor {name} does not belong to the model")


@pytest.mark.parametrize(
    ("case", "name", "shape"),
    [
        ("default", f"{Q_PROJ}.weight_packed", [256, 16]),
        ("default", f"{Q_PROJ}.weight_scale", [256, 1]),
        ("grouped", f"{DOWN_PROJ}.weight_packed", [128, 32]),
        ("grouped", f"{DOWN_PROJ}.weight_scale", [128, 2]),
        ("grouped", f"{EMBEDDING}.weight_packed", [256, 32]),
        ("grouped", f"{EMBEDDING}.weight_scale", [256, 1]),
        ("asymmetric", f"{Q_PROJ}.weight_zero_point", [256, 2]),
        ("planes", f"{DOWN_PROJ}.weight_packed", [128, 24]),
        ("tied", HEAD_SCALE, [128]),
    ],
)
def test_misshaped_tensor(
    case: str, name: str, shape: list[int], copy: Any, rewrite: Any, refused: Any
) -> None:
    directory = copy(case)

    def cut(tensors: dict[str, torch.Tensor]) -> None:
        assert list(tensors[name].shape) == shape
        tensors[name] = tensors[name][:-1].contiguous()

    path = rewrite(directory, cut)
    short = [shape[0] - 1, *shape[1:]]
    needs = f"has shape {short}, the model needs {shape}"
    refused(directory, f"{path}: tensor {name} {needs}")


@pytest.mark.parametrize(
    ("case", "name", "dtype", "message"),
    [
        ("default", f"{Q_PROJ}.weight_packed", torch.int64, "I64, supported: I32"),
        ("default", f"{Q_PROJ}.weight_scale", torch.bfloat16, "BF16, supported: F32"),
        ("asymmetric", f"{Q_PROJ}.weight_zero_point", torch.uint8, "U8, supported: I8"),
        ("tied", HEAD_SCALE, torch.float16, "F16, supported: F32"),
        ("default", NORM, torch.int8, "I8, supported: BF16, F16, F32"),
    ],
)
def test_dtype(
    case: str,
    name: str,
    dtype: torch.dtype,
    message: str,
    copy: Any,
    rewrite: Any,
    refused: Any,
) -> None:
    directory = copy(case)
    path = rewrite(directory, lambda t: t.update({name: t[name].to(dtype)}))
    refused(directory, f"{path}: tensor {name} has dtype {message}")


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
@pytest.mark.parametrize(
    ("case", "name"), [("default", NORM), ("asymmetric", BIAS), ("tied", HEAD_SCALE)]
)
def test_non_finite_vector(
    case: str, name: str, value: float, copy: Any, rewrite: Any, refused: Any
) -> None:
    directory = copy(case)
    path = rewrite(directory, lambda tensors: tensors[name][-1:].fill_(value))
    refused(directory, f"{path}: tensor {name} holds a non-finite value")


@pytest.mark.parametrize(
    ("case", "change", "named"),
    [
        (
            "default",
            {"bits": 8},
            "weight_packed has shape [256, 16], the model needs [256, 32]",
        ),
        (
            "default",
            {"group_size": 32},
            "weight_scale has shape [256, 1], the model ne",
        ),
        (
            "default",
            {"symmetric": False},
            "q_proj.weight_zero_point is in none of the files",
        ),
        ("asymmetric", {"symmetric": True}, "weight_zero_point does not belong to the"),
        ("grouped", {"group_size": None}, "weight_scale has shape [128, 2], the model"),
    ],
)
def test_config_that_says_otherwise(
    case: str, change: dict[str, Any], named: str, copy: Any, refused: Any
) -> None:
    directory = copy(case)
    path = directory / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"]["scheme"]["weights"] |= change
    path.write_text(json.dumps(config))
    refused(directory, named)


def test_every_scheme_has_its_tensors() -> None:
    shape = ModelShape(128, 256, 1, 2, 2, 64, 100, False)
    plain = shape.tensors()
    for name in SCHEME_NAMES:
        scheme = scheme_from_name(name)
        config = LowbitConfig.parse(
            {"scheme": scheme.model_dump(), "rotations": {}}, ""
        )
        tensors = expected_tensors(shape, config)
        kinds = 2 if scheme.weights.symmetric else 3
        assert len(tensors) == len(plain) + 7 * (kinds - 1)
        assert tensors["lm_head.weight"].shape == (100, 128)
        packed = tensors["model.layers.0.mlp.up_proj.weight_packed"]
        assert packed.shape == (256, 128 * scheme.weights.bits // 32)


class TestCodes:
    """Unpacking one weight, with the values its grid does not have."""

    @pytest.mark.parametrize("bits", [2, 3, 4, 6, 8])
    @pytest.mark.parametrize("symmetric", [True, False])
    @pytest.mark.parametrize("rows", [1, 7, 9000])
    def test_are_those_that_were_packed(
        self, bits: int, symmetric: bool, rows: int
    ) -> None:
        grid, columns = IntGrid(bits, symmetric), 70
        codes = torch.randint(grid.code_min, grid.code_max + 1, (rows, columns)).char()
        codes[0, 0], codes[-1, -1] = grid.code_max, grid.code_min
        stored = self.stored(codes, bits)
        weights = Weights(bits=bits, symmetric=symmetric)  # type: ignore[arg-type]
        assert torch.equal(stored.codes("x", columns, weights), codes)
        part = slice(rows // 2, rows)
        found = stored.rows(part).codes("x", columns, weights)
        assert torch.equal(found, codes[part])

    def stored(self, codes: torch.Tensor, bits: int, **tensors: Any) -> PackedWeight:
        scale = torch.rand(len(codes), 2) + 0.1
        return replace(PackedWeight(pack(codes, bits), scale, None), **tensors)

    @pytest.mark.parametrize("bits", [2, 3, 4, 6, 8])
    def test_code_that_symmetric_grids_leave_out(self, bits: int) -> None:
        """In the last of many rows, after the part that is unpacked first."""
        codes = torch.zeros(9000, 70, dtype=torch.int8)
        codes[-1, -1] = low = -(1 << (bits - 1))
        weights = Weights(bits=bits)  # type: ignore[arg-type]
        message = (
            rf"^tensor x.weight_packed holds the code {low}, outside of "
            rf"\[{low + 1}, {-low - 1}\]$"
        )
        with pytest.raises(CheckpointError, match=message):
            self.stored(codes, bits).codes("x", 70, weights)

    @pytest.mark.parametrize(
        "value", [0.0, -1.0, 2.0**-127, torch.nan, torch.inf, -torch.inf]
    )
    def test_scale(self, value: float) -> None:
        stored = self.stored(torch.zeros(5, 64, dtype=torch.int8), 4)
        stored.scale[3, 1] = value
        with pytest.raises(CheckpointError) as error:
            stored.codes("model.x", 64, Weights(bits=4))
        assert str(error.value) == (
            f"tensor model.x.weight_scale holds {value}; scales are positive, finite "
            "and not subnormal"
        )
        # The smallest that may be.
        stored.scale[3, 1] = 2.0**-126
        stored.codes("model.x", 64, Weights(bits=4))

    @pytest.mark.parametrize("value", [-9, 8, 127, -128])
    def test_zero_point(self, value: int) -> None:
        zero_point = torch.zeros(5, 2, dtype=torch.int8)
        stored = self.stored(
            torch.zeros(5, 64, dtype=torch.int8), 4, zero_point=zero_point
        )
        weights = Weights(bits=4, symmetric=False)
        stored.codes("x", 64, weights)
        zero_point[-1, 0] = value
        message = rf"x.weight_zero_point holds the value {value}, outside of \[-8, 7\]"
        with pytest.raises(CheckpointError, match=message):
            stored.codes("x", 64, weights)


class TestReadConfig:
    def test_plain(self, tmp_path: Path) -> None:
        (tmp_path / "config.json").write_text('{"hidden_size": 7}')
        assert read_config(str(tmp_path)) == ({"hidden_size": 7}, None)

    def test_lowbit(self, originals: dict[str, Path]) -> None:
        data, config = read_config(str(originals["tied"]))
        assert config is not None and config.scheme.name == "w6a6"
        assert config.scheme.vocab_bits == 8
        assert data["quantization_config"]["quant_method"] == "lowbit"

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            (None, "cannot be read as JSON"),
            ("{", "cannot be read as JSON"),
            ("[1]", "not a JSON object"),
            (
                '{"quantization_config": {"quant_method": "gptq"}}',
                "already quantized by 'gptq'; supported",
            ),
            ('{"quantization_config": []}', "already quantized by None; supported"),
            (
                '{"quantization_config": {"quant_method": "lowbit"}}',
                "quantization_config: key scheme: Field required",
            ),
        ],
    )
    def test_bad(self, text: str | None, message: str, tmp_path: Path) -> None:
        path = tmp_path / "config.json"
        if text is not None:
            path.write_text(text)
        with pytest.raises(ConfigError) as error:
            read_config(str(tmp_path))
        assert str(error.value).startswith(f"{path}: ") and message in str(error.value)
