# SPDX-License-Identifier: Apache-2.0
"""A checkpoint beside its base model, block by block: what a report shows.

Every block of the checkpoint is given exactly what the base model's has, the residual
stream rotated as the checkpoint has it, so that errors are those of one block alone.
Beside it goes ``rtn``: the base model with the same grids, rounded to nearest without
any transform.
"""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch

from ..errors import ConfigError, UnsupportedError
from ..kernels.hadamard_quantize.reference import transform
from ..schema import Activations, KVCache, LowbitConfig, Rotations
from .plan import served_shape
from .qsur import SecondMoment, log_qsur
from .reference_model import ReferenceModel
from .reference_weights import QuantizedLinear
from .straight_through import fake_quantize

BLOCKS = ("self_attn", "mlp")
# Fused linears of a block, and what the picture of their input is called.
PLACES = {
    "self_attn.qkv_proj": "input of q, k, v",
    "self_attn.o_proj": "input of o_proj",
    "mlp.gate_up_proj": "input of gate, up",
    "mlp.up_proj": "input of up",
    "mlp.down_proj": "input of down_proj",
}
# Those that read a norm.
NORMED = ("self_attn.qkv_proj", "mlp.gate_up_proj", "mlp.up_proj")
# Embeddings of 8 bits differ by less from those they were rounded from.
SAME_MODEL = 0.1
# Norm weights are stored in 16 bits; a difference below that is none.
SAME_STAGE = 0.01
SAMPLE_TOKENS, SAMPLE_CHANNELS = 64, 128
Linears = Mapping[str, Callable[[torch.Tensor], torch.Tensor]]


@dataclass(frozen=True)
class Inputs:
    """What one fused linear reads, of all windows.

    Attributes:
        peaks: float32 ``[channels]``, largest magnitude of each.
        sample: float32 ``[tokens, channels]`` of magnitudes, the first window in
            cells of which the largest is kept.
        error: norm of the quantization error over that of the input; None where it is
            not quantized.
    """

    peaks: torch.Tensor
    sample: torch.Tensor
    error: float | None


@dataclass(frozen=True)
class Place:
    """The input of a fused linear, in the base model and in the checkpoint.

    Attributes:
        layer: its index.
        kind: a key of :data:`PLACES`.
        before: in the base model.
        after: in the checkpoint, online transform included.
        qsur: log QSUR per dimension by stage, the base model's first.
    """

    layer: int
    kind: str
    before: Inputs
    after: Inputs
    qsur: dict[str, float]


@dataclass(frozen=True)
class BlockError:
    """Norm of an error over that of the base model's value.

    Attributes:
        weights: of the block's output when only its weights are quantized.
        all: with activations and KV cache as well.
        stream: of the residual stream after it, all blocks up to it quantized.
    """

    weights: float
    all: float
    stream: float


@dataclass(frozen=True)
class Observation:
    """Attributes:
    places: by layer and in the order of PLACES.
    errors: of the ``checkpoint`` and of ``rtn``, by the name of the block.
    """

    places: tuple[Place, ...]
    errors: dict[str, dict[str, BlockError]]


@dataclass
class _Model:
    """One quantized model as it goes through the blocks.

    Attributes:
        whole: everything quantized.
        weights_only: nothing but the weights.
        rotation: of its residual stream, float64 ``[hidden, hidden]``, None for none.
        streams: its own residual stream of each window, in the base model's basis.
        errors: of the blocks so far.
    """

    whole: ReferenceModel
    weights_only: ReferenceModel
    rotation: torch.Tensor | None
    streams: list[torch.Tensor]
    errors: dict[str, BlockError] = field(default_factory=dict)

    def output(
        self, model: ReferenceModel, block: str, stream: torch.Tensor
    ) -> torch.Tensor:
        """The block's output for a stream, both in the base model's basis."""
        if self.rotation is None:
            return model.block(block, stream)
        rotated = (stream.double() @ self.rotation).float()
        return (model.block(block, rotated).double() @ self.rotation.t()).float()


