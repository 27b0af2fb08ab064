"""The order "alternating": a call moves one color, and colors take turns by the count of calls."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import enorm_fx
from enorm_fx.enorm import ENorm
from enorm_fx.errors import NonFiniteError
from enorm_fx.step.layout import alternating_turns
from enorm_fx.step.measure import objective
from tests.support import slow_reference as slow
from tests.support.helpers import (
    BACKENDS,
    KINDS,
    buffers,
    largest_error,
    make,
    same_bits,
    trained,
    weights,
)
from tests.support.plans import Case


def stepped(case: Case, calls: int, **settings: object) -> ENorm:
    settings = {"last_layer": True, "start": "as_is", "order": "alternating", **settings}
    enorm = ENorm(case.plan, **settings)  # type: ignore[arg-type]
    for _ in range(calls):
        enorm.step()
    return enorm


@pytest.mark.parametrize(("p", "calls", "cycles"), [(2, 4, 1), (math.inf, 2, 2), (1, 1, 4)])
@pytest.mark.parametrize("kind", KINDS)
def test_a_turn_is_one_color_of_the_definition(
    kind: str, p: float, calls: int, cycles: int
) -> None:
    expected = slow.apply(
        make(kind, seed=3).plan, slow.descend(make(kind, seed=3).plan, p, 1.2, "alternating", 4)
    )
    for backend in BACKENDS:
        case = make(kind, seed=3)
        enorm = stepped(case, calls, p=p, c=1.2, cycles=cycles, backend=backend)
        assert enorm.backend == backend
        assert largest_error(weights(case.model), expected) < 1e-12


def test_the_comparison_notices_another_order() -> None:
    for order in ("sequential", "colored"):
        case = make("residual", seed=3)
        expected = slow.apply(case.plan, slow.descend(case.plan, 2, 1.2, order, 1))
        stepped(case, 1, c=1.2)
        assert largest_error(weights(case.model), expected) > 1e-3


@pytest.mark.parametrize("kind", KINDS)
def test_it_reaches_the_optimum_of_every_other_order(kind: str) -> None:
    case, best = make(kind, seed=4), make(kind, seed=4)
    enorm_fx.balance(best.plan)
    stepped(case, 150, cycles=2, backend=BACKENDS[-1])
    assert objective(case.plan) == pytest.approx(objective(best.plan), rel=1e-9)
    assert largest_error(weights(case.model), weights(best.model)) < 1e-3


def test_groups_of_a_turn_share_no_weight_and_all_have_theirs() -> None:
    for kind in KINDS:
        plan = make(kind).plan
        turns = alternating_turns(plan, plan.groups)
        assert sorted(g.start for turn in turns for g in turn) == [g.start for g in plan.groups]
        for turn in turns:
            read = [
                {
                    s.name
                    for s in plan.parameters
                    if s.counted
                    for t in s.terms
                    if ((t.index >= g.start) & (t.index < g.start + g.channels)).any()
                }
                for g in turn
            ]
            assert sum(map(len, read)) == len(set().union(*read))
    assert len(alternating_turns(make("chain-linear").plan, make("chain-linear").plan.groups)) == 2


def _train(case: Case, optimizer: torch.optim.Optimizer, enorm: ENorm, steps: int) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        F.mse_loss(case.model(case.inputs), torch.ones(4, 2).double()).backward()
        optimizer.step()
        enorm.step()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("every", [1, 2])
def test_a_resumed_run_takes_up_the_turn(every: int, backend: str) -> None:
    def made() -> tuple[Case, torch.optim.SGD, ENorm]:
        case = make("residual", seed=5)
        optimizer = torch.optim.SGD(case.model.parameters(), lr=1e-4, momentum=0.9)
        enorm = ENorm(case.plan, optimizer, order="alternating", every=every, backend=backend)
        return case, optimizer, enorm

    case, optimizer, enorm = made()
    _train(case, optimizer, enorm, 3)
    resumed = made()
    resumed[0].model.load_state_dict(case.model.state_dict())
    resumed[1].load_state_dict(copy.deepcopy(optimizer.state_dict()))
    resumed[2].load_state_dict(enorm.state_dict())
    _train(case, optimizer, enorm, 4)
    _train(*resumed, 4)
    assert same_bits(weights(resumed[0].model), weights(case.model))
    assert same_bits(buffers(resumed[1]), buffers(optimizer))
    assert resumed[2].state_dict() == enorm.state_dict()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_refused_turn_is_made_later(backend: str) -> None:
    case = make("residual", seed=3)
    optimizer = trained(case)
    enorm = ENorm(
        case.plan, optimizer, order="alternating", backend=backend, last_layer=True, start="as_is"
    )
    weight = case.model.get_parameter("up1.weight")
    good = weight.detach().clone()
    with torch.no_grad():
        weight[0, 0] = torch.nan
    old, old_buffers, state = weights(case.model), buffers(optimizer), enorm.state_dict()
    for _ in range(2):
        with pytest.raises(NonFiniteError, match=r"'up1\.weight' has 1 entries"):
            enorm.step()
        assert same_bits(weights(case.model), old)
        assert same_bits(buffers(optimizer), old_buffers)
        assert enorm.state_dict() == state
    with torch.no_grad():
        weight.copy_(good)
    expected = slow.apply(case.plan, slow.descend(case.plan, 2, 1.0, "alternating", 1))
    enorm.step()
    assert largest_error(weights(case.model), expected) < 1e-12


def test_a_plan_with_nothing_to_move() -> None:
    model = nn.Sequential(nn.Linear(2, 2))
    enorm = ENorm(model, order="alternating")
    old = weights(model)
    for _ in range(3):
        enorm.step()
    assert same_bits(weights(model), old)
    assert "alternating" in enorm.state_dict().values()
