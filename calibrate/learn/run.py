# SPDX-License-Identifier: Apache-2.0
"""Learning the transforms of a model, end to end.

All layers are in memory, in float32, and so are the activations of one step.
"""

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from hashlib import sha256

import torch

from ...errors import CalibrationError
from ..recipe_sections import Learn
from .loss import cross_entropy, kl_top, mean_squared
from .model import LearningModel
from .orthogonal import CayleySGD, RiemannianAdam
from .parameters import Parameters
from .snapshot import Curve, Snapshot, State, deferred_interrupt
from .teacher import Teacher

OPTIMIZERS = {"riemannian_adam": RiemannianAdam, "cayley_sgd": CayleySGD}
SNAPSHOT_SECONDS = 60.0
# Between two searches for the clipping of fake-quantized weights.
CLIP_STEPS = 32
Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Task:
    """What is minimised over what.

    Attributes:
        model: the quantized model.
        teacher: the float one.
        windows: token ids ``[windows, tokens]``.
        learn: the recipe's section, steps and tokens filled in.
        seed: of the order of windows.
    """

    model: LearningModel
    teacher: Teacher
    windows: torch.Tensor
    learn: Learn
    seed: int

    @property
    def batch(self) -> int:
        """Windows of one step."""
        assert self.learn.tokens_per_step is not None
        wanted = round(self.learn.tokens_per_step / self.windows.shape[1])
        return min(max(1, wanted), len(self.windows))

    def chosen(self, step: int) -> torch.Tensor:
        """Indices of the windows of a step: all of them in turn, shuffled each time."""
        per_round = len(self.windows) // self.batch
        generator = torch.Generator().manual_seed(
            int.from_bytes(
                sha256(f"{self.seed}:{step // per_round}".encode()).digest()[:8]
            )
            >> 1
        )
        order = torch.randperm(len(self.windows), generator=generator)
        first = step % per_round * self.batch
        return order[first : first + self.batch]

    def loss(self, step: int, parameters: Parameters) -> torch.Tensor:
        """Of the windows of a step."""
        index = self.chosen(step).to(self.windows.device)
        ids = self.windows[index]
        student = self.model.logits(ids, parameters)
        if self.learn.loss == "cross_entropy":
            return cross_entropy(student, ids)
        pair = student.flatten(0, 1), self.teacher.logits(index).flatten(0, 1)
        if self.learn.loss == "mse":
            return mean_squared(*pair)
        return kl_top(*pair, self.learn.top_k, self.learn.renormalise)