@torch.no_grad()
def observe(
    base: str,
    checkpoint: str,
    windows: Sequence[torch.Tensor],
    progress: Callable[[int, int], object] = lambda done, total: None,
) -> Observation:
    """Run both models over windows of tokens.

    Args:
        base: directory of the plain model the checkpoint was made from.
        checkpoint: directory of a quantized one.
        windows: int64 ``[tokens]`` each.
        progress: called with the blocks done and their number.

    Raises:
        ConfigError: when the checkpoint is not quantized, or of another model.
        CheckpointError, UnsupportedError: for files that cannot be run.
    """
    plain, quantized = ReferenceModel(base), ReferenceModel(checkpoint)
    if quantized.config is None:
        raise ConfigError(f"{checkpoint}: is not quantized; a report compares one")
    if served_shape(plain.shape, quantized.config) != quantized.shape:
        raise ConfigError(
            f"{checkpoint}: its sizes are not those of {base}; name the model it was "
            "made from"
        )
    if plain.shape.num_experts:
        raise UnsupportedError(
            f"{base}: {plain.shape.architecture.name}: a report has no place for a "
            "mixture of experts; evaluate measures it"
        )
    rotation = _rotation(plain, quantized, checkpoint, base)
    streams = [plain.look_up(window) for window in windows]
    models = {
        "checkpoint": _model(quantized, rotation, streams),
        "rtn": _model(_rounded(base, quantized.config), None, streams),
    }
    blocks = [
        f"model.layers.{layer}.{block}"
        for layer in range(plain.shape.num_layers)
        for block in BLOCKS
    ]
    places: list[Place] = []
    for done, block in enumerate(blocks):
        progress(done, len(blocks))
        places += _places(plain, models["checkpoint"], block, streams)
        outputs = [plain.block(block, stream) for stream in streams]
        for model in models.values():
            _add_errors(model, block, streams, outputs)
        streams = [x + y for x, y in zip(streams, outputs, strict=True)]
    progress(len(blocks), len(blocks))
    errors = {name: model.errors for name, model in models.items()}
    return Observation(tuple(places), errors)


def _model(
    model: ReferenceModel, rotation: torch.Tensor | None, streams: list[torch.Tensor]
) -> _Model:
    assert model.config is not None
    scheme = model.config.scheme.model_copy(
        update={"activations": Activations(bits=16), "kv_cache": KVCache(bits=16)}
    )
    weights_only = copy.copy(model)
    weights_only.config = model.config.model_copy(update={"scheme": scheme})
    weights_only.linears = {
        name: replace(linear, activations=None)
        for name, linear in _quantized(model.linears)
    }
    return _Model(model, weights_only, rotation, list(streams))


def _quantized(linears: Linears) -> Iterator[tuple[str, QuantizedLinear]]:
    for name, linear in linears.items():
        assert isinstance(linear, QuantizedLinear)
        yield name, linear


def _rounded(base: str, config: LowbitConfig) -> ReferenceModel:
    """The base model on the checkpoint's grids, without transforms."""
    scheme = config.scheme.model_copy(update={"vocab_bits": 16})
    return ReferenceModel(base, LowbitConfig(scheme=scheme, rotations=Rotations()))


