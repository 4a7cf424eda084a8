# SPDX-License-Identifier: Apache-2.0
"""One sound checkpoint of every kind, written once."""

from pathlib import Path
from typing import Any

import pytest

KINDS: dict[str, dict[str, Any]] = {
    "packed": {"kind": "pack-quantized", "symmetric": False, "group_size": 32},
    "w4a4": {"kind": "pack-quantized", "activations": 4},
    "w8a8": {"kind": "int-quantized", "bits": 8, "activations": 8},
    "int4": {"kind": "int-quantized", "symmetric": False, "activations": 8},
    "gptq": {"kind": "gptq", "group_size": 64},
    "gptq8": {"kind": "gptq", "bits": 8},
    "gptq_v2": {"kind": "gptq_v2", "symmetric": False, "group_size": 128},
    "awq": {"kind": "awq", "symmetric": False, "group_size": 32},
    "awq_symmetric": {"kind": "awq"},
}


@pytest.fixture(scope="session")
def originals(
    tmp_path_factory: Any, tiny_model: Any, foreign_checkpoint: Any
) -> dict[str, Path]:
    """Directories by the names of KINDS, and ``plain``, which they were made from."""
    root = tmp_path_factory.mktemp("foreign")
    plain = tiny_model(root / "plain", num_hidden_layers=1)
    written = {
        name: foreign_checkpoint(root / name, plain, **arguments)
        for name, arguments in KINDS.items()
    }
    return {"plain": plain, **written}
