"""How training starts, and steps that go to the optimum: the same network, at its optimum, once."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from enorm_fx import ENorm, analyze, balance
from enorm_fx.errors import ArgumentError, NonFiniteError, OptimizerStateError, PlanError
from enorm_fx.model_plan import Plan
from tests.support.helpers import (
    buffers,
    largest_error,
    make,
    outputs,
    random_scales,
    same_bits,
    trained,
    weights,
)

SETTINGS: list[dict[str, Any]] = [{}, {"p": 1, "c": 1.3}, {"p": math.inf}, {"exact": True}]


def badly_scaled(seed: int = 0) -> tuple[nn.Sequential, Plan]:
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3)
    ).double()
    plan = analyze(model, torch.zeros(2, 4, dtype=torch.float64))
    plan.rescale_(random_scales(plan, seed=seed, size=2.0))
    return model, plan


def backward(model: nn.Module, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(8, 4, generator=generator, dtype=torch.float64)
    model.zero_grad()
    F.mse_loss(model(inputs), torch.ones(8, 3, dtype=torch.float64)).backward()


def sgd(model: nn.Module, lr: float = 0.01) -> torch.optim.SGD:
    return torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)


def eager(plan: Plan, optimizer: torch.optim.Optimizer | None = None, **settings: Any) -> ENorm:
    """Without a compiler: what a step's backend is does not matter here."""
    return ENorm(plan, optimizer, **{"backend": "eager", "last_layer": True, **settings})


# ---- the start ----


def test_the_first_step_is_that_of_the_balanced_network() -> None:
    """Balanced before: what `balance` and then a backward pass would have given."""
    model, plan = badly_scaled()
    reference, other = badly_scaled()
    balance(other)
    first, second = sgd(model), sgd(reference)
    enorm = eager(plan, first)
    old = weights(model)
    assert same_bits(weights(model), old), "nothing moves before training"
    for parts in ((model, first), (reference, second)):
        backward(parts[0])
        parts[1].step()
    assert largest_error(weights(model), weights(reference)) < 1e-11
    enorm.step()
    assert not first._optimizer_step_pre_hooks, "no hook is left"


def test_it_saves_a_run_that_would_diverge_and_as_is_does_not() -> None:
    ends = {}
    for start in ("balanced", "as_is"):
        model, plan = badly_scaled(seed=2)
        optimizer = sgd(model, lr=0.05)
        enorm = eager(plan, optimizer, start=start)
        worst = 0.0
        for step in range(10):
            backward(model, seed=step)
            optimizer.step()
            worst = max(worst, max(float(p.detach().abs().max()) for p in model.parameters()))
            if not math.isfinite(worst):
                break
            enorm.step()
        ends[start] = worst
    assert ends["balanced"] < 10 < ends["as_is"]


@pytest.mark.parametrize(
    ("settings", "last_layer"), [*((s, True) for s in SETTINGS), ({}, False), ({"c": 1.3}, False)]
)
def test_it_goes_where_steps_go_and_keeps_the_function(
    settings: dict[str, Any], last_layer: bool
) -> None:
    case = make("residual", seed=1)
    before, old = outputs(case), weights(case.model)
    enorm = eager(case.plan, last_layer=last_layer, **settings)
    enorm.step()
    reached = weights(case.model)
    assert largest_error(reached, old) > 1e-2
    assert torch.allclose(outputs(case), before, rtol=1e-9, atol=1e-12)
    if settings.get("exact"):
        assert torch.equal(outputs(case), before)
    else:
        enorm.step()
        assert largest_error(weights(case.model), reached) < 1e-8


def test_buffers_and_gradients_follow() -> None:
    case = make("residual", seed=1)
    optimizer = trained(case)
    old, old_buffers = weights(case.model), buffers(optimizer)
    grads = {n: p.grad.clone() for n, p in case.model.named_parameters()}
    eager(case.plan, optimizer)._start_(gradients=True)
    names = [n for n, p in case.model.named_parameters() if p in optimizer.state]
    for (key, buffer), name in zip(buffers(optimizer).items(), names, strict=True):
        new = case.model.get_parameter(name)
        assert torch.allclose(buffer * new, old_buffers[key] * old[name], rtol=1e-12, atol=0)
        assert torch.allclose(new.grad * new, grads[name] * old[name], rtol=1e-12, atol=0)
    assert largest_error(weights(case.model), old) > 1e-2


