# SPDX-License-Identifier: Apache-2.0
"""Every linear of the two model sizes alone, and the bandwidth of the memory."""

import ctypes
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import torch

from vllm_lowbit.architecture import ModelShape
from vllm_lowbit.placement import flag_only_rotations
from vllm_lowbit.schema import DEFAULT_SCHEME, Rotation, scheme_from_name

from .linear_arms import LINEAR_ARMS, Layer, LinearArm
from .options import LLAMA_1B, LLAMA_8B, TINY, Options

NAME = "linear"
BANDWIDTH = "bandwidth"
ROWS = (1, 16, 256)
# More than the last-level cache of any machine this is likely to run on.
ROTATION_BYTES = 640 << 20
BANDWIDTH_BYTES = 1 << 30
CALL_SECONDS = 1.5
MIN_CALLS = 5
# Frobenius distance to the float product that the weights and activations of so many
# bits may have; more means that the kernel computes something else.
MAX_ERROR = {16: 0.01, 8: 0.03, 4: 0.3}


def models(options: Options) -> dict[str, dict[str, Any]]:
    """config.json of the models whose linears are measured."""
    if options.quick:
        return {"tiny": TINY}
    return {"1B": LLAMA_1B, "8B": LLAMA_8B}


def shapes(model: dict[str, Any]) -> dict[str, tuple[int, int]]:
    """n and k of each linear as vLLM fuses them."""
    hidden, inner = model["hidden_size"], model["intermediate_size"]
    queries = model["num_attention_heads"] * model["head_dim"]
    kv = model["num_key_value_heads"] * model["head_dim"]
    return {
        "qkv": (queries + 2 * kv, hidden),
        "o": (hidden, queries),
        "gate_up": (2 * inner, hidden),
        "down": (hidden, inner),
    }


def cells(options: Options) -> list[str]:
    """One for the memory, one for each arm and model."""
    return [BANDWIDTH] + [
        f"{arm}, {model}" for model in models(options) for arm in LINEAR_ARMS
    ]


def measure(cell: str, options: Options) -> dict[str, Any]:
    """Bandwidths in bytes per second; or of each linear and number of rows, seconds."""
    if cell == BANDWIDTH:
        return bandwidth(options)
    name, _, model = cell.rpartition(", ")
    import vllm._custom_ops  # noqa: F401 (registers torch.ops._C)

    arm = LINEAR_ARMS[name]
    reason = arm.missing()
    if reason is not None:
        return {"unavailable": reason}
    config = models(options)[model]
    rotations = _rotations(config)
    return {
        linear: _linear(arm, n, k, rotations[linear], options)
        for linear, (n, k) in shapes(config).items()
    }


def _rotations(model: dict[str, Any]) -> dict[str, Rotation]:
    """The online transform of each linear's input that the flag alone gives."""
    scheme = scheme_from_name(DEFAULT_SCHEME)
    shape = ModelShape.from_config(model, "config")
    chosen = flag_only_rotations(shape, scheme, "config")
    names = {
        "qkv": chosen.attn_input,
        "o": chosen.o_input,
        "gate_up": chosen.mlp_input,
        "down": chosen.down_input,
    }
    return {name: rotation for name, rotation in names.items() if rotation is not None}


def _linear(
    arm: LinearArm, n: int, k: int, rotation: Rotation, options: Options
) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(n * k)
    weight = torch.randn(n, k, generator=generator).mul_(0.02).bfloat16()
    prepared = arm.prepare(weight, rotation)
    total = ROTATION_BYTES >> 5 * options.quick
    copies = max(2, -(-total // prepared.weight_bytes))
    layers = [prepared.copy() for _ in range(copies)]
    inputs = {
        rows: torch.randn(rows, k, generator=generator).bfloat16() for rows in ROWS
    }
    error = _error(layers[0], inputs[16], weight)
    if not error < MAX_ERROR[min(arm.bits)]:
        raise RuntimeError(f"[{n}, {k}]: the result is off by a factor of {error:.3f}")
    seconds = {str(rows): _rotate(layers, x, options) for rows, x in inputs.items()}
    return {
        "n": n,
        "k": k,
        "weight_bytes": prepared.weight_bytes,
        "copies": copies,
        "relative_error": error,
        "seconds": seconds,
    }


def _error(layer: Layer, x: torch.Tensor, weight: torch.Tensor) -> float:
    expected = x.float() @ weight.float().t()
    distance = torch.linalg.vector_norm(layer(x).float() - expected)
    return float(distance / torch.linalg.vector_norm(expected))


def _rotate(layers: list[Layer], x: torch.Tensor, options: Options) -> dict[str, Any]:
    """Seconds of one call, each on the next copy of the weight."""
    limit = CALL_SECONDS if not options.quick else 0.05
    layers[-1](x)
    calls: list[float] = []
    while len(calls) < MIN_CALLS or sum(calls) < limit:
        layer = layers[len(calls) % len(layers)]
        started = time.perf_counter()
        layer(x)
        calls.append(time.perf_counter() - started)
    calls.sort()
    return {
        "median": statistics.median(calls),
        "p10": calls[len(calls) // 10],
        "p90": calls[len(calls) * 9 // 10],
        "calls": len(calls),
    }


def bandwidth(options: Options) -> dict[str, Any]:
    """Bytes per second of copying (read and written ones) and of reading alone.

    A copy is done by torch, and by memmove in one Python thread per CPU, which writes
    past the caches; the faster counts.
    """
    size = BANDWIDTH_BYTES >> 5 * options.quick
    source = torch.ones(size // 8, dtype=torch.int64)
    target = torch.zeros_like(source)
    part = size // options.threads

    def move(index: int) -> None:
        offset = index * part
        ctypes.memmove(target.data_ptr() + offset, source.data_ptr() + offset, part)

    with ThreadPoolExecutor(options.threads) as pool:
        ways: dict[str, tuple[int, Callable[[], object]]] = {
            "copy_torch": (2 * size, partial(target.copy_, source)),
            "copy_memmove": (
                2 * size,
                lambda: list(pool.map(move, range(options.threads))),
            ),
            "read_sum": (size, source.sum),
        }
        rates = {name: moved / _median(call) for name, (moved, call) in ways.items()}
    copy = max(rates["copy_torch"], rates["copy_memmove"])
    return rates | {"copy": copy, "read": rates["read_sum"]}


def _median(call: Callable[[], object], times: int = 9) -> float:
    call()
    seconds = []
    for _ in range(times):
        started = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds)
