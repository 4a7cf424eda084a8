# SPDX-License-Identifier: Apache-2.0
"""Which rotations of a lowbit checkpoint the server runs; all others are refused."""

from .architecture import ModelShape
from .errors import ConfigError
from .kernels.hadamard.matrices import exists
from .schema import LowbitConfig, Rotation

# Between two tensors that no nonlinearity separates, so that both sides fold it.
_FOLDED = ("residual", "v")
_PER_HEAD = ("k", "v")


def check_rotations(shape: ModelShape, config: LowbitConfig, source: str) -> None:
    """Check that the server would run a checkpoint's rotations as they are written.

    Args:
        shape: sizes of the model.
        config: of the checkpoint.
        source: file named in errors.

    Raises:
        ConfigError: naming the key, what it is and what is supported.
    """
    for problem in _problems(shape, config):
        raise ConfigError(f"{source}: quantization_config: {problem}")


def _problems(shape: ModelShape, config: LowbitConfig) -> list[str]:
    rotations = config.rotations
    sizes = _sizes(shape)
    problems = []
    for name, (size_name, size) in sizes.items():
        rotation: Rotation | None = getattr(rotations, name)
        if rotation is None:
            continue
        found = _rotation_problems(name, rotation)
        if size % rotation.block:
            found.append(f"block {rotation.block} does not divide {size_name} {size}")
        if name in _PER_HEAD and rotation.order != shape.head_dim:
            found.append(
                f"order {rotation.order}: it has to be head_dim {shape.head_dim}"
            )
        problems += [f"rotations.{name}: {problem}" for problem in found]
    problems += _model_problems(shape, config)
    problems += _shard_problems(shape, config)
    return problems


def _sizes(shape: ModelShape) -> dict[str, tuple[str, int]]:
    hidden = ("hidden_size", shape.hidden_size)
    head = ("head_dim", shape.head_dim)
    heads = shape.num_heads * shape.head_dim
    return {
        "residual": hidden,
        "attn_input": hidden,
        "k": head,
        "v": head,
        "o_input": ("num_attention_heads * head_dim", heads),
        "mlp_input": hidden,
        "down_input": ("intermediate_size", shape.intermediate_size),
    }


def _rotation_problems(name: str, rotation: Rotation) -> list[str]:
    problems = []
    online = rotation.apply == "online"
    if name == "v" and online:
        problems.append("apply is online; supported: folded")
    if name not in _FOLDED and not online:
        problems.append("apply is folded; supported: online")
    if online and rotation.kind != "hadamard":
        problems.append(
            f"kind {rotation.kind!r} cannot run online; supported: hadamard"
        )
    if rotation.kind == "hadamard" and not exists(rotation.order):
        problems.append(f"order {rotation.order} has no Hadamard matrix")
    if rotation.sign_seed is not None and name not in _FOLDED:
        problems.append(
            f"sign_seed {rotation.sign_seed} is set; signs are supported on "
            + " and ".join(_FOLDED)
        )
    if rotation.scaled:
        problems.append("scaled is true; a checkpoint has its scales in the weights")
    return problems


def _model_problems(shape: ModelShape, config: LowbitConfig) -> list[str]:
    residual, k = config.rotations.residual, config.rotations.k
    problems = []
    norms = shape.architecture.output_norms
    if residual is not None and norms:
        problems.append(
            f"rotations.residual: the weights of {' and '.join(norms.values())} do not "
            "let it pass; supported: null"
        )
    elif residual is not None and shape.architecture.layer_norm:
        if residual.apply == "online" or shape.tie_word_embeddings:
            problems.append(
                f"rotations.residual: apply is {residual.apply} and "
                f"tie_word_embeddings {str(shape.tie_word_embeddings).lower()}; "
                "supported with LayerNorms: folded and false"
            )
    elif residual is not None and shape.tie_word_embeddings != (
        residual.apply == "online"
    ):
        tied = str(shape.tie_word_embeddings).lower()
        supported = "online" if shape.tie_word_embeddings else "folded"
        problems.append(
            f"rotations.residual: apply is {residual.apply} and tie_word_embeddings "
            f"{tied}; supported with that: {supported}"
        )
    if k is not None and config.scheme.kv_cache.bits == 16:
        problems.append(
            "rotations.k: keys are rotated for a quantized cache only, and "
            "scheme.kv_cache.bits is 16"
        )
    return problems


def _shard_problems(shape: ModelShape, config: LowbitConfig) -> list[str]:
    """Row-parallel inputs are cut between blocks, and heads never."""
    parallel = config.rotations.max_tensor_parallel_size
    sizes = _sizes(shape)
    problems = []
    if shape.num_heads % parallel:
        problems.append(f"does not divide num_attention_heads {shape.num_heads}")
    for name in ("o_input", "down_input"):
        rotation: Rotation | None = getattr(config.rotations, name)
        size_name, size = sizes[name]
        block = 1 if rotation is None else rotation.block
        if size % (parallel * block):
            problems.append(
                f"shards of {size_name} {size} are not whole blocks of rotations."
                f"{name} ({block})"
            )
    return [
        f"rotations.max_tensor_parallel_size {parallel}: {problem}"
        for problem in problems
    ]
