# SPDX-License-Identifier: Apache-2.0
"""No mutation of a checkpoint gets past vLLM's own loader, with our plugin in it."""

import contextlib
import gc
import resource
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from vllm_lowbit.errors import LowbitError

from .catalogue import CATALOGUE
from .mutation import VARIANTS, Mutation, prepare

pytest.importorskip("vllm")
pytestmark = pytest.mark.live

# Of this process's CPUs: machines here are shared.
SECONDS = 20
GROWTH_MIB = 512


@pytest.fixture(scope="module")
def sound(
    tmp_path_factory: Any, tiny_model: Any, published_checkpoint: Any
) -> dict[str, Path]:
    """Sound checkpoints, each copied by the mutations of its variant."""
    root = tmp_path_factory.mktemp("sound")
    return {
        name: published_checkpoint(
            root / name, tiny_model(root / f"{name}-plain", **v.model), **v.checkpoint
        )
        for name, v in VARIANTS.items()
    }


@pytest.fixture(scope="module")
def load(engine_config: Any, tmp_path_factory: Any) -> Iterator[Callable[..., Any]]:
    """``load(directory)``: what a server does up to the KV cache, in this process."""
    from vllm.config import set_current_vllm_config
    from vllm.distributed import cleanup_dist_env_and_memory
    from vllm.model_executor.model_loader import get_model
    from vllm.v1.worker.gpu_worker import init_worker_distributed_environment

    rendezvous = tmp_path_factory.mktemp("rendezvous") / "file"

    def build(directory: Path, **arguments: Any) -> torch.nn.Module:
        options = {"quantization": None, "skip_tokenizer_init": True, **arguments}
        config = engine_config(directory, **options)
        with set_current_vllm_config(config):
            init_worker_distributed_environment(
                config, 0, f"file://{rendezvous}", 0, "gloo"
            )
            return get_model(vllm_config=config)

    with pytest.MonkeyPatch.context() as patch:
        # As vLLM's CPU worker does.
        patch.setattr(torch.accelerator, "empty_cache", lambda: None)
        # The loader collects garbage twice, which takes longer than all the rest.
        gc.freeze()
        yield build
        gc.unfreeze()
        with contextlib.suppress(RuntimeError):
            cleanup_dist_env_and_memory()


def _ours(error: BaseException | None) -> LowbitError | None:
    """Our error inside vLLM's, if it is one."""
    while error is not None and not isinstance(error, LowbitError):
        if isinstance(error, ValidationError):
            # vLLM's configs are pydantic's, which keeps what a validator raised here.
            error = error.errors()[0].get("ctx", {}).get("error")
        else:
            error = error.__cause__ or error.__context__
    return error


def test_catalogue() -> None:
    names = Counter(mutation.name for mutation in CATALOGUE)
    assert [name for name, count in names.items() if count > 1] == []
    assert len(CATALOGUE) >= 200
    assert {mutation.variant for mutation in CATALOGUE} == set(VARIANTS)


@pytest.mark.parametrize("variant", VARIANTS)
def test_sound_checkpoint_loads(
    variant: str, sound: Any, load: Any, tmp_path: Path, write_manifest: Any
) -> None:
    """Also with the manifest that an agreeing mutation gets."""
    directory = Path(shutil.copytree(sound[variant], tmp_path / "checkpoint"))
    load(directory)
    write_manifest(directory)
    load(directory)


@pytest.mark.parametrize("mutation", CATALOGUE, ids=lambda mutation: mutation.name)
def test_mutation_is_refused_by_name(
    mutation: Mutation, sound: Any, load: Any, tmp_path: Path, write_manifest: Any
) -> None:
    directory = Path(shutil.copytree(sound[mutation.variant], tmp_path / "checkpoint"))
    prepare(directory, mutation, write_manifest)
    started, memory = time.process_time(), _peak_mib()
    with pytest.raises(Exception) as raised:
        load(directory, **dict(mutation.arguments))
    assert time.process_time() - started < SECONDS
    assert _peak_mib() - memory < GROWTH_MIB
    error = _ours(raised.value)
    assert error is not None, repr(raised.value)
    message = str(error).replace(str(tmp_path), "")
    assert mutation.is_named(message), message


def _peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
