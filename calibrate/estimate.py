# SPDX-License-Identifier: Apache-2.0
"""What a calibration will take: memory, disk and time, known before it starts.

Counts bytes and floating-point operations from the sizes of the model and the recipe;
the speed of the machine is measured on a few small products.
"""

import functools
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from ..architecture import ModelShape
from ..errors import ConfigError
from ..kernels.grid import IntGrid
from ..kernels.quantize_weight.reference import quantize_weight
from .recipe import Recipe
from .recipe_sections import GPTQ_METHODS
from .stages import stages_of
from .vocabulary import ROWS

CHUNK_TOKENS = 4096
"""Tokens that go through a stage at a time."""
_FLOAT, _DOUBLE = 4, 8
# Float tensors of a model or layer that is trained: weights, transformed and rounded
# ones with what their gradients keep, gradients, two moments.
_LEARNED, _REFINED = 7, 13
# Of activations that a backward pass keeps, per token, in hidden and in intermediate
# sizes.
_KEPT_HIDDEN, _KEPT_INTERMEDIATE = 20, 12
# Tensors of capped scores: before and after the cap, hidden ones, probabilities.
_SCORES = 4
LIBRARIES = 200 << 20
"""What torch, the tokenizer and the text take once they are used."""
_CGROUP = Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class Speed:
    """Of this machine, per second.

    Attributes:
        single: float32 operations of a large product.
        double: the same in float64.
        rounded: weights that are searched a range for, and rounded.
    """

    single: float
    double: float
    rounded: float

    @classmethod
    @functools.cache
    def measure(cls, device: str) -> "Speed":
        """On small inputs, in well under a second, once per process."""
        weight = torch.ones(64, 4096, device=device)
        grid = IntGrid(4)
        seconds = _seconds(lambda: quantize_weight(weight, grid, None), device)
        return cls(
            single=_product_speed(torch.float32, device),
            double=_product_speed(torch.float64, device),
            rounded=weight.numel() / seconds,
        )


def _product_speed(dtype: torch.dtype, device: str) -> float:
    size = 768
    x = torch.ones(size, size, dtype=dtype, device=device)
    return 2 * size**3 / _seconds(lambda: x @ x, device)


def _seconds(run: Callable[[], object], device: str) -> float:
    def once() -> float:
        started = time.perf_counter()
        run()
        if device.startswith("cuda"):
            torch.cuda.synchronize(device)
        return time.perf_counter() - started

    once()
    return min(once() for _ in range(3))


@dataclass(frozen=True)
class Estimate:
    """What a run takes, in bytes and seconds.

    Attributes:
        memory: beyond what the interpreter takes with its modules.
        scratch: of files in the scratch directory, 0 without one.
        output: of the checkpoint's tensors.
        seconds: of all of it.
    """

    memory: int
    scratch: int
    output: int
    seconds: float

    def __str__(self) -> str:
        took = f"{self.seconds:.0f} s"
        for unit, seconds in (("min", 60), ("h", 3600)):
            if self.seconds >= 2 * seconds:
                took = f"{self.seconds / seconds:.0f} {unit}"
        files = ""
        if self.scratch:
            files = f", {readable_size(self.scratch)} of scratch files"
        return (
            f"estimate: {readable_size(self.memory)} of memory{files}, "
            f"{readable_size(self.output)} of checkpoint, about {took}"
        )

    def check(self, on_disk: "Estimate | None") -> None:
        """Refuse what this machine has no memory for.

        Args:
            on_disk: the same run with a scratch directory, None where it has one.

        Raises:
            ConfigError: naming what is needed, what is there, and what would help.
        """
        there = available_memory()
        if self.memory <= there:
            return
        help_ = "use fewer or shorter samples, or a recipe that trains less at a time"
        if on_disk is not None and on_disk.memory <= there:
            help_ = (
                f"--scratch DIR takes {readable_size(on_disk.memory)}, and "
                f"{readable_size(on_disk.scratch)} of disk in DIR"
            )
        raise ConfigError(
            f"calibrating takes about {readable_size(self.memory)} of memory, "
            f"{readable_size(there)} are available; {help_}"
        )


