# SPDX-License-Identifier: Apache-2.0
"""``vllm-lowbit inspect``."""

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from ..errors import CheckpointError
from ..schema import clipped
from .progress import progress_bar

if TYPE_CHECKING:
    from ..inspection import Inspection, Size


def inspect(
    out: Annotated[
        Path, typer.Argument(metavar="OUT", help="Directory of a lowbit checkpoint.")
    ],
    as_json: Annotated[
        bool, typer.Option("--json", help="Print JSON instead of tables.")
    ] = False,
    verify: Annotated[
        bool,
        typer.Option(
            "--verify",
            help="Read every tensor; compare it with the manifest, the model and the "
            "recipe's hash. Exits with 1 for any difference.",
        ),
    ] = False,
) -> None:
    """Show what a lowbit checkpoint holds; --verify checks every tensor."""
    from ..inspection import inspect

    if verify:
        _verify(out)
    found = inspect(out)
    if as_json:
        print(json.dumps({**asdict(found), "verified": verify}, indent=2))
        return
    _show(found)
    if verify:
        print("verified: every tensor is what the manifest says")


def _verify(directory: Path) -> None:
    """Print every problem to stderr.

    Raises:
        CheckpointError: when there is one.
    """
    from ..inspection import read_checkpoint
    from ..manifest import verify

    shape, config = read_checkpoint(directory)
    count = 0
    with progress_bar("verifying") as progress:
        for problem in verify(directory, shape, config, progress):
            print(f"{directory / str(problem)}", file=sys.stderr)
            count += 1
    if count:
        problems = "1 problem" if count == 1 else f"{count} problems"
        raise CheckpointError(f"{directory}: {problems}, listed above")


def _show(found: "Inspection") -> None:
    # Names and paths come from files: no markup in them.
    console = Console(markup=False, highlight=False)
    for part in (_facts(found), _linears(found), _rest(found), _rotations(found)):
        console.print(part, soft_wrap=isinstance(part, str))
    console.print(_sizes(found), soft_wrap=True)


def _facts(found: "Inspection") -> str:
    lines = [f"{found.checkpoint}: lowbit checkpoint, scheme {found.scheme}"]
    if found.provenance is None:
        lines.append("base model and recipe: not recorded")
    else:
        made = found.provenance
        revision = made["base_revision"] or "not recorded"
        lines.append(f"base model: {made['base_model']}, revision {revision}")
        lines.append(f"recipe: {made['recipe']}, sha256 {made['recipe_sha256']}")
    return "\n".join(lines)


def _linears(found: "Inspection") -> Table:
    table = Table("linears", "weights", "scale per", "activations", "input rotation")
    for name, linear in found.linears.items():
        weights = f"int{linear.weight_bits} {_kind(linear.weight_symmetric)}"
        per = f"{linear.group_size} inputs" if linear.group_size else "channel"
        activations = "unquantized"
        if linear.activation_bits != 16:
            kind = _kind(linear.activation_symmetric)
            ratio = linear.activation_clip_ratio
            clip = clipped(ratio if isinstance(ratio, tuple) else (ratio,))
            activations = f"int{linear.activation_bits} {kind}{clip}"
            table.caption = "activations have a scale per token"
            if linear.activation_group_size:
                size = linear.activation_group_size
                table.caption += f" and group of {size}"
        table.add_row(name, weights, per, activations, linear.online_rotation or "none")
    return table


def _kind(symmetric: bool) -> str:
    return "symmetric" if symmetric else "asymmetric"


def _rest(found: "Inspection") -> str:
    vocabulary, attention = found.vocabulary, found.attention
    matrices = f"embedding {vocabulary.embedding_dtype}, head {vocabulary.head_dtype}"
    if vocabulary.bits != 16:
        matrices = f"embedding and head int{vocabulary.bits} symmetric per row"
    tied = "one tied matrix" if vocabulary.tied else "not tied"
    cache = "unquantized"
    if attention.kv_bits != 16:
        cache = f"int{attention.kv_bits} asymmetric per token and head"
    return (
        f"vocabulary: {matrices}, {tied}\n"
        f"attention: KV cache {cache}, rotation of keys "
        f"{attention.key_rotation or 'none'}, of values "
        f"{attention.value_rotation or 'none'}"
    )


def _rotations(found: "Inspection") -> Table | str:
    if not found.rotations:
        return "rotations: none"
    table = Table("rotation", "applied", "kind", "order", "block", "signs")
    for name, rotation in found.rotations.items():
        signs = "none" if rotation["sign_seed"] is None else "random"
        row = (rotation[key] for key in ("apply", "kind", "order", "block"))
        table.add_row(name, *map(str, row), signs)
    return table


def _sizes(found: "Inspection") -> str:
    bits, kv, weights = found.bits_per_weight, found.kv_token, found.weights
    in_linears, in_model = f"{bits.linears:.3f}", f"{bits.model:.3f}"
    lines = [
        f"tensor parallel sizes: divisors of {found.max_tensor_parallel_size}",
        f"bits per weight: {in_linears} in the linears, {in_model} in the whole model",
        f"KV cache of one token, all layers: {_against_bf16(kv)}",
        f"weights: {_against_bf16(weights)}",
    ]
    files = (f"  {name}: {size:,} bytes" for name, size in found.weight_files.items())
    return "\n".join([*lines, *files])


def _against_bf16(size: "Size") -> str:
    return f"{size.bytes:,} bytes, {size.ratio:.3f} of {size.bf16_bytes:,} in bf16"
