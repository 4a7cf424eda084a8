# SPDX-License-Identifier: Apache-2.0
"""From a recipe to what the checkpoint will say and what each layer is folded with."""

from dataclasses import dataclass, replace

import torch

from ..architecture import EMBEDDING, HEAD, ModelShape
from ..checkpoint import TensorSpec
from ..errors import ConfigError, UnsupportedError
from ..kernels.grid import IntGrid
from ..kernels.hadamard.matrices import largest_order
from ..kernels.hadamard.signs import random_signs
from ..lowbit_checkpoint import expected_tensors
from ..placement import MIN_BLOCK, PARALLEL_SIZES, check_scheme, order_per_shard
from ..schema import (
    LowbitConfig,
    Provenance,
    Rotation,
    Rotations,
    Scheme,
    scheme_from_name,
)
from .recipe import Recipe
from .rotations import Orthogonal, SignedHadamard, of_stream
from .source import Source
from .stages import Online
from .transforms import LayerTransforms
from .writer import DTYPES


def plan(
    shape: ModelShape, recipe: Recipe, source: str, provenance: Provenance
) -> LowbitConfig:
    """The checkpoint's config.

    Args:
        shape: sizes of the model.
        recipe: how it is quantized.
        source: file named in errors.
        provenance: where it comes from.

    Raises:
        UnsupportedError: when the scheme or a transform does not fit the sizes.
        ConfigError: when windows are longer than the model has positions.
    """
    scheme = scheme_from_name(
        recipe.scheme,
        recipe.activations.symmetric,
        recipe.vocab_bits,
        recipe.activations.clip_ratio,
    )
    check_scheme(shape, scheme, source)
    if shape.num_experts:
        _refuse_for_experts(recipe, f"{source}: {shape.architecture.name}")
    if shape.architecture.output_norms:
        recipe = _without_residual(shape, recipe, source)
    _check_positions(shape, recipe, source)
    if _unties(shape, recipe.transforms.residual != "none"):
        shape = replace(shape, tie_word_embeddings=False)
    return LowbitConfig(
        scheme=scheme,
        rotations=_rotations(shape, recipe, scheme, source),
        provenance=provenance,
    )


def served_shape(shape: ModelShape, config: LowbitConfig) -> ModelShape:
    """Sizes of the model of a checkpoint, from those of its base model.

    Where the stream of a model with LayerNorms is rotated, an embedding that is its
    head becomes two matrices, as the final norm's bias goes into the head.
    """
    if _unties(shape, config.rotations.residual is not None):
        return replace(shape, tie_word_embeddings=False)
    return shape


def written_tensors(source: Source, config: LowbitConfig) -> dict[str, TensorSpec]:
    """What a calibration writes, floats in the dtype of the base model, by name."""
    shape = served_shape(source.shape, config)
    specs = expected_tensors(shape, config)
    for here in shape.tensors():
        name = shape.in_lowbit(here)[0]
        if name in specs and len(specs[name].dtypes) > 1:
            untied = here == HEAD and source.shape.tie_word_embeddings
            tensor = source.tensor(EMBEDDING if untied else here)
            specs[name] = replace(specs[name], dtypes=(DTYPES[tensor.dtype],))
    return specs


def _unties(shape: ModelShape, rotated: bool) -> bool:
    return rotated and shape.architecture.layer_norm and shape.tie_word_embeddings


def _check_positions(shape: ModelShape, recipe: Recipe, source: str) -> None:
    """Raise ConfigError for windows longer than a table of learned positions."""
    most, seq_len = shape.longest, recipe.data.seq_len
    if most is not None and seq_len > most:
        raise ConfigError(
            f"data.seq_len {seq_len}: {source} has positions of {most} tokens"
        )


def _refuse_for_experts(recipe: Recipe, model: str) -> None:
    """Raise UnsupportedError naming what a mixture of experts cannot have yet."""
    asked = {
        "transforms.smooth": recipe.transforms.smooth is not None,
        "weights.method omniquant": recipe.weights.method == "omniquant",
        f"activations.clip {recipe.activations.clip}": recipe.activations.clip
        != "fixed",
        "a learned transform": recipe.learns,
        f"refine.scope {recipe.refine.scope}": recipe.refine.scope != "none",
    }
    for what, present in asked.items():
        if present:
            raise UnsupportedError(
                f"{model}: {what} is not supported with a mixture of experts; the "
                "recipes rtn, gptq, gptaq, quarot, quarot-gptq and lowbit are"
            )


def _without_residual(shape: ModelShape, recipe: Recipe, source: str) -> Recipe:
    """The recipe for a model with norms of what it adds to the residual stream.

    Their weights let no rotation pass. What a Hadamard of the stream does for the
    inputs of q, k, v and of gate, up, online ones do on those inputs.

    Raises:
        UnsupportedError: for a rotation that is learned, which cannot run online.
    """
    chosen = recipe.transforms
    if chosen.residual == "learned":
        norms = " and ".join(shape.architecture.output_norms.values())
        raise UnsupportedError(
            f"{source}: transforms.residual learned: the weights of {norms} of "
            f"{shape.architecture.name} let no rotation of the residual stream pass; "
            "use residual: hadamard, for which Hadamards run online before q, k, v and "
            "gate, up, or none; transforms.value and scales may be learned"
        )
    if chosen.residual == "none":
        return recipe
    update = {"residual": "none", "attn_input": "hadamard", "mlp_input": "hadamard"}
    return recipe.model_copy(update={"transforms": chosen.model_copy(update=update)})


