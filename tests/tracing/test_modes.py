"""A plan holds in training and in evaluation, where the model's code asks for its mode."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import enorm_fx
from enorm_fx.tracing.modes import asks_for_mode

X = torch.randn(2, 3, generator=torch.Generator().manual_seed(0))


class Auxiliary(nn.Module):
    """A second head that reads a hidden layer while training."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.a, self.b, self.c = nn.Linear(3, 4), nn.Linear(4, 5), nn.Linear(5, 2)
        self.aux = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        hidden = F.relu(self.a(x))
        result = self.c(F.relu(self.b(hidden)))
        return (result, self.aux(hidden), hidden[:, :1]) if self.training else (result,)


class Unready(Auxiliary):
    """It cannot run while training."""

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        if self.training:
            raise ValueError("targets are missing")
        return super().forward(x)


@pytest.mark.parametrize("analyzed", [True, False])
@pytest.mark.parametrize("used", [True, False])
def test_a_plan_made_in_one_mode_is_sound_in_the_other(analyzed: bool, used: bool) -> None:
    model = Auxiliary().train(analyzed)
    plan = enorm_fx.analyze(model, X)
    model.train(used)
    assert plan.num_scales == 3 + 5  # the first channel of the hidden layer leaves the model
    assert enorm_fx.verify(plan, X).largest_change < 1e-12


def test_one_mode_alone_would_not_be_sound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("enorm_fx.tracing.modes.asks_for_mode", lambda model: False)
    model = Auxiliary().eval()
    plan = enorm_fx.analyze(model, X)
    model.train()
    assert enorm_fx.verify(plan, X).largest_change > 1e-3


def test_every_module_is_left_in_its_own_mode() -> None:
    model = Auxiliary().train()
    model.b.eval()
    enorm_fx.analyze(model, X)
    assert [m.training for m in model.modules()] == [True, True, False, True, True]


def test_the_graph_shows_the_mode_that_the_model_is_in() -> None:
    shown = [len(enorm_fx.analyze(Auxiliary().train(mode), X).graph) for mode in (True, False)]
    assert shown[0] > shown[1]


def test_scales_of_the_other_mode_alone_do_not_count() -> None:
    model = Auxiliary().eval()
    model.aux = nn.Sequential(nn.Linear(4, 7), nn.ReLU(), nn.Linear(7, 2))  # type: ignore[assignment]
    assert enorm_fx.analyze(model, X).num_scales == 3 + 5
    assert enorm_fx.analyze(model.train(), X).num_scales == 3 + 5 + 7


def test_a_mode_that_cannot_be_traced_is_noted() -> None:
    plan = enorm_fx.analyze(Unready().eval(), X)
    assert plan.num_scales == 4 + 5
    [note] = plan.notes
    assert "evaluation mode only" in note
    assert "targets are missing" in note


class Dropping(nn.Module):
    """It passes its mode on to torch, whose rules hold in both."""

    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(x, 0.5, training=self.training)


def test_only_code_that_is_not_torchs_asks() -> None:
    assert not asks_for_mode(Dropping())
    assert asks_for_mode(Auxiliary())
    assert not asks_for_mode(nn.Sequential(nn.Linear(2, 2), nn.Dropout(), nn.BatchNorm1d(2)))
