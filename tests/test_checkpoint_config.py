# SPDX-License-Identifier: Apache-2.0
"""vLLM's own config of a lowbit checkpoint: what the server would start with."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from vllm_lowbit.errors import CheckpointError, ConfigError
from vllm_lowbit.lowbit_checkpoint import read_config

pytest.importorskip("vllm")

SCALE = "model.layers.1.self_attn.q_proj.weight_scale"
ONLINE = {"apply": "online", "order": 128, "block": 128, "sign_seed": 1}


@pytest.fixture(scope="module")
def originals(
    tmp_path_factory: Any, tiny_model: Any, lowbit_checkpoint: Any
) -> dict[str, Path]:
    """Sound checkpoints, built once and copied by each test that changes one."""
    root = tmp_path_factory.mktemp("lowbit")
    plain = tiny_model(root / "plain")
    tied = tiny_model(root / "tied-plain", tie_word_embeddings=True)
    return {
        "default": lowbit_checkpoint(root / "default", plain),
        "grouped": lowbit_checkpoint(root / "grouped", plain, "w2a16-g64", 8),
        "tied": lowbit_checkpoint(root / "tied", tied, "w6a6", residual=ONLINE),
    }


@pytest.fixture
def copy(originals: dict[str, Path], tmp_path: Path) -> Callable[[str], Path]:
    return lambda name: Path(shutil.copytree(originals[name], tmp_path / name))


@pytest.mark.parametrize("flag", [None, "lowbit"])
@pytest.mark.parametrize("name", ["default", "grouped", "tied"])
def test_needs_no_flag(
    name: str,
    flag: str | None,
    originals: dict[str, Path],
    engine_config: Any,
) -> None:
    config = engine_config(originals[name], quantization=flag)
    assert config.model_config.quantization == "lowbit"
    resolved = config.quant_config.resolved
    assert resolved == read_config(str(originals[name]))[1]
    assert config.quant_config.scheme == resolved.scheme


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("quantization_config_dict_json", '{"scheme": "w4a16"}'),
        ("quantization_config_file", "scheme.json"),
    ],
)
def test_scheme_cannot_be_chosen(
    key: str, value: str, originals: dict[str, Path], engine_config: Any
) -> None:
    message = f"--hf-overrides: {key} chooses .* quantized already, by scheme w4a4kv4"
    with pytest.raises(ValueError, match=message):
        engine_config(originals["default"], hf_overrides={key: value})


def test_config_cannot_be_overridden(
    originals: dict[str, Path], engine_config: Any
) -> None:
    """The files would fit: only what runs online would be another model's."""
    _, stored = read_config(str(originals["default"]))
    assert stored is not None
    other = stored.model_dump(mode="json")
    other["rotations"]["mlp_input"] = {"apply": "online", "order": 8, "block": 8}
    overrides = {"quantization_config": other}
    with pytest.raises(ValueError, match="is not the one vLLM was given; leave it"):
        engine_config(originals["default"], quantization=None, hf_overrides=overrides)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"rotations": {"v": {"apply": "online", "order": 64, "block": 64}}},
            "rotations.v: apply is online; supported: folded",
        ),
        (
            {"rotations": {"residual": ONLINE}},
            "rotations.residual: apply is online and tie_word_embeddings false",
        ),
        ({"surprise": 1}, "quantization_config: key surprise: Extra inputs"),
        ({"format_version": 2}, "key format_version: Input should be 1, got 2"),
    ],
)
def test_what_it_does_not_run(
    change: dict[str, Any], message: str, copy: Any, engine_config: Any
) -> None:
    directory = copy("default")
    path = directory / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"] |= change
    path.write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message):
        engine_config(directory, quantization=None)


def test_group_size_of_another_model(
    tiny_model: Any,
    lowbit_checkpoint: Any,
    tmp_path: Path,
    engine_config: Any,
) -> None:
    plain = tiny_model(tmp_path / "plain", intermediate_size=192)
    directory = lowbit_checkpoint(tmp_path / "lowbit", plain, "w4a16-g64")
    path = directory / "config.json"
    path.write_text(path.read_text().replace('"group_size": 64', '"group_size": 128'))
    message = "group_size 128 does not divide intermediate_size 192"
    with pytest.raises(ValueError, match=message):
        engine_config(directory, quantization=None)


def test_defect_of_the_files(copy: Any, rewrite: Any, engine_config: Any) -> None:
    directory, name = copy("default"), SCALE
    rewrite(directory, lambda tensors: tensors.pop(name))
    with pytest.raises(ValueError, match=f"tensor {name} is in none of the files"):
        engine_config(directory, quantization=None)


@pytest.mark.parametrize("defect", ["files", "config"])
def test_hub_checkpoint_is_checked_once_it_is_on_disk(
    defect: str, copy: Any, rewrite: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The worker fetches the files and its config, which no option may replace."""
    import vllm_lowbit.config as config_module

    directory = copy("default")
    data, _ = read_config(str(directory))
    quantization = json.loads(json.dumps(data["quantization_config"]))
    if defect == "files":
        rewrite(directory, lambda tensors: tensors.pop(SCALE))
    else:
        quantization["rotations"]["mlp_input"] = {**ONLINE, "sign_seed": None}
    hf_config = SimpleNamespace(to_dict=lambda: data)
    engine = SimpleNamespace(
        model_config=SimpleNamespace(
            model="some-organisation/some-model", revision="main", hf_config=hf_config
        ),
        load_config=SimpleNamespace(load_format="auto", download_dir=None),
    )

    def fetch(model: str, allow_patterns: list[str], **_: object) -> str:
        """What is not asked for is not there."""
        for path in directory.iterdir():
            if not any(path.match(pattern) for pattern in allow_patterns):
                path.unlink()
        return str(directory)

    monkeypatch.setattr(config_module, "snapshot_download", fetch)
    monkeypatch.setattr(config_module, "get_current_vllm_config", lambda: engine)
    monkeypatch.setattr(config_module, "refuse_engine_options", lambda *_: None)
    config = config_module.LowbitQuantizationConfig.from_config(quantization)
    config.maybe_update_config("some-organisation/some-model", hf_config)
    error, message = {
        "files": (CheckpointError, f"tensor {SCALE} is in none of the files"),
        "config": (ConfigError, "is not the one vLLM was given"),
    }[defect]
    with pytest.raises(error, match=message):
        config.get_quant_method(torch.nn.Linear(1, 1), "linear")