class Learner:
    """The loop over steps.

    Args:
        task: what is minimised.
        parameters: as they start, gradients on; changed in place.
        snapshot: where the state is kept.
        origin: names and hashes of all that the result depends on.
        progress: called with steps done, their number, and the loss.
    """

    def __init__(
        self,
        task: Task,
        parameters: Parameters,
        snapshot: Snapshot,
        origin: Mapping[str, str],
        progress: Progress,
    ) -> None:
        self.task, self.parameters = task, parameters
        self.snapshot, self.origin, self.progress = snapshot, origin, progress
        self.leaves = parameters.leaves()
        self.optimizers = _optimizers(task.learn, parameters)
        self.curve: Curve = []

    def run(self) -> Curve:
        """Learn; returns steps done and loss of every step.

        Raises:
            CalibrationError: naming the step whose loss or gradient is not finite.
            ConfigError: when the snapshot cannot be gone on from.
            KeyboardInterrupt: after the state was saved.
        """
        steps = self.task.learn.steps
        assert steps is not None
        state = self.snapshot.load(self.origin)
        if state is not None:
            self._restore(state)
        try:
            self._learn(steps)
        except CalibrationError:
            # To go on from it would end the same way.
            self.snapshot.remove()
            raise
        return self.curve

    def _learn(self, steps: int) -> None:
        saved = time.monotonic()
        with deferred_interrupt() as interrupted:
            self._report(steps)
            for step in range(len(self.curve), steps):
                self.curve.append((step + 1, self._step(step, steps)))
                self._report(steps)
                last = step + 1 == steps
                if last or interrupted or time.monotonic() > saved + SNAPSHOT_SECONDS:
                    self.snapshot.save(self._state(), self.origin)
                    saved = time.monotonic()
                if interrupted:
                    break
            if interrupted:
                raise KeyboardInterrupt

    def _report(self, steps: int) -> None:
        what = f"learning, loss {self.curve[-1][1]:.5f}" if self.curve else "learning"
        self.progress(len(self.curve), steps, what)

    def _step(self, step: int, steps: int) -> float:
        if step % CLIP_STEPS == 0:
            self.task.model.clip_ratios.clear()
        loss = self.task.loss(step, self.parameters)
        value = float(loss.detach())
        if not math.isfinite(value):
            raise CalibrationError(self._what_failed(step, value))
        grads = torch.autograd.grad(loss, list(self.leaves.values()))
        factor = (1 + math.cos(math.pi * step / steps)) / 2
        for (name, leaf), grad in zip(self.leaves.items(), grads, strict=True):
            if not bool(torch.isfinite(grad).all()):
                raise CalibrationError(
                    f"learning, step {step + 1}: the gradient of {name} holds an Inf "
                    f"or NaN; lower {self._rates()}"
                )
            leaf.grad = grad
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = factor * group["initial_lr"]
            optimizer.step()
        return value

    @torch.no_grad()
    def _what_failed(self, step: int, value: float) -> str:
        ids = self.task.windows[self.task.chosen(step).to(self.task.windows.device)]
        layer = self.task.model.first_not_finite(ids, self.parameters)
        where = "" if layer is None else f", first in the output of {layer}"
        return (
            f"learning, step {step + 1}: the loss is {value}{where}; lower "
            f"{self._rates()}"
        )

    def _rates(self) -> str:
        """Keys of the learning rates that have an effect."""
        kinds = {
            "rotation_lr": self.parameters.rotations,
            "scale_lr": self.leaves.keys() & self.parameters.log_scales,
            "clip_lr": self.parameters.clips,
        }
        return " or ".join(f"learn.{key}" for key, found in kinds.items() if found)

    def _state(self) -> State:
        tensors = self.leaves | self.task.model.clip_ratios
        for optimizer in self.optimizers:
            for name, leaf in self.leaves.items():
                for key, tensor in optimizer.state.get(leaf, {}).items():
                    tensors[f"{name}.{key}"] = tensor
        return State(len(self.curve), self.curve, tensors)

    def _restore(self, state: State) -> None:
        self.curve = list(state.curve)
        device = self.task.windows.device
        self.task.model.clip_ratios |= {
            name: tensor.to(device)
            for name, tensor in state.tensors.items()
            if name.startswith("clip_ratio.")
        }
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                for leaf in group["params"]:
                    (name,) = (n for n, t in self.leaves.items() if t is leaf)
                    with torch.no_grad():
                        leaf.copy_(state.tensors[name])
                    # Adam keeps its count of steps on the CPU.
                    optimizer.state[leaf] = {
                        key.removeprefix(f"{name}."): tensor.to(leaf.device)
                        if tensor.dim()
                        else tensor
                        for key, tensor in state.tensors.items()
                        if key.startswith(f"{name}.")
                    }


def _optimizers(learn: Learn, parameters: Parameters) -> list[torch.optim.Optimizer]:
    leaves = parameters.leaves()
    rotations = [leaves[name] for name in parameters.rotations]
    scales = [t for name, t in leaves.items() if name in parameters.log_scales]
    optimizers: list[torch.optim.Optimizer] = []
    if rotations:
        kind = OPTIMIZERS[learn.optimizer]
        optimizers.append(kind(rotations, lr=learn.rotation_lr))
    if scales:
        optimizers.append(torch.optim.Adam(scales, lr=learn.scale_lr))
    if parameters.clips:
        clips = list(parameters.clips.values())
        optimizers.append(torch.optim.Adam(clips, lr=learn.clip_lr))
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["initial_lr"] = group["lr"]
    return optimizers
