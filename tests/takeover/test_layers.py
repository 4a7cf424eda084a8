# SPDX-License-Identifier: Apache-2.0
"""Layers of other tools' checkpoints inside vLLM: fusing, shards, the flag."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from vllm_lowbit import truth
from vllm_lowbit.calibrate.reference_model import ReferenceModel
from vllm_lowbit.errors import CheckpointError, UnsupportedError
from vllm_lowbit.kernels.linear_w4a4.generic import prepare
from vllm_lowbit.module_names import FUSED
from vllm_lowbit.takeover.checkpoint import read_quantization
from vllm_lowbit.takeover.foreign import ForeignFormat

pytest.importorskip("vllm")

# Of the tiny model: hidden 128, intermediate 256, 4 heads and 2 KV heads of 64.
SIZES = {
    "q_proj": (256, 128),
    "k_proj": (128, 128),
    "v_proj": (128, 128),
    "o_proj": (128, 256),
    "gate_proj": (256, 128),
    "up_proj": (256, 128),
    "down_proj": (128, 256),
}
SHARDS = {"qkv_proj": ("q", "k", "v"), "gate_up_proj": (0, 1)}
KINDS = ["packed", "w4a4", "w8a8", "int4", "gptq", "gptq8", "gptq_v2", "awq"]
Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def engine(originals: dict[str, Path], engine_config: Any) -> Iterator[None]:
    """vLLM's config of the plain model, set as the current one."""
    from vllm.config import set_current_vllm_config

    with set_current_vllm_config(engine_config(originals["plain"], dtype="float32")):
        yield


@pytest.fixture(params=[(0, 1), (0, 2), (1, 2)], ids=["whole", "first", "second"])
def rank(request: Any, monkeypatch: pytest.MonkeyPatch) -> tuple[int, int]:
    """This process as one of one or two tensor parallel ranks."""
    parallel(monkeypatch, *request.param)
    return request.param


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    parallel(monkeypatch, 0, 1)


def parallel(patch: pytest.MonkeyPatch, rank: int, size: int) -> None:
    linear = "vllm.model_executor.layers.linear.get_tensor_model_parallel_"
    patch.setattr(f"{linear}rank", lambda: rank)
    patch.setattr(f"{linear}world_size", lambda: size)


def foreign_of(directory: Path) -> ForeignFormat:
    foreign = read_quantization(str(directory))[1]
    assert isinstance(foreign, ForeignFormat)
    return foreign


def build(directory: Path, role: str) -> Any:
    """A linear of vLLM with our method for the checkpoint."""
    from vllm.model_executor.layers import linear

    from vllm_lowbit.config import LowbitQuantizationConfig

    config = LowbitQuantizationConfig(stored=foreign_of(directory))
    model = json.loads((directory / "config.json").read_text())
    shape = type("Config", (), {"to_dict": lambda self: model})()
    config.maybe_update_config(str(directory), shape)
    config._checked_engine = True
    block = "mlp" if role in ("gate_up_proj", "down_proj") else "self_attn"
    settings: dict[str, Any] = {
        "bias": False,
        "quant_config": config,
        "prefix": f"model.layers.0.{block}.{role}",
        "params_dtype": torch.float32,
    }
    if role == "qkv_proj":
        return linear.QKVParallelLinear(128, 64, 4, 2, **settings)
    if role == "gate_up_proj":
        return linear.MergedColumnParallelLinear(128, [256, 256], **settings)
    return linear.RowParallelLinear(256, 128, **settings)


def stored_tensors(directory: Path, layer: Any, part: str) -> Tensors:
    block = layer.prefix.rpartition(".")[0]
    tensors = load_file(directory / "model.safetensors")
    prefix = f"{block}.{part}."
    return {n.removeprefix(prefix): t for n, t in tensors.items() if prefix in n}


def load(directory: Path, layer: Any, role: str) -> None:
    """Through vLLM's own weight loaders; then converted."""
    for part, shard in zip(FUSED[role], SHARDS.get(role, [None]), strict=True):
        stored = stored_tensors(directory, layer, part)
        for kind in layer.quant_method.foreign.layouts(*SIZES[part]):
            parameter = layer.get_parameter(kind)
            arguments = (stored[kind],) if shard is None else (stored[kind], shard)
            parameter.weight_loader(parameter, *arguments)
    layer.quant_method.process_weights_after_loading(layer)


