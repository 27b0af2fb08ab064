"""Laws of one step: it is the cycle of the definition, and the objective falls."""

from __future__ import annotations

import copy
import itertools
import math

import pytest
import torch
from torch import nn

from enorm_fx.enorm import ENorm
from enorm_fx.errors import ArgumentError
from enorm_fx.plan.records import Group, ScaledParameter
from enorm_fx.step import measure
from enorm_fx.step.apply import rescale_
from enorm_fx.step.measure import objective
from enorm_fx.symmetry.solution import ScaleTerm
from tests.support import slow_reference as slow
from tests.support.helpers import (
    KINDS,
    ORDERS,
    largest_error,
    make,
    outputs,
    random_scales,
    same_bits,
    weights,
)
from tests.support.plans import chain, grouped, linear_residual

# ---- one step is the paper's cycle ----


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("p", [1, 2, 3, math.inf])
@pytest.mark.parametrize("kind", KINDS)
def test_a_step_is_what_the_definition_says(kind: str, p: float, order: str) -> None:
    case = make(kind, seed=int(p) if p < 10 else 5)
    c = 1.0 if p == 3 else 1.2
    expected = slow.apply(case.plan, slow.descend(case.plan, p, c, order, 2))
    ENorm(case.plan, p=p, c=c, order=order, cycles=2, last_layer=True, start="as_is").step()
    assert largest_error(weights(case.model), expected) < 1e-12


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_step_in_single_precision(kind: str, order: str) -> None:
    case = make(kind, seed=7)
    case.model.float()
    expected = slow.apply(case.plan, slow.descend(case.plan, 2, 1.2, order, 1))
    ENorm(case.plan, c=1.2, order=order, last_layer=True, start="as_is").step()
    assert largest_error(weights(case.model), expected) < 1e-6


@pytest.mark.parametrize("p", [1, 2, 10])
def test_no_power_of_small_weights_is_lost(p: float) -> None:
    case = make("residual", seed=7)
    case.model.float()
    with torch.no_grad():
        for parameter in case.model.parameters():
            parameter.mul_(1e-5)
    expected = slow.apply(case.plan, slow.descend(case.plan, p, 1.0, "sequential", 1))
    ENorm(case.plan, p=p, last_layer=True, start="as_is").step()
    assert largest_error(weights(case.model), expected) < 1e-6


