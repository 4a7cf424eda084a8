# SPDX-License-Identifier: Apache-2.0
"""Function-preserving transforms of a model, and folding them into its weights.

Row-vector convention: an activation x becomes ``x R``; a weight ``[out, in]`` that
reads it becomes ``W R``, one that writes it ``R^T W``. Checkpoints are folded in
float64; to learn transforms, the fold runs in float32 with gradients. Where each
transform lives is that of OSTQuant (Hu et al., 2025, section 3) and QuaRot
(Ashkboos et al., 2024, section 4); scales divide what is written and multiply what
reads it.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from ..architecture import ROUTER, ModelShape
from .rotations import Orthogonal

Tensors = dict[str, torch.Tensor]
_QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
# Of a layer, in the order of its norms.
NORM_SCALES = ("attn_scale", "mlp_scale")


@dataclass(frozen=True)
class LayerTransforms:
    """Transforms that live inside one decoder layer; None is the identity.

    Attributes:
        attn_scale: ``[hidden]``, between the first norm and q, k, v.
        mlp_scale: ``[hidden]``, between the second norm and gate, up.
        value: over ``[num_kv_heads * head_dim]``, a block per head; between v and o.
        value_scale: ``[num_kv_heads * head_dim]``, applied before ``value``.
        value_shift: of the same size, subtracted from v before both and added to o's
            bias, which attention's weights let pass as they sum to one; only where
            v and o have biases.
        key_scale: ``[num_kv_heads, head_dim / 2]``, tied over the pairs that RoPE
            rotates; k is multiplied, q divided. ``[1, head_dim / 2]`` where norms of
            queries and keys, whose weights all heads share, have to take it.
        up_scale: ``[intermediate]``, between up and down; ``[experts, intermediate]``
            where there are experts.
        down: applied to down_proj's input at run time; only its inverse is folded.
        attn_input: the same of q, k and v, after ``attn_scale``.
        mlp_input: the same of gate and up.
    """

    attn_scale: torch.Tensor | None = None
    mlp_scale: torch.Tensor | None = None
    value: Orthogonal | None = None
    value_scale: torch.Tensor | None = None
    value_shift: torch.Tensor | None = None
    key_scale: torch.Tensor | None = None
    up_scale: torch.Tensor | None = None
    down: Orthogonal | None = None
    attn_input: Orthogonal | None = None
    mlp_input: Orthogonal | None = None


def scale_shapes(shape: ModelShape) -> dict[str, tuple[int, ...]]:
    """Of the scales of one layer, by their names in :class:`LayerTransforms`."""
    key_heads = 1 if shape.architecture.qk_norm else shape.num_kv_heads
    experts = (shape.num_experts,) if shape.num_experts else ()
    shapes: dict[str, tuple[int, ...]] = {
        "attn_scale": (shape.hidden_size,),
        "mlp_scale": (shape.hidden_size,),
        "value_scale": (shape.num_kv_heads * shape.head_dim,),
        "key_scale": (key_heads, shape.head_dim // 2),
    }
    if shape.architecture.passes_up_scale:
        shapes["up_scale"] = (*experts, shape.intermediate_size)
    return shapes


def norm_readers(shape: ModelShape) -> dict[str, tuple[str, ...]]:
    """By norm of a layer the linears that read its output, the router not counted."""
    parts = shape.mlp_readers
    of_mlps = tuple(f"{mlp}.{part}" for mlp in shape.mlps() for part in parts)
    return {"input_layernorm": _QKV, shape.architecture.mlp_norm: of_mlps}


def gain(weight: torch.Tensor, shape: ModelShape) -> torch.Tensor:
    """What a norm multiplies by, from its weight in a checkpoint."""
    return weight + shape.architecture.norm_offset


def norm_weight(gain: torch.Tensor, shape: ModelShape) -> torch.Tensor:
    """What :func:`gain` is the other way round of."""
    return gain - shape.architecture.norm_offset


def fold_layer(
    tensors: Mapping[str, torch.Tensor],
    shape: ModelShape,
    residual: Orthogonal | None,
    transforms: LayerTransforms,
    dtype: torch.dtype = torch.float64,
) -> Tensors:
    """One decoder layer with its transforms folded in.

    With a residual rotation the norms' weights and biases move into the linears that
    follow. Norms of what attention and MLP add stay as they are, and no rotation
    passes them.

    Args:
        tensors: of the layer, by their names after ``model.layers.N.``.
        shape: sizes of the model.
        residual: rotation of the whole residual stream.
        transforms: those of this layer.
        dtype: computed in.

    Returns:
        tensors of that dtype, of the same names and shapes; the arguments stay as they
        are.
    """
    assert residual is None or not shape.architecture.output_norms
    folded = {name: tensor.to(dtype) for name, tensor in tensors.items()}
    online = (transforms.attn_input, transforms.mlp_input)
    for (norm, readers), name, rotation in zip(
        norm_readers(shape).items(), NORM_SCALES, online, strict=True
    ):
        scale = getattr(transforms, name)
        _fold_norm(folded, shape, norm, readers, residual, scale, rotation)
    _fold_keys(folded, shape, transforms.key_scale)
    _fold_values(folded, shape, transforms)
    _rotate_output(folded, "self_attn.o_proj", residual)
    for index, mlp in enumerate(shape.mlps()):
        scale = transforms.up_scale
        own = scale[index] if scale is not None and shape.num_experts else scale
        _fold_down(folded, mlp, own, transforms.down)
        _rotate_output(folded, f"{mlp}.down_proj", residual)
    return folded


def fold_embedding(weight: torch.Tensor, residual: Orthogonal | None) -> torch.Tensor:
    """Embedding ``[vocab, hidden]`` that writes the rotated residual stream."""
    return weight.double() if residual is None else residual.right(weight.double())


def fold_head(
    weight: torch.Tensor,
    gain: torch.Tensor,
    bias: torch.Tensor | None,
    residual: Orthogonal,
    dtype: torch.dtype = torch.float64,
) -> torch.Tensor:
    """Head ``[vocab, hidden]`` that reads it, the final norm folded in.

    A head has no bias. That of a LayerNorm goes along the vector of ones, to which all
    else that the norm returns is orthogonal, and which :func:`folded_norm` adds.

    Args:
        weight: of the head.
        gain: of the final norm.
        bias: of it, None of an RMSNorm.
        residual: rotation of the residual stream.
        dtype: computed in.
    """
    weight = weight.to(dtype)
    head = residual.right(weight * gain.to(dtype))
    if bias is None:
        return head
    constant = weight @ bias.to(dtype) / weight.shape[-1]
    return head - head.mean(dim=-1, keepdim=True) + constant.unsqueeze(-1)


def folded_norm(
    weight: torch.Tensor, shape: ModelShape
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Weight and bias of a final norm that :func:`fold_head` has taken.

    Args:
        weight: what it was.
        shape: sizes of the model.
    """
    ones = torch.ones_like(weight)
    return norm_weight(ones, shape), ones if shape.architecture.layer_norm else None


