"""An element's update beside that of its copies elsewhere, and beside PyTorch's own loop."""

from __future__ import annotations

import pytest
import torch

from megagpt.config.schema import OptimSection
from megagpt.engine.adamw import fused_adamw

STEPS = 4


def settings():
    return OptimSection(lr=1e-2, warmup_steps=1, weight_decay=0.1)


def values(n, seed):
    generator = torch.Generator().manual_seed(seed)
    gradients = [1e-3 * torch.randn(n, generator=generator) for _ in range(STEPS)]
    return 0.02 * torch.randn(n, generator=generator), gradients


def updated(weight, gradients, before, after, *, wherever_they_lie=True, optimizer=None):
    """The elements, both moments of each, where others lie before and after them."""
    parameter = torch.nn.Parameter(torch.cat([torch.zeros(before), weight, torch.zeros(after)]))
    make = optimizer or (lambda groups: fused_adamw(groups, settings(), wherever_they_lie=wherever_they_lie))
    adamw = make([{"params": [parameter], "weight_decay": 0.1}])
    for gradient in gradients:
        parameter.grad = torch.cat([torch.zeros(before), gradient, torch.zeros(after)])
        adamw.step()
    found = [parameter.detach(), *(adamw.state[parameter][name] for name in ("exp_avg", "exp_avg_sq"))]
    assert adamw.state[parameter]["step"] == STEPS
    return torch.stack(found)[:, before : before + len(weight)]


@pytest.mark.parametrize("n", [1, 7, 16, 73])
def test_equal_elements_get_equal_updates_wherever_they_lie(n):
    """Many values: the kernel's own last elements differ from the others in one of ten at most."""
    for seed in range(60):
        weight, gradients = values(n, seed)
        expected = updated(weight, gradients, 0, -n % 16)  # whole vectors
        for before, after in ((0, 0), (16, 0), (5, 0), (3, 40)):
            assert updated(weight, gradients, before, after).equal(expected), (seed, before, after)


def test_it_is_adamw():
    weight, gradients = values(73, 0)
    theirs = updated(
        weight.double(),
        [gradient.double() for gradient in gradients],
        0,
        0,
        optimizer=lambda groups: torch.optim.AdamW(
            groups, lr=1e-2, betas=settings().betas, eps=settings().eps, foreach=False
        ),
    )
    for wherever_they_lie in (True, False):
        found = updated(weight, gradients, 0, 0, wherever_they_lie=wherever_they_lie)
        torch.testing.assert_close(found.double(), theirs, rtol=1e-5, atol=1e-8)


def test_without_a_gradient_nothing_is_updated():
    parameter = torch.nn.Parameter(torch.ones(7))
    adamw = fused_adamw([{"params": [parameter]}], settings(), wherever_they_lie=True)
    adamw.step()
    assert parameter.equal(torch.ones(7))