def test_all_or_nothing() -> None:
    model, plan = badly_scaled()
    optimizer = sgd(model)
    enorm = eager(plan, optimizer)
    backward(model)
    last = model[4].weight
    optimizer.state[last]["shadow"] = torch.ones_like(last)
    old, state = weights(model), enorm.state_dict()
    grads = {n: p.grad.clone() for n, p in model.named_parameters()}
    with pytest.raises(OptimizerStateError, match="shadow"):
        optimizer.step()
    optimizer.state[last].clear()
    with torch.no_grad():
        model[4].weight[0, 0] = math.nan
    with pytest.raises(NonFiniteError, match=r"'4\.weight' has 1 entries"):
        optimizer.step()
    with torch.no_grad():
        model[4].weight[0, 0] = old["4.weight"][0, 0]
    assert same_bits(weights(model), old)
    assert same_bits({n: p.grad for n, p in model.named_parameters()}, grads)
    assert enorm.state_dict() == state == {**state, "calls": 0, "started": False}
    optimizer.step()
    assert enorm.state_dict()["started"]
    model.add_module("late", nn.Linear(3, 3))
    with pytest.raises(PlanError, match="late"):
        enorm.step()


def test_a_plan_that_is_not_exact_starts_as_it_is() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(2, 4, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 1)
    ).double()
    inputs = torch.randn(4, 2, 3, 3, dtype=torch.float64)
    plan = analyze(model, inputs)
    assert not plan.exact
    optimizer = sgd(model)
    enorm = eager(plan, optimizer)
    assert enorm.state_dict()["started"]
    assert not optimizer._optimizer_step_pre_hooks
    affine = eager(analyze(model, inputs, batchnorm="affine"), optimizer)
    assert not affine.state_dict()["started"]


def test_an_enorm_that_nobody_holds_starts_nothing() -> None:
    model, plan = badly_scaled()
    optimizer = sgd(model, lr=0.0)
    eager(plan, optimizer)
    assert not optimizer._optimizer_step_pre_hooks
    enorm = eager(plan, optimizer).attach()
    enorm.detach()
    old = weights(model)
    backward(model)
    optimizer.step()
    assert same_bits(weights(model), old)
    enorm.attach()
    optimizer.step()
    assert largest_error(weights(model), old) > 1e-2


# ---- resumed ----


def _run(resume: str, attached: bool, **settings: Any) -> dict[str, Tensor]:
    """Four steps, interrupted after two: everything saved, all made anew, loaded in some order."""

    def fresh() -> tuple[nn.Module, torch.optim.Optimizer, Callable[[], ENorm]]:
        model, plan = badly_scaled()
        optimizer = sgd(model)

        def make_enorm() -> ENorm:
            enorm = eager(plan, optimizer, **settings)
            return enorm.attach() if attached else enorm

        return model, optimizer, make_enorm

    def steps(model: nn.Module, optimizer: torch.optim.Optimizer, enorm: ENorm, at: int) -> None:
        for step in (at, at + 1):
            backward(model, seed=step)
            optimizer.step()
            if not attached:
                enorm.step()

    model, optimizer, make_enorm = fresh()
    enorm = make_enorm()
    steps(model, optimizer, enorm, 0)
    if resume:
        saved = copy.deepcopy((model.state_dict(), optimizer.state_dict(), enorm.state_dict()))
        model, optimizer, make_enorm = fresh()
        enorm = make_enorm() if resume == "made first" else None
        model.load_state_dict(saved[0])
        optimizer.load_state_dict(saved[1])
        enorm = enorm or make_enorm()
        enorm.load_state_dict(saved[2])
        assert not optimizer._optimizer_step_pre_hooks
    steps(model, optimizer, enorm, 2)
    return {**weights(model), **buffers(optimizer)}


@pytest.mark.parametrize(
    ("resume", "attached", "settings"),
    [
        ("made first", False, {}),
        ("made last", False, {}),
        ("made last", True, {}),
        ("made last", True, {"converge": True}),
    ],
)
def test_a_resumed_run_goes_on_bit_for_bit(
    resume: str, attached: bool, settings: dict[str, Any]
) -> None:
    assert same_bits(_run(resume, attached, **settings), _run("", attached, **settings))


