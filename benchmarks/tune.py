# SPDX-License-Identifier: Apache-2.0
"""Launch configurations of the linears for the GPU at hand: measure, keep the best.

    python -m benchmarks.tune --out DIR [--operator linear_w4a4] [--minutes 8]

From the chip's table, or the fallback's where it has none, one setting of a row is
changed at a time and kept where it makes the row's problems faster; a configuration
that does not compile, does not fit the chip or gives another result than the reference
is out, that of the table too. Rows that are not for symmetric weights of 4 bits, in
groups of 128 or none, and one scale a token stay as they are. The others share the time
that is left equally, and DIR/CHIP.json is written after every one, so a run that ends
early has lost nothing; a table that is there is gone on from. It takes effect in
kernels/gpu/configs/, once `python -m benchmarks.compile` (no spills, on every machine)
and `python -m benchmarks.gpu` are content with it.
"""

import argparse
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from vllm_lowbit.kernels.gpu import configs
from vllm_lowbit.kernels.gpu.configs import LinearConfig, Row
from vllm_lowbit.kernels.gpu.target import E4M3_SUMS, INTERPRETED, architecture

from .gpu.linears import Arms, float_expected, integer_expected
from .gpu.shapes import Layer
from .gpu.timing import seconds

OPERATORS = ("linear_w4a4", "linear_wna16")
# (n, k) of a model of 8 billion parameters, and what a row's tokens are measured as.
SHAPES = ((28672, 4096), (4096, 14336), (4096, 4096))
MANY = (512, 4096)
GROUPS = {"channel": 0, "group": 128}
Settings = dict[str, tuple[int | bool, ...]]
SETTINGS: Settings = {
    "block_n": (32, 64, 128, 256),
    "swap": (False, True),
    "warps": (4, 8),
    "stages": (2, 3, 4, 5, 6),
    "split_k": (1, 2, 4, 8, 16),
    "block_m": (16, 32, 64, 128, 256),
}
# Of a change, to be kept: below it is noise.
GAIN = 0.01
Table = dict[str, dict[str, list[Row]]]
# Seconds of a configuration on a row's problems, infinite where it cannot run.
Cost = Callable[[LinearConfig], float]


def settings_of(operator: str, arch: str) -> Settings:
    """What may be changed of an operator's configurations on a chip."""
    if operator == "linear_w4a4" and arch in E4M3_SUMS:
        return {"e4m3": (False, True), **SETTINGS}
    return SETTINGS


def tuned(
    config: LinearConfig, cost: Cost, ends: float, settings: Settings = SETTINGS
) -> tuple[LinearConfig, float]:
    """The best that changes of one setting at a time lead to, and its cost.

    Args:
        config: where to start.
        cost: of a configuration.
        ends: time.monotonic() after which nothing else is tried.
        settings: their values, by name.
    """
    best, known = cost(config), {config}
    improved = True
    while improved:
        improved = False
        for changed in _neighbours(config, settings):
            if changed in known or time.monotonic() > ends:
                continue
            known.add(changed)
            found = cost(changed)
            if found < best * (1 - GAIN):
                config, best, improved = changed, found, True
    return config, best


def _neighbours(config: LinearConfig, settings: Settings) -> Iterator[LinearConfig]:
    for name, values in settings.items():
        for value in values:
            if value != getattr(config, name):
                yield replace(config, **{name: value})


