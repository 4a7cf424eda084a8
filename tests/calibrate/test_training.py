# SPDX-License-Identifier: Apache-2.0
"""The training loop, its record, rounding that gradients pass, and KL-Top."""

import json
import math

import pytest
import torch
from torch.nn import functional

from vllm_lowbit.calibrate.learn.loss import kl_top
from vllm_lowbit.calibrate.record import CalibrationRecord
from vllm_lowbit.calibrate.straight_through import on_grid, rounded, stored_as
from vllm_lowbit.calibrate.training import Group, Training, minimise
from vllm_lowbit.errors import CalibrationError
from vllm_lowbit.kernels.grid import IntGrid, decode


def _ignore(step: int, loss: float) -> None:
    pass


@pytest.mark.parametrize(("windows", "batch"), [(7, 3), (4, 4), (3, 8), (9, 1)])
def test_batches_repeat_no_window_before_all_were_drawn(
    windows: int, batch: int
) -> None:
    training = Training("t", windows, batch, steps=50, seed=3)
    batches = list(training.batches())
    assert [b.tolist() for b in training.batches()] == [b.tolist() for b in batches]
    size = min(batch, windows)
    assert {len(b) for b in batches} == {size} and len(batches) == 50
    per_epoch = windows // size
    for start in range(0, 50, per_epoch):
        seen = torch.cat(batches[start : start + per_epoch]).tolist()
        assert len(set(seen)) == len(seen) and set(seen) <= set(range(windows))
    other = Training("t", windows, batch, steps=50, seed=4).batches()
    if windows > size:
        assert [b.tolist() for b in other] != [b.tolist() for b in batches]


@pytest.mark.parametrize("cosine", [False, True])
def test_a_parabola_is_minimised_and_its_curve_recorded(cosine: bool) -> None:
    wanted, x = torch.tensor([1.0, -2.0]), torch.zeros(2)
    record = CalibrationRecord()
    training = Training("t", 8, 2, steps=400, seed=0, cosine=cosine, points=4)
    minimise(
        lambda batch: (x - wanted).square().sum(),
        [Group([x], 0.05)],
        training,
        record,
        _ignore,
    )
    assert torch.allclose(x, wanted, atol=1e-2) and not x.requires_grad
    curve = json.loads(record.text())["curves"]["t"]
    assert [step for step, _ in curve] == [100, 200, 300, 400]
    assert curve[0][1] > curve[-1][1]


def test_the_state_with_the_least_validation_loss_is_kept() -> None:
    x, record = torch.zeros(1), CalibrationRecord()
    training = Training("t", 4, 1, steps=40, seed=0, points=40)
    # Training pulls to 3, what validation asks for is on the way.
    minimise(
        lambda batch: (x - 3.0).square().sum(),
        [Group([x], 0.1)],
        training,
        record,
        _ignore,
        lambda: float((x - 1.0).abs()),
    )
    assert abs(float(x) - 1.0) < 0.06
    losses = [loss for _, loss in json.loads(record.text())["curves"]["t.validation"]]
    assert len(losses) == 41 and min(losses) == pytest.approx(abs(float(x) - 1), 1e-2)


def test_training_that_only_harms_is_undone() -> None:
    x = torch.zeros(3)
    minimise(
        lambda batch: (x - 3.0).square().sum(),
        [Group([x], 0.1)],
        Training("t", 4, 1, steps=10, seed=0),
        CalibrationRecord(),
        _ignore,
        lambda: float(x.abs().sum()),
    )
    assert torch.equal(x, torch.zeros(3))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_names_training_and_step(bad: float) -> None:
    x, calls = torch.ones(1), iter([1.0, 1.0, bad])
    with pytest.raises(CalibrationError, match=rf"omni\.layer3: .* step 3 is {bad}"):
        minimise(
            lambda batch: x.sum() * next(calls),
            [Group([x], 0.1)],
            Training("omni.layer3", 4, 1, steps=10, seed=0),
            CalibrationRecord(),
            _ignore,
        )


def test_record_is_sorted_and_does_not_depend_on_the_order_of_layers() -> None:
    texts = []
    for names in (("a", "b"), ("b", "a")):
        record = CalibrationRecord()
        for name in names:
            record.layer(name, weight_error=0.123456789)
            record.layer(name, output_error=1e-9)
            record.point(f"{name}.curve", 1, 2.0)
        record.layer("a", weight_error=0.5)
        texts.append(record.text())
    assert texts[0] == texts[1]
    assert json.loads(texts[0]) == {
        "curves": {"a.curve": [[1, 2.0]], "b.curve": [[1, 2.0]]},
        "layers": {
            "a": {"weight_error": 0.5, "output_error": 1e-9},
            "b": {"weight_error": 0.12346, "output_error": 1e-9},
        },
    }


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_on_grid_has_the_values_of_the_grid(bits: int, symmetric: bool) -> None:
    generator = torch.Generator().manual_seed(bits)
    grid, x = IntGrid(bits, symmetric), torch.randn(50, 32, generator=generator) * 3
    scale, zero_point = grid.parameters(x, 0.7)
    steps = (x * (1.0 / scale)).requires_grad_()
    value = on_grid(steps, grid, scale, zero_point)
    expected = decode(grid.encode(x, scale, zero_point), scale, zero_point)
    assert torch.equal(value.detach(), expected)
    value.sum().backward()
    codes = torch.round(steps.detach()) + zero_point
    inside = (codes >= grid.code_min) & (codes <= grid.code_max)
    assert torch.equal(steps.grad, torch.where(inside, scale, 0.0))


def test_gradients_pass_rounding() -> None:
    x = torch.tensor([0.5, 1.5, -2.4], requires_grad=True)
    assert rounded(x).tolist() == [0.0, 2.0, -2.0]
    stored = stored_as(x * 1.003, torch.bfloat16)
    assert torch.equal(stored, (x * 1.003).bfloat16().float())
    (rounded(x) * torch.tensor([1.0, 2.0, 3.0])).sum().backward()
    assert x.grad is not None and x.grad.tolist() == [1.0, 2.0, 3.0]


def _logits() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(2, 3, 5, 40, generator=generator) * 3
    return student, teacher


@pytest.mark.parametrize("renormalise", [False, True])
def test_kl_top_is_its_formula(renormalise: bool) -> None:
    student, teacher = _logits()
    total = 0.0
    for s, t in zip(student.flatten(0, 1), teacher.flatten(0, 1), strict=True):
        top = torch.argsort(t, descending=True)[:7]
        p, q = t.double().softmax(0)[top], s.double().softmax(0)[top]
        if renormalise:
            p, q = p / p.sum(), q / q.sum()
        total += float((p * (p.log() - q.log())).sum())
    found = float(kl_top(student, teacher, 7, renormalise))
    assert found == pytest.approx(total / 15, rel=1e-5)


@pytest.mark.parametrize("renormalise", [False, True])
@pytest.mark.parametrize("top_k", [40, 1000])
def test_kl_top_is_capped_by_the_vocabulary(top_k: int, renormalise: bool) -> None:
    student, teacher = _logits()
    whole = functional.kl_div(
        student.log_softmax(-1),
        teacher.log_softmax(-1),
        reduction="sum",
        log_target=True,
    )
    found = kl_top(student, teacher, top_k, renormalise)
    assert float(found) == pytest.approx(float(whole) / 15, rel=1e-5)
    assert float(kl_top(teacher, teacher, top_k, renormalise)) == 0.0
