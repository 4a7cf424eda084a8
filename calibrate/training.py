# SPDX-License-Identifier: Apache-2.0
"""The loop all training in calibration goes through: batches, AdamW, best snapshot."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from .record import CalibrationRecord

Parameters = Sequence[torch.Tensor]


@dataclass(frozen=True)
class Group:
    """Tensors that are trained with one learning rate; AdamW without weight decay."""

    tensors: Parameters
    learning_rate: float


@dataclass(frozen=True)
class Training:
    """How long, and on what.

    Attributes:
        name: of the curve, and in errors.
        windows: to draw from, without replacement until all were drawn.
        batch: windows of a step.
        steps: of the optimiser.
        seed: of the order.
        cosine: let learning rates fall to zero along a cosine; else they stay.
        points: of the curve, evenly spread.
    """

    name: str
    windows: int
    batch: int
    steps: int
    seed: int
    cosine: bool = False
    points: int = 20

    def batches(self) -> Iterator[torch.Tensor]:
        """Indices of the windows of each step."""
        generator = torch.Generator().manual_seed(self.seed)
        batch = min(self.batch, self.windows)
        left: list[torch.Tensor] = []
        for _ in range(self.steps):
            if not left:
                order = torch.randperm(self.windows, generator=generator)
                left = [part for part in order.split(batch) if len(part) == batch]
            yield left.pop()


def minimise(
    loss_of: Callable[[torch.Tensor], torch.Tensor],
    groups: Sequence[Group],
    training: Training,
    record: CalibrationRecord,
    progress: Callable[[int, float], None],
    validate: Callable[[], float] | None = None,
) -> None:
    """Train the tensors of groups in place.

    Args:
        loss_of: loss on the windows of these indices.
        groups: leaf tensors; gradients are asked for here.
        training: how long, and on what.
        record: takes the curve: the mean loss since the point before, and of
            ``validate`` as ``NAME.validation``.
        progress: called with the steps done and the last loss.
        validate: loss that decides which state is kept, from that before training
            to the last; None keeps the last.

    Raises:
        CalibrationError: naming the training and the step whose loss is not finite.
    """
    tensors = [tensor for group in groups for tensor in group.tensors]
    for tensor in tensors:
        tensor.requires_grad_()
    optimizer = torch.optim.AdamW(
        [{"params": list(g.tensors), "lr": g.learning_rate} for g in groups],
        weight_decay=0.0,
    )
    best = _Best(tensors, training.name, record, validate)
    best.consider(0)
    every = max(1, training.steps // training.points)
    total, counted = 0.0, 0
    for step, batch in enumerate(training.batches(), start=1):
        if training.cosine:
            factor = (1 + math.cos(math.pi * (step - 1) / training.steps)) / 2
            for settings, group in zip(optimizer.param_groups, groups, strict=True):
                settings["lr"] = group.learning_rate * factor
        optimizer.zero_grad()
        with torch.enable_grad():
            loss = loss_of(batch)
            value = float(loss.detach())
            if not math.isfinite(value):
                record.point(training.name, step, value)
            loss.backward()
        optimizer.step()
        total, counted = total + value, counted + 1
        progress(step, value)
        if step % every == 0 or step == training.steps:
            record.point(training.name, step, total / counted)
            total, counted = 0.0, 0
            best.consider(step)
    best.restore()
    for tensor in tensors:
        tensor.requires_grad_(False)
        tensor.grad = None


class _Best:
    """The state with the least validation loss; of equal ones the first."""

    def __init__(
        self,
        tensors: Parameters,
        name: str,
        record: CalibrationRecord,
        validate: Callable[[], float] | None,
    ) -> None:
        self.tensors, self.name, self.record = tensors, name, record
        self.validate = validate
        self.loss = math.inf
        self.state: list[torch.Tensor] = []

    @torch.no_grad()
    def consider(self, step: int) -> None:
        if self.validate is None:
            return
        loss = self.validate()
        self.record.point(f"{self.name}.validation", step, loss)
        if loss < self.loss:
            self.loss = loss
            self.state = [tensor.clone() for tensor in self.tensors]

    @torch.no_grad()
    def restore(self) -> None:
        for tensor, kept in zip(self.tensors, self.state, strict=bool(self.state)):
            tensor.copy_(kept)
