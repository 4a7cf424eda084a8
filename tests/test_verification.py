# SPDX-License-Identifier: Apache-2.0
"""Checksums beside loading: what is damaged is named, whoever reads it."""

from pathlib import Path
from typing import Any

import pytest
import torch

from vllm_lowbit.errors import CheckpointError
from vllm_lowbit.verification import Verification

NORM = "model.norm.weight"


@pytest.fixture
def checkpoint(tmp_path: Path, tiny_model: Any, lowbit_checkpoint: Any) -> Path:
    return lowbit_checkpoint(tmp_path / "out", tiny_model(tmp_path / "plain"))


def _change(rewrite: Any, directory: Path, name: str) -> Path:
    return rewrite(directory, lambda tensors: tensors[name].view(-1)[:1].add_(1))


def test_sound_checkpoint_passes_any_number_of_times(checkpoint: Path) -> None:
    verification = Verification(checkpoint)
    verification.finish()
    verification.finish()


@pytest.mark.parametrize(
    "name",
    [
        NORM,
        "model.embed_tokens.weight",
        "lm_head.weight",
        "model.layers.1.mlp.down_proj.weight_packed",
        "model.layers.0.self_attn.k_proj.weight_scale",
    ],
)
def test_changed_tensor_is_named(checkpoint: Path, rewrite: Any, name: str) -> None:
    path = _change(rewrite, checkpoint, name)
    verification = Verification(checkpoint)
    for _ in range(2):
        with pytest.raises(CheckpointError) as error:
            verification.finish()
        assert str(error.value).startswith(f"{path}: tensor {name} has sha256 ")


def test_every_tensor_is_some_ranks(checkpoint: Path, rewrite: Any) -> None:
    _change(rewrite, checkpoint, NORM)
    failed = 0
    for rank in range(3):
        try:
            Verification(checkpoint, rank, 3).finish()
        except CheckpointError:
            failed += 1
    assert failed == 1


def test_non_finite_data_that_the_manifest_agrees_with(
    checkpoint: Path, rewrite: Any, write_manifest: Any
) -> None:
    rewrite(checkpoint, lambda tensors: tensors[NORM][3:4].fill_(torch.inf))
    write_manifest(checkpoint)
    message = f"tensor {NORM} holds a non-finite value"
    with pytest.raises(CheckpointError, match=message):
        Verification(checkpoint).finish()


def test_file_that_vanishes(checkpoint: Path, tmp_path: Path) -> None:
    (checkpoint / "model.safetensors").rename(tmp_path / "away")
    with pytest.raises(CheckpointError, match=r"model\.safetensors: tensor .* cannot"):
        Verification(checkpoint).finish()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_thread_that_dies_is_no_success(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def die(*arguments: object) -> None:
        raise SystemExit

    monkeypatch.setattr("vllm_lowbit.verification.data_problem", die)
    with pytest.raises(CheckpointError, match="could not be verified"):
        Verification(checkpoint).finish()