def cut(tensor: torch.Tensor, dim: int, rank: tuple[int, int]) -> torch.Tensor:
    return tensor.chunk(rank[1], dim)[rank[0]]


@pytest.mark.parametrize("role", ["qkv_proj", "gate_up_proj", "o_proj", "down_proj"])
@pytest.mark.parametrize("kind", KINDS)
def test_shards(
    originals: dict[str, Path],
    engine: None,
    rank: tuple[int, int],
    assert_kept: Any,
    kind: str,
    role: str,
) -> None:
    """What vLLM cut and fused, converted, is what was converted whole, then cut."""
    directory = originals[kind]
    layer, foreign = build(directory, role), foreign_of(directory)
    load(directory, layer, role)
    assert layer.input_scale is None
    assert all(name.startswith("weight") for name, _ in layer.named_parameters())
    dim = 0 if role in SHARDS else 1
    codes, scales, zeros = [], [], []
    for part in FUSED[role]:
        n, k = SIZES[part]
        stored = stored_tensors(directory, layer, part)
        whole = foreign.convert(part, stored, n, k)
        prepared = prepare(whole.codes, whole.zero_point)
        assert int(prepared.abs().max()) <= layer.quant_method.grid.max_difference
        codes.append(cut(whole.codes, dim, rank))
        grouped = dim == 0 or whole.scale.shape[1] > 1
        scales.append(cut(whole.scale, dim, rank) if grouped else whole.scale)
        if whole.zero_point is not None:
            zero = whole.zero_point
            zeros.append(cut(zero, dim, rank) if grouped else zero)
    zero_point = torch.cat(zeros) if zeros else None
    assert_kept(layer, torch.cat(codes), torch.cat(scales), zero_point)


