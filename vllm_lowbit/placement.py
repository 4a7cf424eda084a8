# SPDX-License-Identifier: Apache-2.0
"""Whether a scheme fits a model, and where rotations go."""

from collections.abc import Sequence

from .architecture import ModelShape
from .errors import UnsupportedError
from .kernels.hadamard.matrices import exists, largest_order
from .kernels.kv4_store.layout import HEAD_DIMS
from .schema import Rotation, Rotations, Scheme

MIN_BLOCK = 16
# Tensor parallel sizes that one model may be served with, largest first.
PARALLEL_SIZES = (8, 4, 2, 1)


def check_scheme(shape: ModelShape, scheme: Scheme, source: str) -> None:
    """Raise UnsupportedError where the scheme does not fit the model's sizes."""
    group_size = scheme.weights.group_size
    if shape.architecture.stock_vocabulary and scheme.vocab_bits != 16:
        raise UnsupportedError(
            f"{source}: vocab_bits {scheme.vocab_bits} is not supported with "
            f"{shape.architecture.name}, whose vocabulary vLLM holds by itself; "
            "supported: 16"
        )
    if shape.head_dim < 2 or not exists(shape.head_dim):
        raise UnsupportedError(
            f"{source}: head_dim {shape.head_dim} has no Hadamard matrix"
        )
    if scheme.kv_cache.bits != 16 and shape.head_dim not in HEAD_DIMS:
        raise UnsupportedError(
            f"{source}: head_dim {shape.head_dim} has no {scheme.kv_cache.bits}-bit "
            f"cache, supported: {', '.join(map(str, HEAD_DIMS))}; choose a scheme "
            "without kv, such as w4a4"
        )
    inputs = {
        "hidden_size": shape.hidden_size,
        "num_attention_heads * head_dim": shape.num_heads * shape.head_dim,
        "intermediate_size": shape.intermediate_size,
    }
    for name, size in inputs.items():
        if group_size is not None and size % group_size:
            raise UnsupportedError(
                f"{source}: group_size {group_size} does not divide {name} {size}"
            )
    for name, ratios in scheme.activations.clip_ratios or ():
        if len(ratios) != shape.num_layers:
            raise UnsupportedError(
                f"{source}: scheme.activations.clip_ratios.{name} has {len(ratios)} "
                f"values; supported: one for each of the {shape.num_layers} layers"
            )


def flag_only_rotations(shape: ModelShape, scheme: Scheme, source: str) -> Rotations:
    """The rotations of a plain checkpoint quantized while loading.

    Every linear gets an online Hadamard on its input (o_proj's mixes heads, where
    their number has a Hadamard order). Those of o_proj and down_proj stay inside one
    of T blocks, T being 8 or the largest divisor of it that leaves a
    Hadamard order, so that any tensor parallel size that divides T computes the same
    function.

    Args:
        shape: sizes of the model.
        scheme: what is quantized; keys are rotated for a quantized cache only.
        source: file named in errors.

    Raises:
        UnsupportedError: when no Hadamard block of at least MIN_BLOCK elements
            divides a size.
    """
    heads, head_parallel = order_per_shard(shape.num_heads, 2)
    down, down_parallel = order_per_shard(shape.intermediate_size, MIN_BLOCK)
    across_heads = None
    if heads > 1:
        across_heads = Rotation(
            apply="online", order=heads, block=heads * shape.head_dim
        )
    head = Rotation(apply="folded", order=shape.head_dim, block=shape.head_dim)
    hidden = _block("hidden_size", shape.hidden_size, source)
    return Rotations(
        attn_input=hidden,
        k=head.model_copy(update={"apply": "online"})
        if scheme.kv_cache.bits != 16
        else None,
        v=head,
        o_input=across_heads,
        mlp_input=hidden,
        down_input=_block("intermediate_size", shape.intermediate_size, source, down),
        max_tensor_parallel_size=min(head_parallel, down_parallel),
    )


def order_per_shard(
    size: int, smallest: int, parallel_sizes: Sequence[int] = PARALLEL_SIZES
) -> tuple[int, int]:
    """Hadamard order and T: the largest T whose shard is one Hadamard.

    Args:
        size: elements of the whole.
        smallest: order allowed. Where there is none, the result is the largest order
            that divides the whole, and T = 1.
        parallel_sizes: T to try, largest first.
    """
    for parallel in parallel_sizes:
        order, rest = divmod(size, parallel)
        if not rest and order >= smallest and exists(order):
            return order, parallel
    return largest_order(size), 1


def _block(name: str, size: int, source: str, order: int | None = None) -> Rotation:
    order = largest_order(size) if order is None else order
    if order < MIN_BLOCK:
        raise UnsupportedError(
            f"{source}: {name} {size} has no Hadamard block: the largest order that "
            f"divides it is {order}, at least {MIN_BLOCK} is supported"
        )
    return Rotation(apply="online", order=order, block=order, scaled=True)