def residual_is_replaced(recipe: Recipe, config: LowbitConfig) -> bool:
    """Whether a checkpoint has online Hadamards where its recipe rotates the stream."""
    return recipe.transforms.residual != "none" and config.rotations.residual is None


def _rotations(
    shape: ModelShape, recipe: Recipe, scheme: Scheme, source: str
) -> Rotations:
    chosen, head_dim = recipe.transforms, shape.head_dim
    residual = value = key = down = None
    if chosen.residual == "learned":
        if shape.tie_word_embeddings:
            raise UnsupportedError(
                f"{source}: transforms.residual learned: tie_word_embeddings is true, "
                "and embedding and head can share a matrix with a Hadamard only; use "
                "residual: hadamard or none"
            )
        size = shape.hidden_size
        residual = Rotation(apply="folded", kind="orthogonal", order=size, block=size)
    if chosen.residual == "hadamard":
        order = _order("hidden_size", shape.hidden_size, source)
        residual = Rotation(
            apply="online" if shape.tie_word_embeddings else "folded",
            order=order,
            block=order,
            sign_seed=recipe.seed,
        )
    if chosen.value == "hadamard":
        value = Rotation(
            apply="folded",
            order=head_dim,
            block=head_dim,
            sign_seed=(recipe.seed + 1) % (1 << 63),
        )
    if chosen.value == "learned":
        value = Rotation(
            apply="folded", kind="orthogonal", order=head_dim, block=head_dim
        )
    if chosen.key == "hadamard" and scheme.kv_cache.bits != 16:
        key = Rotation(apply="online", order=head_dim, block=head_dim)
    sizes = [
        size
        for size in PARALLEL_SIZES
        if shape.num_heads % size == shape.intermediate_size % size == 0
    ]
    parallel = sizes[0]
    if chosen.down_input == "hadamard":
        _order("intermediate_size", shape.intermediate_size, source)
        order, parallel = order_per_shard(shape.intermediate_size, MIN_BLOCK, sizes)
        down = Rotation(apply="online", order=order, block=order)
    of_hidden = None
    if "hadamard" in (chosen.attn_input, chosen.mlp_input):
        order = _order("hidden_size", shape.hidden_size, source)
        of_hidden = Rotation(apply="online", order=order, block=order)
    return Rotations(
        residual=residual,
        attn_input=of_hidden if chosen.attn_input == "hadamard" else None,
        mlp_input=of_hidden if chosen.mlp_input == "hadamard" else None,
        k=key,
        v=value,
        down_input=down,
        max_tensor_parallel_size=parallel,
    )


def _order(name: str, size: int, source: str) -> int:
    order = largest_order(size)
    if order < MIN_BLOCK:
        raise UnsupportedError(
            f"{source}: {name} {size} has no Hadamard block: the largest order that "
            f"divides it is {order}, at least {MIN_BLOCK} is supported; use a recipe "
            "without that transform"
        )
    return order


@dataclass(frozen=True)
class Transforms:
    """The transforms a config stands for, as the fold takes them.

    Those of kind ``orthogonal`` are in the weights only, and not among these.
    """

    residual: Orthogonal | None
    down: SignedHadamard | None
    key: SignedHadamard | None
    attn_input: SignedHadamard | None
    mlp_input: SignedHadamard | None
    value_signs: torch.Tensor | None
    """int8 ``[layers, num_kv_heads * head_dim]``."""
    head_dim: int

    @classmethod
    def of(cls, shape: ModelShape, rotations: Rotations) -> "Transforms":
        """Build them, signs included, from what the config records."""

        def signed(rotation: Rotation | None, size: int) -> SignedHadamard | None:
            if rotation is None or rotation.kind == "orthogonal":
                return None
            seed = rotation.sign_seed
            signs = None if seed is None else random_signs(seed, size)
            return SignedHadamard(rotation.order, signs)

        value_signs = None
        if rotations.v is not None and rotations.v.sign_seed is not None:
            width = shape.num_kv_heads * shape.head_dim
            signs = random_signs(rotations.v.sign_seed, shape.num_layers * width)
            value_signs = signs.view(shape.num_layers, width)
        return cls(
            residual=of_stream(signed(rotations.residual, shape.hidden_size), shape),
            down=signed(rotations.down_input, shape.intermediate_size),
            key=signed(rotations.k, shape.head_dim),
            attn_input=signed(rotations.attn_input, shape.hidden_size),
            mlp_input=signed(rotations.mlp_input, shape.hidden_size),
            value_signs=value_signs,
            head_dim=shape.head_dim,
        )

    def layer(self, index: int) -> LayerTransforms:
        """Those of one decoder layer."""
        value = None
        if self.value_signs is not None:
            value = SignedHadamard(self.head_dim, self.value_signs[index])
        return LayerTransforms(
            value=value,
            down=self.down,
            attn_input=self.attn_input,
            mlp_input=self.mlp_input,
        )


def online(scheme: Scheme, transforms: Transforms) -> Online:
    """What the server will do to activations, but for clip ratios yet to be found."""
    chosen = scheme.activations
    return Online(
        activations=None
        if chosen.bits == 16
        else IntGrid(
            chosen.bits,
            chosen.symmetric,
            clip_ratio=chosen.clip_ratio,
            group_size=chosen.group_size,
        ),
        kv4=scheme.kv_cache.bits == 4,
        key=transforms.key,
        down=transforms.down,
        attn_input=transforms.attn_input,
        mlp_input=transforms.mlp_input,
    )
