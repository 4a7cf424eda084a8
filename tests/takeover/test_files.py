# SPDX-License-Identifier: Apache-2.0
"""Files of other tools' checkpoints: what is not as declared is refused by name."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from vllm_lowbit.architecture import ModelShape
from vllm_lowbit.calibrate.reference_model import ReferenceModel
from vllm_lowbit.errors import CheckpointError, ConfigError, UnsupportedError
from vllm_lowbit.takeover.checkpoint import check_foreign_checkpoint, read_quantization
from vllm_lowbit.takeover.foreign import ForeignFormat

K_PROJ = "model.layers.0.self_attn.k_proj"
DOWN = "model.layers.0.mlp.down_proj"


@pytest.fixture
def copy(originals: dict[str, Path], tmp_path: Path) -> Callable[[str], Path]:
    return lambda name: Path(shutil.copytree(originals[name], tmp_path / name))


def check(directory: Path) -> None:
    data, foreign = read_quantization(str(directory))
    assert isinstance(foreign, ForeignFormat)
    shape = ModelShape.from_config(data, "config.json")
    foreign.resolve(shape, "config.json")
    check_foreign_checkpoint(str(directory), shape, foreign)


def test_sound(originals: dict[str, Path]) -> None:
    for name, directory in originals.items():
        if name != "plain":
            check(directory)


def test_stacked_linears(copy: Any) -> None:
    directory = copy("gptq")
    path = directory / "config.json"
    keys = {"architectures": ["Phi3ForCausalLM"], "model_type": "phi3"}
    path.write_text(json.dumps(json.loads(path.read_text()) | keys))
    message = "config.json: gptq checkpoints of Phi3ForCausalLM are not supported: thei"
    with pytest.raises(UnsupportedError, match=message):
        check(directory)


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("packed", f"{K_PROJ}.weight_zero_point"),
        ("packed", f"{DOWN}.weight_shape"),
        ("w4a4", f"{DOWN}.weight_scale"),
        ("int4", f"{DOWN}.weight"),
        ("gptq", f"{DOWN}.qzeros"),
        ("gptq_v2", "lm_head.weight"),
        ("awq", f"{K_PROJ}.scales"),
        ("awq", "model.norm.weight"),
    ],
)
def test_missing(kind: str, name: str, copy: Any, rewrite: Any) -> None:
    directory = copy(kind)
    rewrite(directory, lambda tensors: tensors.pop(name))
    with pytest.raises(CheckpointError, match=f"are missing, first {name}"):
        check(directory)


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("w4a4", f"{K_PROJ}.weight_zero_point"),
        ("w8a8", f"{K_PROJ}.input_scale"),
        ("w8a8", f"{K_PROJ}.k_scale"),
        ("awq", f"{K_PROJ}.g_idx"),
        ("gptq", "lm_head.qweight"),
    ],
)
def test_extra(kind: str, name: str, copy: Any, rewrite: Any) -> None:
    directory = copy(kind)
    rewrite(directory, lambda tensors: tensors.update({name: torch.zeros(1)}))
    with pytest.raises(CheckpointError, match=f"tensor {name} does not belong to"):
        check(directory)


@pytest.mark.parametrize(
    ("kind", "name", "shape"),
    [
        ("packed", f"{DOWN}.weight_packed", [128, 31]),
        ("packed", f"{DOWN}.weight_zero_point", [128, 8]),
        ("w4a4", f"{DOWN}.weight_scale", [128]),
        ("w8a8", f"{DOWN}.weight", [256, 128]),
        ("gptq", f"{DOWN}.qweight", [128, 32]),
        ("gptq", f"{DOWN}.g_idx", [255]),
        ("awq", f"{DOWN}.qweight", [128, 32]),
        ("awq", f"{DOWN}.scales", [1, 128]),
    ],
)
def test_shape(kind: str, name: str, shape: list[int], copy: Any, rewrite: Any) -> None:
    directory = copy(kind)

    def reshape(tensors: dict[str, torch.Tensor]) -> None:
        tensors[name] = torch.ones(shape, dtype=tensors[name].dtype)

    rewrite(directory, reshape)
    with pytest.raises(CheckpointError) as error:
        check(directory)
    assert f"tensor {name} has shape {shape}, the model needs" in str(error.value)


@pytest.mark.parametrize(
    ("kind", "name", "dtype", "message"),
    [
        ("packed", f"{DOWN}.weight_packed", torch.int64, "I64, supported: I32"),
        ("packed", f"{DOWN}.weight_shape", torch.int32, "I32, supported: I64"),
        ("w8a8", f"{DOWN}.weight", torch.float16, "F16, supported: I8"),
        ("w8a8", f"{DOWN}.weight_scale", torch.int32, "I32, supported: BF16, F16"),
        ("gptq", f"{DOWN}.qzeros", torch.float32, "F32, supported: I32"),
    ],
)
def test_dtype(
    kind: str, name: str, dtype: torch.dtype, message: str, copy: Any, rewrite: Any
) -> None:
    directory = copy(kind)
    rewrite(directory, lambda t: t.update({name: t[name].to(dtype)}))
    with pytest.raises(CheckpointError, match=f"tensor {name} has dtype {message}"):
        check(directory)


def test_shape_of_a_weight(copy: Any, rewrite: Any) -> None:
    directory, name = copy("packed"), f"{K_PROJ}.weight_shape"
    rewrite(directory, lambda tensors: tensors[name].fill_(64))
    with pytest.raises(CheckpointError) as error:
        check(directory)
    assert f"tensor {name} must hold the weight's shape, [128, 128]" in str(error.value)
    assert "it starts with [64, 64]" in str(error.value)


class TestOrderOfInputs:
    """``g_idx``: the trivial one is no order, whatever ``desc_act`` says."""

    NAME = f"{K_PROJ}.g_idx"

    def declare(self, directory: Path, **changes: Any) -> None:
        path = directory / "config.json"
        config = json.loads(path.read_text())
        config["quantization_config"] |= changes
        path.write_text(json.dumps(config))

    @pytest.mark.parametrize("desc_act", [False, True])
    def test_trivial(self, desc_act: bool, copy: Any) -> None:
        directory = copy("gptq")
        self.declare(directory, desc_act=desc_act)
        check(directory)

    @pytest.mark.parametrize("desc_act", [False, True])
    def test_permuted(self, desc_act: bool, copy: Any, rewrite: Any) -> None:
        directory = copy("gptq")
        self.declare(directory, desc_act=desc_act)
        rewrite(directory, lambda tensors: tensors[self.NAME].copy_(self.flipped()))
        with pytest.raises(CheckpointError) as error:
            check(directory)
        assert f"tensor {self.NAME} must hold i // 64, as inputs in" in str(error.value)
        assert "it starts with [1, 1, 1, 1]" in str(error.value)

    def flipped(self) -> torch.Tensor:
        return 1 - torch.arange(128, dtype=torch.int32) // 64

    def test_needed_with_desc_act_only(self, copy: Any, rewrite: Any) -> None:
        directory = copy("gptq")
        rewrite(directory, lambda tensors: tensors.pop(self.NAME))
        check(directory)
        self.declare(directory, desc_act=True)
        with pytest.raises(CheckpointError, match=f"are missing, first {self.NAME}"):
            check(directory)

    def test_one_group_has_no_order(self, copy: Any, rewrite: Any) -> None:
        directory = copy("gptq8")
        rewrite(directory, lambda tensors: tensors.pop(self.NAME))
        self.declare(directory, desc_act=True)
        check(directory)


def test_bias_of_a_model_that_has_none(copy: Any, rewrite: Any) -> None:
    directory, name = copy("gptq"), f"{K_PROJ}.bias"
    rewrite(directory, lambda t: t.update({name: torch.zeros(128).half()}))
    check(directory)
    rewrite(directory, lambda t: t[name][3:4].fill_(1))
    with pytest.raises(CheckpointError, match="must hold zeros: the model has no such"):
        check(directory)


@pytest.mark.parametrize("kind", ["pack-quantized", "gptq", "awq"])
def test_bias_of_a_model_that_has_one(
    kind: str, tiny_model: Any, foreign_checkpoint: Any, rewrite: Any, tmp_path: Path
) -> None:
    biased = {"attention_bias": True, "mlp_bias": True, "num_hidden_layers": 1}
    plain = tiny_model(tmp_path / "plain", **biased)
    rewrite(plain, lambda tensors: tensors[f"{K_PROJ}.bias"].fill_(3))
    directory = foreign_checkpoint(tmp_path / kind, plain, kind)
    linear = ReferenceModel(str(directory)).linears["model.layers.0.self_attn.qkv_proj"]
    none = linear(torch.zeros(1, 128))
    assert none[0, 256:384].eq(3).all() and none[0, 384:].eq(0).all()
    rewrite(directory, lambda tensors: tensors.pop(f"{K_PROJ}.bias"))
    with pytest.raises(CheckpointError, match=f"are missing, first {K_PROJ}.bias"):
        check(directory)


def test_sizes_that_do_not_fit(copy: Any) -> None:
    directory = copy("gptq_v2")
    config = json.loads((directory / "config.json").read_text())
    config["quantization_config"]["group_size"] = 256
    (directory / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnsupportedError, match="group_size 256 does not divide hidden"):
        check(directory)
    config["quantization_config"]["group_size"] = 128
    config["intermediate_size"] = 260
    (directory / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnsupportedError, match="group_size 128 does not divide interm"):
        check(directory)
    config["quantization_config"]["group_size"] = -1
    (directory / "config.json").write_text(json.dumps(config))
    message = "gate_proj: 260 outputs are not a multiple of the 8 codes .* in qzeros"
    with pytest.raises(UnsupportedError, match=message):
        check(directory)


class TestReference:
    def test_equals_another_format_of_the_same_codes(
        self, originals: dict[str, Path], foreign_checkpoint: Any, tmp_path: Path
    ) -> None:
        ids = torch.arange(20)
        settings = {"symmetric": False, "group_size": 32}
        logits = [
            ReferenceModel(
                str(
                    foreign_checkpoint(
                        tmp_path / kind, originals["plain"], kind, **settings
                    )
                )
            )(ids)
            for kind in ("pack-quantized", "int-quantized", "gptq", "gptq_v2", "awq")
        ]
        assert all(torch.equal(other, logits[0]) for other in logits[1:])

    def test_activations_are_quantized(
        self, originals: dict[str, Path], copy: Any
    ) -> None:
        reference = ReferenceModel(str(originals["w4a4"]))
        assert reference.scheme_name == "w4a4"
        directory = copy("w4a4")
        config = json.loads((directory / "config.json").read_text())
        group = config["quantization_config"]["config_groups"]["group_0"]
        group["input_activations"] = None
        (directory / "config.json").write_text(json.dumps(config))
        ids = torch.arange(20)
        assert (reference(ids) - ReferenceModel(str(directory))(ids)).abs().max() > 1e-3

    def test_no_other_scheme(self, originals: dict[str, Path]) -> None:
        config = ReferenceModel(str(originals["w8a8"])).config
        with pytest.raises(ConfigError, match="has its own scheme w4a4; no other"):
            ReferenceModel(str(originals["w4a4"]), config)
