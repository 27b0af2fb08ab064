"""Laws of acceleration: slow modes end soon, and a bad prediction does no harm."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from enorm_fx import analyze, balance
from enorm_fx.step import converge
from enorm_fx.step.converge import Predictor


def grouped_chain(depth: int, width: int = 8, groups: int = 4) -> nn.Sequential:
    """Strands that meet in the first and in the last layer alone."""
    layers: list[nn.Module] = [nn.Conv2d(3, width, 1), nn.ReLU()]
    for _ in range(depth):
        layers += [nn.Conv2d(width, width, 1, groups=groups), nn.ReLU()]
    return nn.Sequential(*layers, nn.Conv2d(width, 2, 1)).double()


def test_strands_of_grouped_convolutions_need_few_cycles(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    plan = analyze(grouped_chain(12), torch.zeros(1, 3, 2, 2, dtype=torch.float64))
    u = 2 * torch.randn(plan.num_scales, dtype=torch.float64)
    plan.rescale_(u)
    report = balance(plan)
    assert report.gap <= 1e-13
    assert report.cycles <= 80
    plan.rescale_(u)
    monkeypatch.setattr(converge, "_PATIENCE", -1)  # no predictions
    monkeypatch.setattr(converge, "MAX_CYCLES", 3 * report.cycles)
    assert balance(plan).gap > 1e-8


def test_a_linear_iteration_ends_after_as_many_cycles_as_it_has_slow_modes() -> None:
    torch.manual_seed(0)
    rates = torch.tensor([0.99, 0.9, -0.8, 0.5, 0.0], dtype=torch.float64)
    turn = torch.linalg.qr(torch.randn(5, 5, dtype=torch.float64)).Q
    matrix, goal = turn @ torch.diag(rates) @ turn.T, torch.randn(5, dtype=torch.float64)
    predictor, u = Predictor(), goal + 0.1 * torch.randn(5, dtype=torch.float64)
    for _ in range(8):
        start = predictor.predict(u)
        u = goal + matrix @ (start - goal)
        predictor.learn(start, u)
    assert float((u - goal).abs().max()) < 1e-12


def test_what_grew_is_forgotten() -> None:
    predictor = Predictor()
    here, near, far = (torch.full((3,), x, dtype=torch.float64) for x in (0.0, 0.1, 0.5))
    predictor.learn(here, near)
    predictor.learn(near, 1.5 * near)
    assert torch.allclose(predictor.predict(1.5 * near), 2 * near)
    predictor.learn(here, far)
    assert torch.equal(predictor.predict(near), near)
    predictor.learn(here, torch.full((3,), math.nan, dtype=torch.float64))
    assert torch.equal(predictor.predict(near), near)


def test_no_prediction_is_made_from_cycles_far_away() -> None:
    predictor = Predictor()
    for _ in range(3):
        predictor.learn(torch.zeros(3), torch.full((3,), 1.5))
    u = torch.zeros(3)
    assert torch.equal(predictor.predict(u), u)