def test_log_tells_the_format(
    originals: dict[str, Path],
    engine: None,
    alone: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    lines: list[str] = []
    monkeypatch.setattr(truth, "_log_once", lines.append)
    load(originals["w4a4"], build(originals["w4a4"], "o_proj"), "o_proj")
    assert lines == [
        (
            "o_proj: weights int4 symmetric per channel, activations int4 symmetric "
            "per token, no online Hadamard, backend cpu, taken over from "
            "compressed-tensors pack-quantized"
        )
    ]


@pytest.mark.parametrize("kind", KINDS)
def test_forward_is_the_reference(
    originals: dict[str, Path], engine: None, alone: None, kind: str
) -> None:
    directory, role = originals[kind], "gate_up_proj"
    layer = build(directory, role)
    load(directory, layer, role)
    x = torch.randn(5, 128, generator=torch.Generator().manual_seed(0))
    reference = ReferenceModel(str(directory)).linears[f"model.layers.0.mlp.{role}"]
    out, expected = layer(x)[0], reference(x)
    if foreign_of(directory).scheme.activations.bits == 16:
        assert torch.allclose(out, expected, rtol=1e-5, atol=1e-6)
    else:
        assert torch.equal(out, expected)


@pytest.mark.parametrize(
    ("kind", "scale"), [("w4a4", "weight_scale"), ("gptq", "scales"), ("awq", "scales")]
)
def test_part_that_was_not_loaded(
    originals: dict[str, Path], engine: None, alone: None, kind: str, scale: str
) -> None:
    layer = build(originals[kind], "gate_up_proj")
    stored = stored_tensors(originals[kind], layer, "gate_proj")
    for name, parameter in layer.named_parameters():
        parameter.weight_loader(parameter, stored[name], 0)
    message = f"tensor model.layers.0.mlp.up_proj.{scale} holds nan"
    with pytest.raises(CheckpointError, match=message):
        layer.quant_method.process_weights_after_loading(layer)


@pytest.mark.parametrize(
    ("kind", "role", "size", "message"),
    [
        ("w4a4", "down_proj", 64, "4 inputs are not a .* of the 8 .* in weight_packed"),
        ("awq", "gate_up_proj", 64, "gate_proj: 4 outputs are not .* of the 8 .*qwei"),
        ("gptq8", "gate_up_proj", 128, "2 outputs are not a .* the 4 .* in qzeros"),
        ("gptq_v2", "o_proj", 4, "a shard of 64 inputs .* of group_size 128"),
    ],
)
def test_shard_that_does_not_fit(
    originals: dict[str, Path],
    engine: None,
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
    role: str,
    size: int,
    message: str,
) -> None:
    parallel(monkeypatch, 0, size)
    with pytest.raises(UnsupportedError, match=message):
        build(originals[kind], role)


class TestFlag:
    def test_takes_over(self, originals: dict[str, Path], engine_config: Any) -> None:
        for kind, method in (("w4a4", "w4a4"), ("gptq", "w4a16-g64")):
            quant = engine_config(originals[kind]).quant_config
            assert quant.get_name() == "lowbit"
            assert quant.resolved.scheme.name == method
            assert quant.resolved.rotations.max_tensor_parallel_size == 4
            assert quant.checkpoint_format == foreign_of(originals[kind]).name

    def test_metric_tells_the_format(
        self, originals: dict[str, Path], engine_config: Any
    ) -> None:
        from prometheus_client import REGISTRY

        from vllm_lowbit.metrics import LowbitStatLogger

        LowbitStatLogger(engine_config(originals["w4a4"]))
        labels = {
            "model_name": str(originals["w4a4"]),
            "engine": "0",
            "weights": "int4",
            "activations": "int4",
            "kv": "unquantized",
            "vocabulary": "unquantized",
            "rotation": "",
            "backend": "cpu",
            "checkpoint": "compressed-tensors pack-quantized",
        }
        assert REGISTRY.get_sample_value("vllm_lowbit_info", labels) == 1

    def test_only_if_asked(
        self, originals: dict[str, Path], engine_config: Any
    ) -> None:
        for flag in (None, "compressed-tensors"):
            config = engine_config(originals["w4a4"], quantization=flag)
            assert config.model_config.quantization == "compressed-tensors"
            assert config.quant_config.get_name() == "compressed-tensors"

    def test_defect_stops_vllm_while_it_builds_its_config(
        self,
        originals: dict[str, Path],
        engine_config: Any,
        rewrite: Any,
        tmp_path: Path,
    ) -> None:
        directory = Path(shutil.copytree(originals["awq"], tmp_path / "copy"))
        name = "model.layers.0.mlp.up_proj.qzeros"
        rewrite(directory, lambda tensors: tensors.pop(name))
        with pytest.raises(ValueError, match=f"are missing, first {name}"):
            engine_config(directory)

    def test_key_stops_vllm_while_it_builds_its_config(
        self, originals: dict[str, Path], engine_config: Any, tmp_path: Path
    ) -> None:
        directory = Path(shutil.copytree(originals["w4a4"], tmp_path / "copy"))
        config = json.loads((directory / "config.json").read_text())
        config["quantization_config"]["kv_cache_scheme"] = {"num_bits": 8}
        (directory / "config.json").write_text(json.dumps(config))
        with pytest.raises(ValueError, match="key kv_cache_scheme: .* 16 bit, not as"):
            engine_config(directory)

    def test_config_given_by_override(
        self, originals: dict[str, Path], engine_config: Any
    ) -> None:
        other = json.loads((originals["w4a4"] / "config.json").read_text())
        other = other["quantization_config"]
        other["config_groups"]["group_0"]["input_activations"] = None
        with pytest.raises(ValueError, match="is not the one vLLM was given"):
            engine_config(
                originals["w4a4"], hf_overrides={"quantization_config": other}
            )

    def test_scheme_cannot_be_chosen(
        self, originals: dict[str, Path], engine_config: Any
    ) -> None:
        key = "quantization_config_dict_json"
        with pytest.raises(ValueError, match="is quantized already, by scheme w4a4"):
            engine_config(originals["w4a4"], hf_overrides={key: '{"scheme": "w4a4"}'})