def available_memory() -> int:
    """Bytes that can be had without swapping, within the control group's limit."""
    there = int(psutil.virtual_memory().available)
    try:
        limit = (_CGROUP / "memory.max").read_text().strip()
        used = int((_CGROUP / "memory.current").read_text())
    except (OSError, ValueError):
        return there
    return there if limit == "max" else min(there, int(limit) - used)


def readable_size(size: float) -> str:
    """Bytes for a message, in MiB or GiB."""
    gib = size / (1 << 30)
    return f"{gib:.1f} GiB" if gib >= 1 else f"{size / (1 << 20):.0f} MiB"


class Estimator:
    """Sizes of a run; see :class:`Estimate`.

    Args:
        shape: of the model.
        recipe: steps and tokens of learning filled in.
        windows: that go through the model, held-out ones included.
        output: bytes of the checkpoint's tensors.
    """

    def __init__(
        self,
        shape: ModelShape,
        recipe: Recipe,
        windows: int,
        output: int,
    ) -> None:
        self.shape, self.recipe = shape, recipe
        self.output = output
        self.seq_len = recipe.data.seq_len
        self.tokens = windows * self.seq_len
        self.samples = recipe.data.samples * self.seq_len
        prefix = "model.layers.0."
        tensors = {
            name.removeprefix(prefix): size
            for name, size in shape.tensors().items()
            if name.startswith(prefix) and len(size) == 2
        }
        self.layer = sum(map(math.prod, tensors.values()))
        self.largest = max(map(math.prod, tensors.values()))
        inputs = {s: tensors[f"{n[0]}.weight"][1] for s, n in stages_of(shape).items()}
        self.columns = list(inputs.values())
        # The same of one token: it goes through some of the experts.
        some = shape.experts_per_token / max(1, shape.num_experts)
        self.squares = sum(_share(s, some) * k**2 for s, k in inputs.items())
        self.active = sum(_share(n, some) * math.prod(s) for n, s in tensors.items())
        self.matrices = list(tensors.values())
        self.vocabulary = shape.vocab_size * shape.hidden_size
        self.model = self.layer * shape.num_layers

    def estimate(self, speed: Speed, on_disk: bool) -> Estimate:
        """With hidden states and float weights in memory or on disk."""
        states, weights, tables = self._states(), self._kept_weights(), self._tables()
        kept = 0 if on_disk else states + weights + tables
        phases = (self._fold(), self._rounding(), self._trained_layer())
        memory = kept + max(*phases, self._storing()) + self._chunk()
        memory = max(memory + self._pending(), *self._end_to_end(kept)) + LIBRARIES
        scratch = states + weights + tables if on_disk else 0
        return Estimate(memory, scratch, self.output, self._seconds(speed))

    # Bytes.

    def _states(self) -> int:
        """Two streams, each with its next, one in the served basis, two of a stage."""
        return 7 * self.tokens * self.shape.hidden_size * _FLOAT

    def _kept_weights(self) -> int:
        """Of one layer: folded, and as served."""
        return 2 * self.layer * _FLOAT

    def _tables(self) -> int:
        """Embedding and head of both models; a tied one is two only when rotated."""
        return 4 * self.vocabulary * _FLOAT

    def _fold(self) -> int:
        return self.layer * _DOUBLE + 3 * self.largest * _DOUBLE

    def _storing(self) -> int:
        """Of the vocabulary: a part in float64, and codes."""
        part = 3 * ROWS * self.shape.hidden_size * _DOUBLE
        codes = 3 * self.vocabulary if self.recipe.vocab_bits == 8 else 0
        return part + codes

    def _rounding(self) -> int:
        """Of the layer's codes, the largest Hessian, and the largest matrix."""
        square = max(self.columns) ** 2
        method = self.recipe.rounding.method
        sums = factor = 0
        if method in GPTQ_METHODS:
            ordered = self.recipe.rounding.act_order
            sums = (2 * _DOUBLE if ordered else _DOUBLE + _FLOAT) * square
            factor = _FLOAT * square
        if method == "gptaq":
            sums, factor = 5 * _DOUBLE * square, 2 * _FLOAT * square
        return self.layer + max(sums, factor + 3 * self.largest * _FLOAT)

    def _trained_layer(self) -> int:
        recipe = self.recipe
        windows = 0
        if recipe.weights.method == "omniquant":
            windows = recipe.omniquant.batch
        if recipe.refine.scope == "layer":
            windows = max(windows, recipe.refine.batch)
        if not windows:
            return 0
        return _REFINED * self.layer * _FLOAT + self._kept_activations(
            windows * self.seq_len
        )

    def _end_to_end(self, kept: int) -> list[int]:
        """Of learning and of refining the whole model, where the recipe does it."""
        recipe, found = self.recipe, [0]
        model, tables = self.model * _FLOAT, 2 * self.vocabulary * _FLOAT
        layers = self.shape.num_layers
        if recipe.learns:
            tokens = recipe.learn.tokens_per_step or 0
            states = self.samples * self.shape.hidden_size * _FLOAT
            logits = 8 * tokens * self.shape.vocab_size * _FLOAT
            activations = layers * self._kept_activations(tokens)
            found.append(_LEARNED * model + tables + states + logits + activations)
        if recipe.refine.scope == "model":
            tokens = recipe.refine.batch * self.seq_len
            logits = 8 * tokens * self.shape.vocab_size * _FLOAT
            activations = layers * self._kept_activations(tokens)
            found.append(kept + (_REFINED + 2) * model + logits + activations)
        return found

    def _kept_activations(self, tokens: int) -> int:
        shape = self.shape
        kept = _KEPT_HIDDEN * shape.hidden_size
        kept += _KEPT_INTERMEDIATE * shape.intermediate_size + self._scores()
        if self.recipe.clip == "learned":
            # How each element of an input moves with its ratio.
            kept += sum(self.columns)
        return tokens * kept * _FLOAT

    def _chunk(self) -> int:
        """Of the windows that go through a stage at a time, and of their logits."""
        tokens = max(CHUNK_TOKENS, self.seq_len)
        stage = 8 * self.shape.hidden_size + 5 * self.shape.intermediate_size
        stage += self._scores()
        logits = 4 * self.seq_len * self.shape.vocab_size * _FLOAT
        return max(tokens * stage * _FLOAT, logits)

    def _scores(self) -> int:
        """Of a token: attention's scores, which are whole tensors where they are
        capped."""
        capped = self.shape.attention_cap is not None
        return _SCORES * self.shape.num_heads * self.seq_len if capped else 0

    def _pending(self) -> int:
        """Of the file that is being filled."""
        return min(self.output, 1 << 30)

    # Seconds.

    def _seconds(self, speed: Speed) -> float:
        recipe, layers = self.recipe, self.shape.num_layers
        head = 2 * self.vocabulary
        pass_ = self._forward(self.seq_len)
        passes = 2 * self.tokens
        seconds = self.model / speed.rounded
        if recipe.rounding.method in GPTQ_METHODS:
            both = 2 if recipe.rounding.method == "gptaq" else 1
            passes += (1 + both) * self.samples
            squares = 2 * both * self.samples * self.squares
            columns = sum(2 * n * k * k for n, k in self.matrices)
            seconds += layers * (squares + columns) / speed.single
            cubes = sum(k**3 for k in self.columns) * (4 / 3 if both == 1 else 16 / 3)
            seconds += layers * cubes / speed.double
        if recipe.weights.method == "omniquant":
            epochs = recipe.omniquant.epochs or 20
            passes += 4 * epochs * self.samples
        if recipe.refine.scope == "layer":
            settings = recipe.refine
            passes += 4 * settings.steps * settings.batch * self.seq_len
        operations = layers * passes * pass_ + 2 * self.tokens * head
        # A step forward and back, through quantizers, and the float model beside it.
        step = 4 * (layers * pass_ + head)
        if recipe.learns:
            learn = recipe.learn
            operations += (learn.steps or 0) * (learn.tokens_per_step or 0) * step
        if recipe.refine.scope == "model":
            settings = recipe.refine
            operations += settings.steps * settings.batch * self.seq_len * step
        return seconds + 1.5 * operations / speed.single

    def _forward(self, seq_len: int) -> float:
        """Operations of a layer per token."""
        attention = 2 * seq_len * self.shape.num_heads * self.shape.head_dim
        return 2 * self.active + attention


def _share(name: str, some: float) -> float:
    """Of the tokens, how many a stage or tensor of this name sees."""
    return some if ".experts." in name else 1.0
