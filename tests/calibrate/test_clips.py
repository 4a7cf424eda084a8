# SPDX-License-Identifier: Apache-2.0
"""Clip ratios of inputs: found by search, kept in bounds, put into the config."""

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from vllm_lowbit.calibrate.clips import (
    ratio_of,
    search_ratio,
    stored_ratio,
    with_ratios,
)
from vllm_lowbit.kernels.grid import IntGrid, decode
from vllm_lowbit.schema import LowbitConfig, Rotations, scheme_from_name

PLACES = ("attn_input", "o_input", "mlp_input", "down_input")


def _inputs(columns: int = 64, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(3, 50, columns, generator=generator)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", [4, 6])
def test_the_best_ratio_is_found(bits: int, symmetric: bool) -> None:
    """No ratio of the grid it searches leaves a smaller error of the outputs."""
    x, grid = _inputs(), IntGrid(bits, symmetric)
    generator = torch.Generator().manual_seed(1)
    weights = [torch.randn(n, 64, generator=generator) for n in (24, 8)]
    found = search_ratio(list(x), weights, grid)
    wanted = [x.flatten(0, 1) @ weight.t() for weight in weights]

    def error(ratio: float) -> float:
        clipped = IntGrid(bits, symmetric, clip_ratio=ratio)
        rounded = decode(*clipped.quantize(x.flatten(0, 1)))
        outs = [rounded @ weight.t() for weight in weights]
        return sum(
            float((a - b).square().sum()) for a, b in zip(outs, wanted, strict=True)
        )

    errors = {step / 40: error(step / 40) for step in range(30, 41)}
    assert errors[found] <= min(errors.values()) * (1 + 1e-5)
    assert (found < 1) == (bits == 4)


def test_outputs_decide_and_not_inputs() -> None:
    """An element that no weight reads may be clipped, one that all read may not."""
    x, grid = _inputs(), IntGrid(4, symmetric=False)
    x[..., 0] = 6.0
    reads, ignores = (torch.ones(4, 64) * 1e-2 for _ in range(2))
    reads[:, 0], ignores[:, 0] = 1.0, 0.0
    assert search_ratio([x], [ignores], grid) < search_ratio([x], [reads], grid)


def test_of_equally_good_ratios_the_largest() -> None:
    zeros = torch.zeros(2, 8)
    assert search_ratio([zeros], [torch.ones(3, 8)], IntGrid(4, False)) == 1


def test_outputs_are_never_there_as_a_whole() -> None:
    """Of a large MLP they would take more memory than was announced."""
    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            nonlocal largest
            result = func(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor):
                largest = max(largest, result.numel())
            return result

    x, weights = torch.randn(2, 1024, 16), [torch.randn(1024, 16) for _ in range(2)]
    with Watch():
        search_ratio(list(x), weights, IntGrid(4, symmetric=False))
    assert largest <= 512 * 1024


def test_bounds() -> None:
    raw = torch.tensor([0.2, 0.5, 0.91237, 1.0, 1.3], dtype=torch.float64)
    raw.requires_grad_()
    ratios = ratio_of(raw)
    assert ratios.dtype == torch.float32
    assert torch.equal(ratios, torch.tensor([0.5, 0.5, 0.91237, 1.0, 1.0]))
    ratios.sum().backward()
    # What is beyond comes back when its gradient says so.
    assert raw.grad is not None and torch.equal(raw.grad, torch.ones_like(raw))
    stored = [stored_ratio(value) for value in raw.detach()]
    assert stored == [0.5, 0.5, 0.9124, 1.0, 1.0]


def test_config() -> None:
    scheme = scheme_from_name("w4a4kv4", activations_symmetric=True, clip_ratio=0.9)
    config = LowbitConfig(scheme=scheme, rotations=Rotations())
    assert with_ratios(config, {}) is config
    found = {layer: dict.fromkeys(PLACES, 0.5 + layer / 10) for layer in (1, 0)}
    found[1]["o_input"] = 0.75
    served = with_ratios(config, found).scheme
    assert served.activations.clip_ratio == 1 and served.activations.symmetric
    assert served.activations.kept("attn_input") == (0.5, 0.6)
    assert served.activations.kept("o_input") == (0.5, 0.75)
    assert served.weights == scheme.weights and served.kv_cache == scheme.kv_cache