def _rotation(
    plain: ReferenceModel, quantized: ReferenceModel, checkpoint: str, base: str
) -> torch.Tensor | None:
    """The orthogonal matrix from one residual stream to the other, None for none.

    The nearest to what takes one embedding to the other (orthogonal Procrustes), so
    that any is found, however it was made; the embedding is held in 8 or 16 bits.

    Raises:
        ConfigError: when no rotation does.
    """
    step = max(1, plain.shape.vocab_size // (8 * plain.shape.hidden_size))
    ids = torch.arange(0, plain.shape.vocab_size, step)
    x, y = (model.vocabulary.look_up(ids).double() for model in (plain, quantized))
    if float((x - y).norm()) < SAME_MODEL * float(x.norm()):
        return None
    left, _, right = torch.linalg.svd(x.t() @ y)
    rotation = left @ right
    apart = float((x @ rotation - y).norm() / x.norm())
    if not apart < SAME_MODEL:
        raise ConfigError(
            f"{checkpoint}: was not made from {base}: no rotation takes one embedding "
            f"to the other, the nearest leaves {100 * apart:.0f}%"
        )
    return rotation


def _add_errors(
    model: _Model,
    block: str,
    streams: list[torch.Tensor],
    outputs: list[torch.Tensor],
) -> None:
    """Run a block three times: weights only, whole, and on its own stream."""
    squares = torch.zeros(5, dtype=torch.float64)
    for index, (stream, output) in enumerate(zip(streams, outputs, strict=True)):
        weights = model.output(model.weights_only, block, stream)
        whole = model.output(model.whole, block, stream)
        own = model.streams[index]
        own = own + model.output(model.whole, block, own)
        model.streams[index] = own
        after = stream + output
        pieces = (weights - output, whole - output, output, own - after, after)
        squares += torch.stack([piece.double().square().sum() for piece in pieces])
    weights, whole, output, drift, after = squares.sqrt().tolist()
    model.errors[block] = BlockError(weights / output, whole / output, drift / after)


def _places(
    plain: ReferenceModel,
    model: _Model,
    block: str,
    streams: list[torch.Tensor],
) -> Iterator[Place]:
    layer = int(block.split(".")[2])
    before = _inputs_of(plain, block, streams)
    rotated = streams
    if model.rotation is not None:
        rotated = [(x.double() @ model.rotation).float() for x in streams]
    after = _inputs_of(model.whole, block, rotated)
    for kind in PLACES:
        name = f"model.layers.{layer}.{kind}"
        if name not in before:
            continue
        linear = dict(_quantized(model.whole.linears))[name]
        scale, order = linear.weight.input_scale, linear.order
        online = [transform(x, scale, order, linear.stride) for x in after[name]]
        stages = {"base model": before[name]}
        if model.rotation is not None and kind in NORMED:
            stages["residual rotation"] = [_unit(x, plain) for x in rotated]
        yield Place(
            layer=layer,
            kind=kind,
            before=_inputs(before[name], linear),
            after=_inputs(online, linear),
            qsur=_qsur(stages, after[name], online if order > 1 else None),
        )


def _inputs_of(
    model: ReferenceModel, block: str, streams: list[torch.Tensor]
) -> dict[str, list[torch.Tensor]]:
    """What each linear of a block reads, of every window."""
    seen: dict[str, list[torch.Tensor]] = {}

    def tapped(
        name: str, linear: Callable[[torch.Tensor], torch.Tensor]
    ) -> Callable[[torch.Tensor], torch.Tensor]:
        def run(x: torch.Tensor) -> torch.Tensor:
            seen.setdefault(name, []).append(x)
            return linear(x)

        return run

    tapping = copy.copy(model)
    tapping.linears = {n: tapped(n, linear) for n, linear in model.linears.items()}
    for stream in streams:
        tapping.block(block, stream)
    return seen


def _unit(stream: torch.Tensor, model: ReferenceModel) -> torch.Tensor:
    """A norm without weight and bias."""
    if model.own.layer_norm:
        stream = stream - stream.mean(dim=-1, keepdim=True)
    return stream * torch.rsqrt(stream.square().mean(dim=-1, keepdim=True))


def _inputs(parts: list[torch.Tensor], linear: QuantizedLinear) -> Inputs:
    x = torch.cat(parts)
    error = None
    if linear.activations is not None:
        rounded = fake_quantize(x, linear.activations)
        error = float((rounded - x).norm() / x.norm())
    first = parts[0].abs()
    shape = (
        min(SAMPLE_TOKENS, first.shape[0]),
        min(SAMPLE_CHANNELS, first.shape[1]),
    )
    sample = torch.nn.functional.adaptive_max_pool2d(first.unsqueeze(0), shape)[0]
    return Inputs(x.abs().amax(dim=0), sample, error)


def _qsur(
    stages: dict[str, list[torch.Tensor]],
    folded: list[torch.Tensor],
    online: list[torch.Tensor] | None,
) -> dict[str, float]:
    """By stage; one that changes nothing is left out."""
    last = torch.cat(list(stages.values())[-1])
    if float((torch.cat(folded) - last).norm()) > SAME_STAGE * float(last.norm()):
        stages = {**stages, "folded transforms": folded}
    if online is not None:
        stages = {**stages, "online Hadamard": online}
    found = {}
    for stage, parts in stages.items():
        moment = SecondMoment(parts[0].shape[-1])
        for part in parts:
            moment.add(part)
        found[stage] = log_qsur(moment.value)
    return found