def cost_on_device(
    operator: str, scheme: str, tokens: Sequence[int], device: torch.device
) -> Cost:
    """Geometric mean of seconds over SHAPES and tokens; results are the reference's."""
    problems = [
        (Arms(device, m, Layer(n, k, k)), _arm(operator))
        for n, k in SHAPES
        for m in tokens
    ]
    reference = integer_expected if operator == "linear_w4a4" else float_expected

    def prepare(index: int, config: LinearConfig | None) -> Any:
        arms, arm = problems[index]
        return partial(getattr(arms, arm), group=GROUPS[scheme], config=config)

    def call(index: int, config: LinearConfig | None) -> Any:
        torch.manual_seed(index)
        return prepare(index, config)(lambda size: 1)[0]

    # Of the same arguments as every call.
    expected = [reference(*call(i, None).args).float() for i in range(len(problems))]

    def cost(config: LinearConfig) -> float:
        total = 0.0
        for index in range(len(problems)):
            try:
                found = call(index, config)().float()
                apart = float((found - expected[index]).abs().max())
                if not apart <= 1e-2 * float(expected[index].abs().max()):
                    print(f"  wrong by {apart:.3g}: {config}", flush=True)
                    return math.inf
                total += math.log(seconds(prepare(index, config), device))
            except Exception as error:  # Whatever the compiler or driver raises.
                print(f"  {type(error).__name__}: {config}", flush=True)
                return math.inf
        return math.exp(total / len(problems))

    return cost


def _arm(operator: str) -> str:
    return "integer" if operator == "linear_w4a4" else "weight_only"


def copied(table: dict[str, dict[str, tuple[Row, ...]]]) -> Table:
    """A table that can be changed."""
    return {
        operator: {scheme: list(rows) for scheme, rows in schemes.items()}
        for operator, schemes in table.items()
    }


def dump(table: Table) -> str:
    """The text of a file of configs/, a row a line."""
    operators = []
    for operator, schemes in table.items():
        parts = []
        for scheme, rows in schemes.items():
            lines = [" " * 6 + json.dumps(configs.entry(row)) for row in rows]
            parts.append(f'    "{scheme}": [\n' + ",\n".join(lines) + "\n    ]")
        operators.append(f'  "{operator}": {{\n' + ",\n".join(parts) + "\n  }")
    return "{\n" + ",\n".join(operators) + "\n}\n"


def _write(path: Path, table: Table) -> None:
    staging = path.with_suffix(".json.new")
    staging.write_text(dump(table))
    os.replace(staging, path)


def table_to_start_from(path: Path, arch: str) -> Table:
    """That of an earlier run, else the chip's own."""
    return copied(configs.read(path) if path.is_file() else configs.table(arch))


def share_of(ends: float, rows: int) -> float:
    """When the first of so many rows has had its share of the time."""
    now = time.monotonic()
    return now + max(0.0, ends - now) / rows


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tune")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--operator", choices=OPERATORS)
    parser.add_argument("--minutes", type=float, default=8.0)
    options = parser.parse_args()
    if INTERPRETED or not torch.cuda.is_available():
        sys.exit("error: torch sees no GPU, and configurations are measured on one")
    device = torch.device("cuda")
    ends = time.monotonic() + 60 * options.minutes
    arch = architecture(device)
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / f"{arch}.json"
    table = table_to_start_from(path, arch)
    chosen = OPERATORS if options.operator is None else (options.operator,)
    places = [
        (operator, scheme, index)
        for operator in chosen
        for scheme, rows in table[operator].items()
        for index, row in enumerate(rows)
        if row.takes(configs.Weight(4, GROUPS[scheme], zeros=False))
    ]
    for number, (operator, scheme, index) in enumerate(places):
        if time.monotonic() > ends:
            sys.exit(f"out of time; what was found is in {path}")
        row = table[operator][scheme][index]
        tokens = MANY if row.max_m is None else (row.max_m,)
        cost = cost_on_device(operator, scheme, tokens, device)
        before, share = cost(row.config), share_of(ends, len(places) - number)
        config, after = tuned(row.config, cost, share, settings_of(operator, arch))
        what = f"{operator} {scheme} M <= {row.max_m or 'any'}"
        print(f"{what}: {before * 1e6:.1f} to {after * 1e6:.1f} us, {config}")
        table[operator][scheme][index] = replace(row, config=config)
        _write(path, table)


if __name__ == "__main__":
    main()
