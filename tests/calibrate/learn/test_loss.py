# SPDX-License-Identifier: Apache-2.0
"""Losses against their definitions."""

import pytest
import torch

from vllm_lowbit.calibrate.learn.loss import cross_entropy, kl_top, mean_squared


def _logits(seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(6, 50, dtype=torch.float64, generator=generator) * 3


@pytest.mark.parametrize("renormalise", [False, True])
@pytest.mark.parametrize("k", [1, 7, 50])
def test_kl_top(k: int, renormalise: bool) -> None:
    student, teacher = _logits(0), _logits(1)
    expected = 0.0
    for z, t in zip(student, teacher, strict=True):
        p, q = t.softmax(-1), z.softmax(-1)
        top = sorted(range(50), key=lambda i: -float(t[i]))[:k]
        p, q = p[top], q[top]
        if renormalise:
            p, q = p / p.sum(), q / q.sum()
        expected += float((p * (p / q).log()).sum()) / 6
    assert float(kl_top(student, teacher, k, renormalise)) == pytest.approx(expected)


@pytest.mark.parametrize("renormalise", [False, True])
def test_kl_of_the_same_logits_is_zero(renormalise: bool) -> None:
    same = _logits(0)
    assert float(kl_top(same, same + 4.0, 9, renormalise)) == pytest.approx(
        0, abs=1e-12
    )


def test_others() -> None:
    student, teacher = _logits(0), _logits(1)
    ids = torch.tensor([[1, 2, 3], [4, 5, 6]])
    windows = student.view(2, 3, 50)
    terms = [
        -windows[w].log_softmax(-1)[t, ids[w, t + 1]]
        for w in range(2)
        for t in range(2)
    ]
    expected = torch.stack(terms).mean()
    assert torch.allclose(cross_entropy(windows, ids), expected)
    squared = (student - teacher).square().sum() / 300
    assert torch.allclose(mean_squared(student, teacher), squared)