def storable(
    transforms: LayerTransforms,
    tensors: Mapping[str, torch.Tensor],
    shape: ModelShape,
    residual: Orthogonal | None,
) -> LayerTransforms:
    """With norm scales near these that leave norms weights of their own dtype.

    The linears, folded in float64, make up for the difference exactly. It matters most
    where 1 is added to a weight: near -1 it has few digits left.

    Args:
        transforms: of a layer.
        tensors: of the layer, by their names after ``model.layers.N.``, in the dtypes
            they are stored in.
        shape: sizes of the model.
        residual: rotation of the residual stream.
    """
    exact: dict[str, Any] = {}
    for name, norm in zip(NORM_SCALES, norm_readers(shape), strict=True):
        scale: torch.Tensor | None = getattr(transforms, name)
        if scale is not None:
            weight = tensors[f"{norm}.weight"]
            own = gain(weight.double(), shape)
            own = torch.ones_like(own) if residual is not None else own
            exact[name] = _storable(scale, own, weight.dtype, shape)
    return replace(transforms, **exact)


def _storable(
    scale: torch.Tensor, own: torch.Tensor, dtype: torch.dtype, shape: ModelShape
) -> torch.Tensor:
    """The scale near this one with which ``own / scale`` is the gain of a weight of a
    dtype, and not 0 where the gain itself is not."""
    offset = shape.architecture.norm_offset
    least = torch.finfo(dtype).eps / 2 if offset else 0.0
    wanted = own / scale
    wanted = torch.where(wanted < 0, wanted.clamp(max=-2 * least), wanted.clamp(least))
    stored = gain(norm_weight(wanted, shape).to(dtype).double(), shape)
    return torch.where((stored == 0) | (own == 0), scale, own / stored)


