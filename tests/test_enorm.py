"""ENorm around a step: optimizer state, refusals, models that change, its own state."""

from __future__ import annotations

import copy
import math
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from enorm_fx import analyze
from enorm_fx.enorm import ENorm
from enorm_fx.errors import ArgumentError, NonFiniteError, OptimizerStateError, PlanError
from enorm_fx.step.apply import rescale_
from tests.support import slow_reference as slow
from tests.support.helpers import (
    ORDERS,
    buffers,
    largest_error,
    make,
    random_scales,
    same_bits,
    trained,
    weights,
)
from tests.support.plans import Case, residual

# ---- optimizer state ----


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(
    "settings",
    [{}, {"nesterov": True}, {"dampening": 0.3}, {"momentum": 0.0}, {"weight_decay": 0.1}],
)
def test_momentum_takes_the_inverse_factor(settings: dict[str, Any], order: str) -> None:
    case = make("residual", seed=1)
    optimizer = trained(case, **settings)
    old = weights(case.model)
    old_buffers = {
        n: optimizer.state[p].get("momentum_buffer") for n, p in case.model.named_parameters()
    }
    old_buffers = {n: b.clone() for n, b in old_buffers.items() if b is not None}
    assert bool(old_buffers) == (settings.get("momentum", 0.9) > 0)
    ENorm(case.plan, optimizer, order=order, last_layer=True, start="as_is").step()
    new = weights(case.model)
    assert largest_error(new, old) > 1e-2
    for name, before in old_buffers.items():
        buffer = optimizer.state[case.model.get_parameter(name)]["momentum_buffer"]
        product = before * old[name]
        assert torch.allclose(buffer * new[name], product, rtol=1e-13, atol=0)


def test_adam_takes_both_powers() -> None:
    case = make("gated", seed=1)
    optimizer = torch.optim.Adam(case.model.parameters(), lr=1e-6)
    case.model(case.inputs).square().mean().backward()
    optimizer.step()
    old = weights(case.model)
    states = {n: copy.deepcopy(optimizer.state[p]) for n, p in case.model.named_parameters()}
    ENorm(case.plan, optimizer, last_layer=True, start="as_is").step()
    for name, weight in weights(case.model).items():
        factor, state = weight / old[name], optimizer.state[case.model.get_parameter(name)]
        for key, power in {"exp_avg": -1, "exp_avg_sq": -2}.items():
            expected = states[name][key] * factor**power
            assert torch.allclose(state[key], expected, rtol=1e-12, atol=0)
        assert state["step"] == 1


def test_a_step_before_the_optimizers_first_step() -> None:
    case = make("residual")
    optimizer = torch.optim.SGD(case.model.parameters(), lr=0.1, momentum=0.9)
    old = weights(case.model)
    ENorm(case.plan, optimizer, start="as_is").step()
    assert not optimizer.state
    assert not same_bits(weights(case.model), old)


def test_step_leaves_spent_gradients_alone() -> None:
    case = make("residual", seed=1)
    optimizer = trained(case)
    old = {n: p.grad.clone() for n, p in case.model.named_parameters()}
    ENorm(case.plan, optimizer, start="as_is").step()
    assert same_bits({n: p.grad for n, p in case.model.named_parameters()}, old)


def test_an_optimizer_of_another_model_is_refused_and_one_of_a_part_is_not() -> None:
    case, other = make("residual"), make("residual")
    with pytest.raises(ArgumentError, match="holds none of the 11 parameters"):
        ENorm(case.plan, torch.optim.SGD(other.model.parameters(), lr=0.1), start="as_is")
    with pytest.raises(ArgumentError, match=r"torch.optim.Optimizer, not str"):
        ENorm(case.plan, "SGD", start="as_is")  # type: ignore[arg-type]
    part = torch.optim.SGD([case.model.get_parameter("embed.weight")], lr=0.1, momentum=0.9)
    case.model(case.inputs).sum().backward()
    part.step()
    old = weights(case.model)
    ENorm(case.plan, part, start="as_is").step()
    assert not same_bits(weights(case.model), old)


# ---- all or nothing ----


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", ["embed.weight", "up1.weight", "down0.bias"])
@pytest.mark.parametrize("order", ORDERS)
def test_a_weight_that_is_not_finite_stops_everything(name: str, value: float, order: str) -> None:
    case = make("residual", seed=1)
    optimizer = trained(case)
    enorm = ENorm(case.plan, optimizer, order=order, last_layer=True, start="as_is")
    with torch.no_grad():
        case.model.get_parameter(name).view(-1)[1] = value
    old, old_buffers, state = weights(case.model), buffers(optimizer), enorm.state_dict()
    with pytest.raises(NonFiniteError, match=f"'{name}' has 1 entries that are not finite"):
        enorm.step()
    assert same_bits(weights(case.model), old)
    assert same_bits(buffers(optimizer), old_buffers)
    assert enorm.state_dict() == state