@pytest.mark.parametrize("p", [1, 2, 3, math.inf])
@pytest.mark.parametrize("kind", ["chain-conv", "grouped-2", "flattened", "flattened-last"])
def test_the_chunks_of_a_reduction_do_not_matter(
    kind: str, p: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, cut = make(kind, seed=9), make(kind, seed=9)
    ENorm(whole.plan, p=p, last_layer=True, start="as_is").step()
    monkeypatch.setattr(measure, "_CHUNK", 25)
    ENorm(cut.plan, p=p, last_layer=True, start="as_is").step()
    assert largest_error(weights(cut.model), weights(whole.model)) < 1e-13


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
def test_the_memory_layout_does_not_matter(layout: torch.memory_format) -> None:
    case = grouped(2, seed=3)
    expected = slow.apply(case.plan, slow.descend(case.plan, 2, 1.0, "sequential", 1))
    case.model.to(memory_format=layout)
    ENorm(case.plan, last_layer=True, start="as_is").step()
    assert largest_error(weights(case.model), expected) < 1e-12
    assert case.model.get_parameter("first.weight").is_contiguous(memory_format=layout)


def test_autocast_does_not_reach_the_solver() -> None:
    case = make("chain-linear", seed=3)
    case.model.float()
    expected = slow.apply(case.plan, slow.descend(case.plan, 2, 1.0, "sequential", 1))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ENorm(case.plan, last_layer=True, start="as_is").step()
    assert largest_error(weights(case.model), expected) < 1e-6


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("c", [1.0, 1.2])
@pytest.mark.parametrize("p", [1, 2, 3, math.inf])
@pytest.mark.parametrize("kind", KINDS)
def test_the_objective_falls_at_every_cycle(kind: str, p: float, c: float, exact: bool) -> None:
    case = make(kind, seed=4)
    rescale_(case.plan, random_scales(case.plan, size=2.0))
    enorm = ENorm(case.plan, p=p, c=c, exact=exact, last_layer=True, start="as_is")
    norms = [objective(case.plan, p, c)]
    for _ in range(8):
        enorm.step()
        norms.append(objective(case.plan, p, c))
    assert all(after <= before * (1 + 1e-13) for before, after in itertools.pairwise(norms))
    if math.isfinite(p):
        assert norms[-1] < norms[0]


@pytest.mark.parametrize("kind", ["squared", "squared-direct"])
def test_powers_of_two_never_raise_an_objective_that_is_not_symmetric(kind: str) -> None:
    moved = 0
    for seed in range(40):
        case = make(kind, seed)
        before, old = objective(case.plan), weights(case.model)
        ENorm(case.plan, exact=True, last_layer=True, start="as_is").step()
        assert objective(case.plan) <= before * (1 + 1e-13)
        moved += not same_bits(weights(case.model), old)
    assert moved >= 10


def test_a_stream_of_one_channel_is_not_damped() -> None:
    """Its only diagonal entry is moved by nothing, so no two scales meet."""
    case = linear_residual(width=1, seed=3)
    expected = slow.apply(case.plan, slow.descend(case.plan, 2, 1.0, "sequential", 1))
    ENorm(case.plan, last_layer=True, start="as_is").step()
    assert largest_error(weights(case.model), expected) < 1e-12


@pytest.mark.parametrize("p", [1, 2.5, math.inf])
def test_the_objective_is_the_definition(p: float) -> None:
    case = make("joined")
    assert objective(case.plan, p, 1.3) == pytest.approx(slow.cost(case.plan, p, 1.3), rel=1e-12)


def test_many_cycles_at_once_are_many_steps() -> None:
    one, many = make("residual", seed=5), make("residual", seed=5)
    ENorm(one.plan, cycles=6, last_layer=True, start="as_is").step()
    enorm = ENorm(many.plan, last_layer=True, start="as_is")
    for _ in range(6):
        enorm.step()
    assert largest_error(weights(one.model), weights(many.model)) < 1e-12


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_keeps_the_function(kind: str) -> None:
    case = make(kind, seed=2)
    before = outputs(case)
    ENorm(case.plan, last_layer=True, start="as_is").step()
    assert float((outputs(case) - before).abs().max() / before.abs().max()) < 1e-12


def test_the_last_layer_stays_if_asked_for() -> None:
    case = make("chain-linear")
    old = weights(case.model)
    ENorm(case.plan, last_layer=False, start="as_is").step()
    new = weights(case.model)
    last = case.plan.parameters[-2].name
    assert last == "layer_03.weight"
    assert same_bits({"w": new[last]}, {"w": old[last]})
    assert not same_bits({"w": new["layer_00.weight"]}, {"w": old["layer_00.weight"]})
    ENorm(case.plan, start="as_is").step()
    assert not same_bits({"w": weights(case.model)[last]}, {"w": old[last]})


def test_a_plan_without_groups_changes_nothing() -> None:
    case = chain([3, 2])
    old = weights(case.model)
    ENorm(case.plan, last_layer=True, start="as_is").step()
    rescale_(case.plan, torch.zeros(0))
    assert same_bits(weights(case.model), old)


# ---- powers of two ----


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_exact_factors_keep_every_bit_of_the_output(dtype: torch.dtype) -> None:
    case = make("chain-conv", seed=6)
    case.model.to(dtype)
    inputs, old = case.inputs.to(dtype), weights(case.model)
    with torch.no_grad():
        before = case.model(inputs)
        ENorm(case.plan, exact=True, last_layer=True, cycles=5, start="as_is").step()
        after = case.model(inputs)
    assert same_bits({"y": after}, {"y": before})
    factors = {n: (w.double() / old[n].double()) for n, w in weights(case.model).items()}
    exponents = torch.cat([f.log2().flatten() for f in factors.values()])
    assert bool((exponents == exponents.round()).all())
    assert float(exponents.abs().max()) >= 1


def test_exact_needs_whole_exponents() -> None:
    model = nn.Sequential(nn.Linear(2, 2))
    half = ScaledParameter(
        "0.weight", (2, 2), (ScaleTerm(0.5, torch.tensor([[0], [1]])),), True, 1, False
    )
    plan = make("residual").plan
    plan = copy.copy(plan)
    for name, value in {
        "model": model,
        "parameters": (half,),
        "groups": (Group(2, (), (), (), 0),),
        "num_scales": 2,
    }.items():
        object.__setattr__(plan, name, value)
    with pytest.raises(ArgumentError, match=r"'0.weight' takes the power 0.5"):
        ENorm(plan, exact=True, start="as_is")


# ---- units that cannot be balanced ----


@pytest.mark.parametrize("p", [1, 2, 3, math.inf])
@pytest.mark.parametrize("value", [0.0, 1e-310])
@pytest.mark.parametrize("side", ["incoming", "outgoing"])
def test_a_dead_unit_keeps_its_scale(side: str, value: float, p: float) -> None:
    case = chain([3, 5, 4, 2])
    name = "layer_00.weight" if side == "incoming" else "layer_01.weight"
    with torch.no_grad():
        weight = case.model.get_parameter(name)
        weight[2] = value if side == "incoming" else weight[2]
        weight[:, 2] = weight[:, 2] if side == "incoming" else value
    old = weights(case.model)
    ENorm(case.plan, p=p, last_layer=True, start="as_is").step()
    ratio = (weights(case.model)["layer_00.bias"] / old["layer_00.bias"]).log()
    assert float(ratio[2]) == 0
    assert float(ratio[[0, 1, 3, 4]].abs().min()) > 1e-3
    assert all(bool(w.isfinite().all()) for w in weights(case.model).values())


def test_a_group_with_one_side_only_keeps_its_scale() -> None:
    case = make("flattened")
    parameters = tuple(
        ScaledParameter(s.name, s.shape, s.terms, s.counted and "head" not in s.name, 1, False)
        for s in case.plan.parameters
    )
    plan = copy.copy(case.plan)
    object.__setattr__(plan, "parameters", parameters)
    old = weights(case.model)
    ENorm(plan, start="as_is").step()
    assert same_bits(weights(case.model), old)
