# SPDX-License-Identifier: Apache-2.0
"""From a plain checkpoint and a recipe to a lowbit checkpoint, layer by layer.

Two streams of hidden states go through the model: one in float, to compare with, and
one through what has been quantized so far, so that each linear is fitted to the inputs
it will really see. One layer's weights are in memory at a time.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch.nn import functional
from transformers import LlamaConfig

from ..checkpoint import TensorSpec
from ..errors import CalibrationError, ConfigError
from ..load_time import check_finite
from ..lowbit_checkpoint import expected_tensors
from ..schema import LowbitConfig, Provenance
from .equalize import InputPower, up_scale, value_scale
from .gptq import Hessian
from .learn.end_to_end import learn_transforms
from .learn.parameters import Learned
from .learn.snapshot import Curve, Snapshot
from .llama import RESIDUAL_STAGES, STAGES, LlamaStages
from .plan import Transforms, online, plan
from .publish import Losses, Report, publish
from .quantize import quantize_linear
from .recipe import Recipe
from .source import Source
from .text import calibration_windows
from .transforms import LayerTransforms, fold_layer
from .vocabulary import Vocabulary, plain_vocabulary, served_vocabulary
from .writer import DTYPES, CheckpointWriter

Weights = dict[str, torch.Tensor]
Progress = Callable[[int, int, str], None]
CHUNK_TOKENS = 4096
LINEARS_PER_LAYER = sum(len(names) for names in STAGES.values())


def held_out_windows(samples: int) -> int:
    """Windows set aside to measure on: a quarter as many, from 1 to 32."""
    return min(32, max(1, samples // 4))


def calibrate(
    model: str,
    output: Path,
    recipe: Recipe,
    text: Path,
    device: str = "auto",
    progress: Progress = lambda done, total, what: None,
    resume: bool = False,
) -> Report:
    """Make a lowbit checkpoint.

    Args:
        model: plain checkpoint, a directory or a hub name.
        output: directory to make; must not exist, or be empty.
        recipe: what is done.
        text: UTF-8 file whose windows are calibrated on.
        device: ``auto``, ``cpu``, ``cuda`` or any of torch's.
        progress: called with linears done, their number, and the current one; before
            that, where transforms are learned, with steps, their number and the loss.
        resume: go on with learning where an interrupted run left its state, in
            ``OUTPUT.snapshot``.

    Raises:
        LowbitError: before anything is written where that can be known; otherwise
            what was written is removed.
    """
    device = choose_device(device)
    source = Source.open(model)
    recipe = recipe.sized(source.shape)
    provenance = Provenance(
        base_model=source.name,
        base_revision=source.revision,
        recipe=recipe.name,
        recipe_sha256=recipe.sha256(),
    )
    config = plan(source.shape, recipe, f"{model}/config.json", provenance)
    samples, seq_len = recipe.data.samples, recipe.data.seq_len
    count = samples + held_out_windows(samples)
    windows = calibration_windows(
        str(source.directory), text, count, seq_len, recipe.seed
    )
    snapshot = Snapshot.of(output, recipe, resume)
    run = Calibration(source, config, recipe, windows, device, progress)
    with CheckpointWriter(output, run.specs()) as writer:
        run.learn(snapshot)
        calibration, held_out = run.run(writer)
        tokens = (count - samples) * (seq_len - 1)
        report = Report(config, calibration, held_out, tokens, run.curves)
        publish(writer, source, recipe, text, report)
    snapshot.remove()
    return report


def choose_device(device: str) -> str:
    """``auto`` is CUDA where there is one.

    Raises:
        ConfigError: for a device that torch does not have here.
    """
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        first = str(error).partition("\n")[0]
        raise ConfigError(f"--device {device}: {first}") from None
    return device


class Calibration:
    """One run over a model; arguments as in :func:`calibrate`.

    Args:
        windows: token ids ``[windows, tokens]``; those after ``recipe.data.samples``
            are only measured on.
    """

    def __init__(
        self,
        source: Source,
        config: LowbitConfig,
        recipe: Recipe,
        windows: torch.Tensor,
        device: str,
        progress: Progress,
    ) -> None:
        self.source, self.config, self.recipe = source, config, recipe
        self.shape, self.device, self.windows = source.shape, device, windows
        self.transforms: Transforms | Learned
        self.transforms = Transforms.of(self.shape, config.rotations)
        self.curves: dict[str, Curve] = {}
        hf_config = LlamaConfig.from_pretrained(source.directory)
        served = online(config.scheme, self.transforms)
        self.plain = LlamaStages(hf_config, self.shape, device=device)
        self.served = LlamaStages(hf_config, self.shape, served, device)
        self.progress = progress
        self.chunk = max(1, CHUNK_TOKENS // windows.shape[1])

    def learn(self, snapshot: Snapshot) -> None:
        """Learn what the recipe says is learned.

        Raises:
            CalibrationError: naming the step at which numbers were not finite.
            ConfigError: when the snapshot belongs to another run.
        """
        if not self.recipe.learns:
            return
        self.transforms, self.curves["learn"] = learn_transforms(
            self.source,
            self.recipe,
            self.config,
            self.windows[: self.recipe.data.samples].to(self.device),
            snapshot,
            self.progress,
        )

    def specs(self) -> dict[str, TensorSpec]:
        """What will be written, floats in the dtype of the base model."""
        specs = expected_tensors(self.shape, self.config)
        for name, spec in specs.items():
            if len(spec.dtypes) > 1:
                dtype = DTYPES[self.source.tensor(name).dtype]
                specs[name] = replace(spec, dtypes=(dtype,))
        return specs

    @torch.no_grad()
    def run(self, writer: CheckpointWriter) -> tuple[Losses, Losses]:
        """Write every tensor; losses on calibration and on held-out windows.

        Raises:
            CheckpointError: naming a tensor of the base model that is not finite.
        CalibrationError: naming the layer whose output is not finite.
        """
        plain = plain_vocabulary(self.source)
        served = served_vocabulary(
            writer.add, self.source, self.config.scheme, self.transforms.residual
        )
        x = served.embedding[self.windows].to(self.device)
        y = plain.embedding[self.windows].to(self.device)
        for index in range(self.shape.num_layers):
            tensors = self.source.layer(index)
            for name, tensor in tensors.items():
                check_finite(tensor, f"model.layers.{index}.{name}")
            y, transforms = self._plain_layer(index, tensors, y)
            x = self._served_layer(index, tensors, transforms, x, writer)
            if not bool(torch.isfinite(x).all()):
                raise CalibrationError(
                    f"model.layers.{index}: its quantized output holds an Inf or NaN"
                )
        total = self.shape.num_layers * LINEARS_PER_LAYER
        self.progress(total, total, "measuring")
        split = self.recipe.data.samples
        return (
            self._losses(slice(None, split), plain, y, served, x),
            self._losses(slice(split, None), plain, y, served, x),
        )

    def _plain_layer(
        self, index: int, tensors: Weights, y: torch.Tensor
    ) -> tuple[torch.Tensor, LayerTransforms]:
        """The float stream after a layer, and the transforms to fold into it."""
        weights = {name: t.float().to(self.device) for name, t in tensors.items()}
        power = InputPower()
        for stage in RESIDUAL_STAGES:
            parts = y.split(self.chunk)
            updated = [
                self.plain.update(stage, weights, part, power.add) for part in parts
            ]
            y = torch.cat(updated)
        transforms = self.transforms.layer(index)
        if self.recipe.transforms.equalize and not self.recipe.learns:
            out = weights["self_attn.o_proj.weight"]
            down = weights["mlp.down_proj.weight"]
            transforms = replace(
                transforms,
                value_scale=value_scale(power.sums["o_input"], out, self.shape),
                up_scale=up_scale(power.sums["down_input"], down),
            )
        return y, transforms

    def _served_layer(
        self,
        index: int,
        tensors: Weights,
        transforms: LayerTransforms,
        x: torch.Tensor,
        writer: CheckpointWriter,
    ) -> torch.Tensor:
        """Fold, quantize and write a layer; the quantized stream after it."""
        prefix = f"model.layers.{index}."
        on_device = {name: tensor.to(self.device) for name, tensor in tensors.items()}
        folded = fold_layer(on_device, self.shape, self.transforms.residual, transforms)
        weights: Weights = {}
        for name, tensor in folded.items():
            if tensor.dim() == 1:
                stored = tensor.to(tensors[name].dtype)
                writer.add(prefix + name, stored)
                weights[name] = stored.float()
        done = index * LINEARS_PER_LAYER
        for stage, names in STAGES.items():
            hessian = None
            if self.recipe.weights.method == "gptq":
                columns = folded[f"{names[0]}.weight"].shape[1]
                hessian = self._hessian(stage, columns, weights, x)
            for name in names:
                total = self.shape.num_layers * LINEARS_PER_LAYER
                self.progress(done, total, prefix + name)
                weights[f"{name}.weight"] = quantize_linear(
                    writer.add,
                    prefix + name,
                    folded[f"{name}.weight"],
                    self.config.scheme,
                    self.recipe.weights,
                    hessian,
                )
                done += 1
            if stage in RESIDUAL_STAGES:
                parts = x.split(self.chunk)
                x = torch.cat(
                    [self.served.update(stage, weights, part) for part in parts]
                )
        return x

    def _hessian(
        self, stage: str, columns: int, weights: Weights, x: torch.Tensor
    ) -> Hessian:
        hessian = Hessian(columns, x.device)
        for part in x[: self.recipe.data.samples].split(self.chunk):
            h = self.served.input_of(stage, weights, part)
            hessian.add(self.served.quantized(h))
        return hessian

    def _losses(
        self,
        windows: slice,
        plain: Vocabulary,
        y: torch.Tensor,
        served: Vocabulary,
        x: torch.Tensor,
    ) -> Losses:
        ids = self.windows[windows].to(self.device)
        return Losses(
            plain=self._loss(y[windows], plain, ids),
            quantized=self._loss(x[windows], served, ids),
        )

    def _loss(self, x: torch.Tensor, end: Vocabulary, ids: torch.Tensor) -> float:
        norm, head = end.norm.to(self.device), end.head.to(self.device)
        total = 0.0
        for states, targets in zip(x, ids, strict=True):
            logits = functional.linear(self.plain.norm(states[:-1], norm), head)
            total += float(
                functional.cross_entropy(logits.double(), targets[1:], reduction="sum")
            )
        return total / ids[:, 1:].numel()