def test_the_diagonal_that_nothing_moves_may_not_be_nan_either() -> None:
    case = make("linear-residual")
    with torch.no_grad():
        case.model.get_parameter("mix.weight")[2, 2] = math.nan
    with pytest.raises(NonFiniteError, match=r"'mix.weight'"):
        ENorm(case.plan, last_layer=True, start="as_is").step()


def test_a_sum_that_overflows_says_so() -> None:
    case = make("chain-linear")
    case.model.float()
    with torch.no_grad():
        case.model.get_parameter("layer_01.weight")[0, 0] = 1e30
    with pytest.raises(
        NonFiniteError, match=r"'layer_01.weight' is finite, but the sum of \|w\|\^2"
    ):
        ENorm(case.plan, last_layer=True, start="as_is").step()


def test_an_unknown_buffer_stops_everything() -> None:
    case = make("residual", seed=1)
    optimizer = trained(case)
    last = case.model.get_parameter("head.weight")
    optimizer.state[last]["shadow"] = torch.ones_like(last)
    enorm = ENorm(case.plan, optimizer, last_layer=True, start="as_is")
    old, old_buffers = weights(case.model), buffers(optimizer)
    with pytest.raises(OptimizerStateError, match=r"SGD keeps the buffer 'shadow'.*'head.weight'"):
        enorm.step()
    assert same_bits(weights(case.model), old)
    assert same_bits(buffers(optimizer), old_buffers)
    ENorm(case.plan, optimizer, last_layer=True, buffers={"shadow": 1}, start="as_is").step()
    factor = weights(case.model)["head.weight"] / old["head.weight"]
    assert torch.allclose(optimizer.state[last]["shadow"], factor, rtol=1e-12, atol=0)


# ---- models that change ----


def test_replaced_and_cast_parameters_are_found_again() -> None:
    case = make("chain-linear", seed=3)
    enorm = ENorm(case.plan, last_layer=True, start="as_is")
    enorm.step()
    layer = case.model.get_submodule("layer_01")
    layer.weight = nn.Parameter(3 * layer.weight.detach())
    case.model.float()
    expected = slow.apply(case.plan, slow.descend(case.plan, 2, 1.0, "sequential", 1))
    enorm.step()
    assert largest_error(weights(case.model), expected) < 1e-6


def test_another_shape_or_a_missing_parameter_is_an_error() -> None:
    case = make("chain-linear")
    enorm = ENorm(case.plan, last_layer=True, start="as_is")
    enorm.step()
    layer = case.model.get_submodule("layer_02")
    old = weights(case.model)
    layer.weight = nn.Parameter(torch.ones(6, 9, dtype=torch.float64))
    with pytest.raises(PlanError, match=r"'layer_02.weight' has shape \(6, 9\) and had \(9, 7\)"):
        enorm.step()
    del layer.weight
    with pytest.raises(PlanError, match=r"no parameter 'layer_02.weight'"):
        enorm.step()
    kept = {n: w for n, w in old.items() if n != "layer_02.weight"}
    assert same_bits(weights(case.model), kept)


def test_weights_without_data_are_an_error() -> None:
    case = make("chain-linear")
    enorm = ENorm(case.plan, last_layer=True, start="as_is")
    case.model.to("meta")
    with pytest.raises(PlanError, match="on meta"):
        enorm.step()


# ---- the class ----


def test_attach_runs_after_every_optimizer_step_until_detached() -> None:
    by_hand, attached = make("residual", seed=1), make("residual", seed=1)

    def train(case: Case, after: Callable[[], None], optimizer: torch.optim.Optimizer) -> None:
        for _ in range(4):
            optimizer.zero_grad()
            F.mse_loss(case.model(case.inputs), torch.ones(4, 2).double()).backward()
            optimizer.step()
            after()

    first = torch.optim.SGD(by_hand.model.parameters(), lr=1e-4, momentum=0.9)
    second = torch.optim.SGD(attached.model.parameters(), lr=1e-4, momentum=0.9)
    hand = ENorm(by_hand.plan, first, start="as_is")
    enorm = ENorm(attached.plan, second, start="as_is")
    assert enorm.attach() is enorm
    enorm.attach()  # a second time changes nothing
    train(by_hand, hand.step, first)
    train(attached, lambda: None, second)
    assert same_bits(weights(attached.model), weights(by_hand.model))
    assert enorm.state_dict()["calls"] == 4
    enorm.detach()
    enorm.detach()
    train(attached, lambda: None, second)
    assert enorm.state_dict()["calls"] == 4


def test_attach_needs_an_optimizer() -> None:
    with pytest.raises(ArgumentError, match="attach"):
        ENorm(make("residual").plan, start="as_is").attach()


def test_every_passes_over_calls() -> None:
    case, other = make("residual"), make("residual")
    enorm = ENorm(case.plan, every=3, last_layer=True, start="as_is")
    changed = []
    for _ in range(6):
        old = weights(case.model)
        enorm.step()
        changed.append(not same_bits(weights(case.model), old))
    assert changed == [False, False, True, False, False, True]
    ENorm(other.plan, cycles=2, last_layer=True, start="as_is").step()
    assert largest_error(weights(case.model), weights(other.model)) < 1e-12