def test_a_state_saved_before_training_starts_when_it_is_loaded() -> None:
    model, plan = badly_scaled()
    optimizer = sgd(model, lr=0.0)
    state = eager(plan, optimizer).state_dict()
    assert not state["started"]
    enorm = eager(plan, optimizer, start="as_is")
    enorm.load_state_dict(state)
    old = weights(model)
    optimizer.step()
    assert largest_error(weights(model), old) > 1e-2
    with pytest.raises(ArgumentError, match="started must be True or False"):
        enorm.load_state_dict({**state, "started": 1})


# ---- steps that converge ----


@pytest.mark.parametrize(
    ("kind", "settings"),
    [("residual", {}), ("gated", {}), ("residual", {"p": 1, "c": 1.3}), ("gated", {"p": math.inf})],
)
def test_a_converging_step_ends_at_the_optimum_and_buffers_follow(
    kind: str, settings: dict[str, Any]
) -> None:
    case, other = make(kind, seed=1), make(kind, seed=1)
    optimizer = trained(case)
    trained(other)
    before, old, old_buffers = outputs(case), weights(case.model), buffers(optimizer)
    enorm = eager(case.plan, optimizer, start="as_is", converge=True, **settings)
    enorm.step()
    assert torch.allclose(outputs(case), before, rtol=1e-9, atol=1e-12)
    balance(other.plan, **settings)
    assert largest_error(weights(case.model), weights(other.model)) < 1e-5
    names = [n for n, p in case.model.named_parameters() if p in optimizer.state]
    for (key, buffer), name in zip(buffers(optimizer).items(), names, strict=True):
        new = case.model.get_parameter(name)
        assert torch.allclose(buffer * new, old_buffers[key] * old[name], rtol=1e-12, atol=0)


def test_a_single_cycle_does_not_end_there() -> None:
    case, other = make("residual", seed=1), make("residual", seed=1)
    eager(case.plan, start="as_is").step()
    balance(other.plan)
    assert largest_error(weights(case.model), weights(other.model)) > 1e-2


@pytest.mark.parametrize("settings", [{"cycles": 3}, {"order": "simultaneous"}])
def test_cycles_and_order_do_not_matter_to_where_it_ends(settings: dict[str, Any]) -> None:
    case, other = make("residual", seed=1), make("residual", seed=1)
    eager(case.plan, start="as_is", converge=True, **settings).step()
    eager(other.plan, start="as_is", converge=True).step()
    assert same_bits(weights(case.model), weights(other.model))


def test_exact_and_every_hold_for_converging_steps() -> None:
    case = make("residual", seed=1)
    before, old = outputs(case), weights(case.model)
    enorm = eager(case.plan, start="as_is", converge=True, exact=True, every=2)
    enorm.step()
    assert same_bits(weights(case.model), old)
    enorm.step()
    assert torch.equal(outputs(case), before)
    assert largest_error(weights(case.model), old) > 1e-2
    factors = (weights(case.model)["embed.weight"] / old["embed.weight"]).log2()
    assert torch.equal(factors, factors.round())


def test_a_converging_step_is_all_or_nothing_and_says_what_runs() -> None:
    model, plan = badly_scaled()
    enorm = eager(plan, start="as_is", converge=True)
    assert enorm.backend == "eager"
    assert "converge_" in enorm.code
    with torch.no_grad():
        model[2].weight[0, 0] = math.inf
    old = weights(model)
    with pytest.raises(NonFiniteError, match=r"'2\.weight'"):
        enorm.step()
    assert same_bits(weights(model), old)
    model.add_module("late", nn.Linear(3, 3))
    with pytest.raises(PlanError, match="late"):
        enorm.step()


def test_a_backend_that_cannot_converge_is_refused() -> None:
    _, plan = badly_scaled()
    with pytest.raises(ArgumentError, match=r"not by backend='native'"):
        eager(plan, converge=True, backend="native")
    enorm = eager(plan, backend="native")
    state = enorm.state_dict()
    with pytest.raises(ArgumentError, match=r"not by backend='native'"):
        enorm.load_state_dict({**state, "converge": True})
    assert enorm.state_dict() == state