def _fold_norm(
    tensors: Tensors,
    shape: ModelShape,
    norm: str,
    readers: tuple[str, ...],
    residual: Orthogonal | None,
    scale: torch.Tensor | None,
    online: Orthogonal | None,
) -> None:
    gamma, beta = gain(tensors[f"{norm}.weight"], shape), tensors.get(f"{norm}.bias")
    if residual is not None and beta is not None:
        for reader in readers:
            constant = tensors[f"{reader}.weight"] @ beta
            tensors[f"{reader}.bias"] = tensors[f"{reader}.bias"] + constant
        beta = torch.zeros_like(beta)
    router = f"{ROUTER}.weight"
    names = [f"{reader}.weight" for reader in readers]
    if norm == shape.architecture.mlp_norm and router in tensors:
        names.append(router)
    for name in names:
        if residual is not None:
            tensors[name] = residual.right(tensors[name] * gamma)
        if scale is not None:
            tensors[name] = tensors[name] * scale
        if online is not None and name != router:
            tensors[name] = online.right(tensors[name])
    if residual is not None:
        gamma = torch.ones_like(gamma)
    gamma = gamma if scale is None else gamma / scale
    tensors[f"{norm}.weight"] = norm_weight(gamma, shape)
    if beta is not None:
        tensors[f"{norm}.bias"] = beta if scale is None else beta / scale


def _fold_keys(tensors: Tensors, shape: ModelShape, scale: torch.Tensor | None) -> None:
    if scale is None:
        return
    # Half-split RoPE rotates element i with element i + head_dim / 2.
    per_head = torch.cat((scale, scale), dim=-1)
    if shape.architecture.qk_norm:
        for name, factor in (("k_norm", per_head[0]), ("q_norm", 1 / per_head[0])):
            norm = f"self_attn.{name}.weight"
            tensors[norm] = norm_weight(gain(tensors[norm], shape) * factor, shape)
        return
    group = shape.num_heads // shape.num_kv_heads
    _scale_rows(tensors, "self_attn.k_proj", per_head.flatten())
    _scale_rows(
        tensors,
        "self_attn.q_proj",
        1 / per_head.repeat_interleave(group, dim=0).flatten(),
    )


def _fold_values(
    tensors: Tensors, shape: ModelShape, transforms: LayerTransforms
) -> None:
    group = shape.num_heads // shape.num_kv_heads
    scale, value, out = transforms.value_scale, transforms.value, "self_attn.o_proj"
    if transforms.value_shift is not None:
        shift = transforms.value_shift.double()
        tensors["self_attn.v_proj.bias"] = tensors["self_attn.v_proj.bias"] - shift
        passed = shift.view(shape.num_kv_heads, -1).repeat_interleave(group, dim=0)
        added = tensors[f"{out}.weight"] @ passed.flatten()
        tensors[f"{out}.bias"] = tensors[f"{out}.bias"] + added
    if scale is not None:
        _scale_rows(tensors, "self_attn.v_proj", 1 / scale)
        per_head = scale.view(shape.num_kv_heads, -1)
        columns = per_head.repeat_interleave(group, dim=0).flatten()
        tensors[f"{out}.weight"] = tensors[f"{out}.weight"] * columns
    if value is not None:
        _rotate_output(tensors, "self_attn.v_proj", value)
        rotated = value.repeat(group).right(tensors[f"{out}.weight"])
        tensors[f"{out}.weight"] = rotated


def _fold_down(
    tensors: Tensors, mlp: str, scale: torch.Tensor | None, down: Orthogonal | None
) -> None:
    name = f"{mlp}.down_proj.weight"
    if scale is not None:
        _scale_rows(tensors, f"{mlp}.up_proj", 1 / scale)
        # Before the Hadamard: the other order is another function.
        tensors[name] = tensors[name] * scale
    if down is not None:
        tensors[name] = down.right(tensors[name])


def _scale_rows(tensors: Tensors, linear: str, scale: torch.Tensor) -> None:
    weight, bias = f"{linear}.weight", f"{linear}.bias"
    tensors[weight] = tensors[weight] * scale.unsqueeze(-1)
    if bias in tensors:
        tensors[bias] = tensors[bias] * scale


def _rotate_output(tensors: Tensors, linear: str, rotation: Orthogonal | None) -> None:
    if rotation is None:
        return
    weight, bias = f"{linear}.weight", f"{linear}.bias"
    tensors[weight] = rotation.right(tensors[weight].t()).t().contiguous()
    if bias in tensors:
        tensors[bias] = rotation.right(tensors[bias])