def test_state_goes_round() -> None:
    case = make("residual")
    settings = {
        "c": 1.2, "p": 3, "cycles": 2, "every": 2, "order": "simultaneous",
        "last_layer": True, "exact": True, "start": "as_is", "converge": False,
    }  # fmt: skip
    first = ENorm(case.plan, **settings)  # type: ignore[arg-type]
    first.step()
    state = first.state_dict()
    assert state == {"calls": 1, "started": True, **settings}
    second = ENorm(case.plan, start="as_is")
    second.load_state_dict(state)
    assert second.state_dict() == state
    old = weights(case.model)
    second.step()
    assert not same_bits(weights(case.model), old)  # the second call of every=2
    with pytest.raises(ArgumentError, match="must have the keys"):
        second.load_state_dict({"calls": 1})
    with pytest.raises(ArgumentError, match="calls must be an integer >= 0, not -1"):
        second.load_state_dict({**state, "calls": -1})
    with pytest.raises(ArgumentError, match="p must be"):
        second.load_state_dict({**state, "p": 0})
    assert second.state_dict() == {**state, "calls": 2}


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("c", 0, "c must be a positive number, not 0"),
        ("c", math.nan, "c must be a positive number"),
        ("c", "1", "c must be a positive number, not '1'"),
        ("p", 0.5, r"p must be a number >= 1 or inf, not 0.5"),
        ("p", True, "p must be"),
        ("p", math.nan, "p must be"),
        ("cycles", 0, "cycles must be an integer >= 1, not 0"),
        ("every", 1.5, "every must be an integer >= 1, not 1.5"),
        ("order", "random", r"order must be one of .*'alternating'\), not 'random'"),
        ("last_layer", 1, "last_layer must be True or False, not 1"),
        ("exact", None, "exact must be True or False"),
        ("start", "late", r"start must be one of \('balanced', 'as_is'\), not 'late'"),
        ("converge", 1, "converge must be True or False, not 1"),
        ("backend", "cuda", r"backend must be one of \('auto', 'eager', 'native', .*not 'cuda'"),
        ("check", "never", r"check must be one of \('sync', 'async'\), not 'never'"),
    ],
)
def test_arguments_are_checked(name: str, value: Any, message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        ENorm(make("residual").plan, **{name: value})


def test_only_plans_and_models_are_taken() -> None:
    with pytest.raises(ArgumentError, match=r"a Plan or an nn.Module, not int"):
        ENorm(3)  # type: ignore[arg-type]


def test_a_long_training_run_stays_in_step_with_its_optimizer() -> None:
    """Undo every balancing with its inverse: what is left is the optimizer's own trajectory."""
    plain, balanced = residual(seed=2), residual(seed=2)
    first = torch.optim.SGD(plain.model.parameters(), lr=1e-3, momentum=0.9, nesterov=True)
    second = torch.optim.SGD(balanced.model.parameters(), lr=1e-3, momentum=0.9, nesterov=True)
    target = torch.ones(4, 2).double()
    for step in range(5):
        for case, optimizer in ((plain, first), (balanced, second)):
            optimizer.zero_grad()
            F.mse_loss(case.model(case.inputs), target).backward()
            optimizer.step()
        u = random_scales(balanced.plan, seed=step)
        rescale_(balanced.plan, u, second)
        assert largest_error(weights(balanced.model), weights(plain.model)) > 1e-2
        rescale_(balanced.plan, -u, second)
    assert largest_error(weights(balanced.model), weights(plain.model)) < 1e-9
    assert largest_error(buffers(second), buffers(first)) < 1e-9


def test_importing_it_loads_nothing_heavy() -> None:
    script = (
        "import sys, enorm_fx.enorm\nprint([m for m in ('rich', 'matplotlib') if m in sys.modules])"
    )
    result = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "[]"


def test_of_a_pipeline_each_stage_is_balanced_by_itself() -> None:
    """Weights of a stage that is elsewhere hold no data here: a group with them is refused."""

    def layers() -> nn.Sequential:
        return nn.Sequential(
            nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2)
        )

    with torch.device("meta"):
        whole, example = layers(), torch.randn(2, 4)
    plan = analyze(whole, example)
    stage = layers()[:3]
    whole[0], whole[2] = stage[0], stage[2]
    before = [p.detach().clone() for p in stage.parameters()]
    with pytest.raises(
        PlanError, match=r"'4\.weight' is torch\.float32 on meta.*analyze the stage"
    ):
        ENorm(plan, last_layer=True).step()
    assert all(map(torch.equal, stage.parameters(), before))
    own = analyze(stage, torch.randn(2, 4))
    assert own.num_scales == 8
    ENorm(own, last_layer=True).step()
    assert not torch.equal(stage[0].weight, before[0])
