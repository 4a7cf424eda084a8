# SPDX-License-Identifier: Apache-2.0
"""From a model and a recipe to learned transforms."""

import json
from hashlib import sha256
from importlib.metadata import version

import torch

from ...kernels.grid import IntGrid
from ...load_time import check_finite
from ...schema import LowbitConfig
from ..clips import stored_ratio
from ..plan import Transforms, online
from ..recipe import Recipe
from ..rotary import model_config
from ..source import Source
from ..stages import DecoderStages
from ..transforms import norm_readers, storable
from ..vocabulary import plain_vocabulary
from .model import LearningModel
from .parameters import Learned, Parameters, Tensors
from .run import Learner, Progress, Task
from .snapshot import Curve, Snapshot
from .start import start
from .teacher import Teacher


def learn_transforms(
    source: Source,
    recipe: Recipe,
    quantization: LowbitConfig,
    windows: torch.Tensor,
    snapshot: Snapshot,
    progress: Progress,
) -> tuple[Learned, Curve]:
    """Learn what the recipe says is learned.

    Args:
        source: the float model.
        recipe: steps and tokens per step filled in.
        quantization: what will be served.
        windows: token ids ``[windows, tokens]`` to learn on, on the device to use.
        snapshot: where the state is kept, and gone on from.
        progress: called with steps done, their number, and the loss.

    Returns:
        the transforms and clip ratios of every layer, and steps done with the loss of
        each.

    Raises:
        CheckpointError: naming a tensor of the base model that is not finite.
        CalibrationError: naming the step at which numbers were not.
        ConfigError: when the snapshot belongs to another run.
    """
    device, scheme = str(windows.device), quantization.scheme
    fixed = Transforms.of(source.shape, quantization.rotations)
    config = model_config(source.directory, source.shape)
    layers = [_layer(source, index, device) for index in range(source.shape.num_layers)]
    vocabulary = plain_vocabulary(source).to(device)
    stages = DecoderStages(config, source.shape, device=device)
    teacher = Teacher.of(stages, layers, vocabulary, windows)
    parameters = start(source.shape, recipe, fixed, layers, teacher)
    weights = None
    if recipe.learn.quantize_weights:
        bits = min(8, scheme.weights.bits + recipe.learn.extra_weight_bits)
        grid = IntGrid(bits, scheme.weights.symmetric)
        weights = grid, scheme.weights.group_size
    model = LearningModel(
        config,
        source.shape,
        layers,
        vocabulary,
        online(scheme, fixed),
        weights,
        device,
    )
    task = Task(model, teacher, windows, recipe.learn, recipe.seed)
    origin = _origin(source, recipe, windows, teacher, parameters)
    curve = Learner(task, parameters, snapshot, origin, progress).run()
    for leaf in parameters.leaves().values():
        leaf.requires_grad_(False)
    return _finished(source, parameters), curve


def _layer(source: Source, index: int, device: str) -> Tensors:
    tensors = source.layer(index)
    for name, tensor in tensors.items():
        check_finite(tensor, f"model.layers.{index}.{name}")
    return {name: tensor.float().to(device) for name, tensor in tensors.items()}


def _origin(
    source: Source,
    recipe: Recipe,
    windows: torch.Tensor,
    teacher: Teacher,
    parameters: Parameters,
) -> dict[str, str]:
    """All that the result depends on; the float model's numbers stand for its weights
    and for how this machine computes."""
    start_of = torch.cat([t.detach().flatten() for t in parameters.leaves().values()])
    packages = ("vllm-lowbit", "torch", "transformers")
    return {
        "the base model": source.name,
        "the recipe": recipe.sha256(),
        "the tokens": _hash(windows),
        "the float model's hidden states": _hash(teacher.states),
        "the start": _hash(start_of),
        "the versions": json.dumps({name: version(name) for name in packages}),
    }


def _hash(tensor: torch.Tensor) -> str:
    return sha256(tensor.cpu().contiguous().numpy().tobytes()).hexdigest()


@torch.no_grad()
def _finished(source: Source, parameters: Parameters) -> Learned:
    shape, residual = source.shape, parameters.residual(torch.float64)
    layers = []
    for index in range(shape.num_layers):
        layer = parameters.layer(index, torch.float64)
        norms = {
            f"{norm}.weight": source.tensor(f"model.layers.{index}.{norm}.weight")
            for norm in norm_readers(shape)
        }
        layers.append(storable(layer, norms, shape, residual))
    ratios = tuple(
        {
            stage: stored_ratio(ratio)
            for stage, ratio in parameters.clip_ratios(i).items()
        }
        for i in range(shape.num_layers)
    )
    return Learned(residual, tuple(layers), ratios)
