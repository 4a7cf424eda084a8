# SPDX-License-Identifier: Apache-2.0
"""Tests of the Triton kernels in Triton's interpreter, in a process of their own.

Triton decides at its import whether kernels are interpreted, so these files are only
collected where TRITON_INTERPRET=1 is set: ``tests/kernels/test_triton.py`` starts them.
"""

import functools
import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
collect_ignore_glob = [] if INTERPRETED else ["test_*.py"]

# Methods that copy what a tensor holds to the host.
_TO_THE_HOST = {"item", "tolist", "cpu", "numpy", "__array__", "__bool__", "__int__"}
_TO_THE_HOST |= {"__float__", "__index__", "__contains__"}
_HOST_TAGS = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}


class _Watch(TorchDispatchMode):
    """Refuses operators whose result, or its size, the host has to wait for."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        waits = bool(_HOST_TAGS & set(func.tags))
        if func is torch.ops.aten.index.Tensor:
            waits = any(i is not None and i.dtype == torch.bool for i in args[1])
        if waits:
            raise AssertionError(f"{func} waits for the device")
        return func(*args, **(kwargs or {}))


class _OnDevice(torch.Tensor):
    """Values that the host must not see; what is computed from them is one too."""

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if func.__name__ in _TO_THE_HOST:
            raise AssertionError(f"{func.__name__} waits for the device")
        with _Watch():
            return super().__torch_function__(func, types, args, kwargs or {})


@pytest.fixture(autouse=True)
def _poison(garbage_in_empty: None) -> None:
    """What a kernel does not write shows as NaN or an odd integer."""


@pytest.fixture
def many_processors(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Let a linear's module see a chip so wide that split-K takes all parts."""

    def widen(operator: str) -> None:
        path = f"vllm_lowbit.kernels.{operator}.triton.processors"
        monkeypatch.setattr(path, lambda device: 1 << 20)

    return widen


@pytest.fixture
def cut(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """``cut(n)``: batches of up to n tokens have their contexts cut into programs.

    Splits are merged a few at a time, which costs the interpreter less.
    """
    from vllm_lowbit.kernels.kv4_attention import triton

    def choose(rows: int) -> None:
        monkeypatch.setattr(triton, "split_rows", lambda kv_heads, device: rows)
        monkeypatch.setattr(triton, "MERGE_AHEAD", 2)

    return choose


@pytest.fixture
def gpu_ops() -> Iterator[None]:
    """``torch.ops.lowbit`` runs on a CPU what is registered for CUDA."""
    from vllm_lowbit.kernels import ops

    cpu = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    with torch.library._scoped_library(ops.LIBRARY.ns, "IMPL") as library:
        for name in torch._C._dispatch_get_all_op_names():
            if name.startswith(f"{ops.LIBRARY.ns}::") and has(name, "CUDA"):
                kernel = torch.library.get_kernel(name, "CUDA")
                call = functools.partial(kernel.call_boxed, cpu)
                library.impl(name.partition("::")[2], call, "CPU")
        yield


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Record launches in place of running them: name, grid and what is no tensor."""
    from triton.runtime.interpreter import InterpretedFunction

    found: list[Any] = []

    def run(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        values = [a for a in args if not isinstance(a, torch.Tensor)]
        found.append((self.fn.__name__, grid, values, options))

    monkeypatch.setattr(InterpretedFunction, "run", run)
    return found


@pytest.fixture
def on_device() -> Callable[[torch.Tensor], torch.Tensor]:
    """Gives a tensor whose values the host cannot read without an AssertionError."""
    return lambda x: x.as_subclass(_OnDevice)
