"""Laws of one step: what it computes, what it keeps, what it refuses."""

from __future__ import annotations

import copy
import math
import subprocess
import sys
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import slow_reference as slow
from enorm_fx.enorm import ENorm
from enorm_fx.errors import ArgumentError, NonFiniteError, OptimizerStateError, PlanError
from enorm_fx.plan import Group, Plan, ScaledParameter, Term
from enorm_fx.step.apply import rescale_
from enorm_fx.step.measure import objective
from plans import Case, all_cases, chain, grouped, residual

KINDS = [case.name for case in all_cases()]
ORDERS = ("sequential", "simultaneous")


def make(kind: str, seed: int = 0) -> Case:
    return next(case for case in all_cases(seed) if case.name == kind)


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def outputs(case: Case) -> Tensor:
    with torch.no_grad():
        return case.model(case.inputs)


def random_scales(plan: Plan, seed: int = 1, size: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return size * torch.randn(plan.num_scales, generator=generator, dtype=torch.float64)


def largest_error(actual: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> float:
    """The largest relative difference of any entry; entries that are 0 must be 0 in both."""
    worst = 0.0
    for name, right in expected.items():
        difference = (actual[name].double() - right.double()).abs()
        worst = max(worst, float((difference / right.double().abs().clamp(min=1e-300)).max()))
    return worst


def same_bits(actual: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> bool:
    """Also for NaN, whose bits count like any other's."""
    return actual.keys() == expected.keys() and all(
        actual[k].contiguous().view(torch.uint8).equal(expected[k].contiguous().view(torch.uint8))
        for k in expected
    )


def trained(case: Case, **settings: Any) -> torch.optim.SGD:
    """SGD after three steps: it has buffers."""
    settings = {"lr": 1e-6, "momentum": 0.9, **settings}
    optimizer = torch.optim.SGD(case.model.parameters(), **settings)
    for _ in range(3):
        optimizer.zero_grad()
        case.model(case.inputs).square().mean().backward()
        optimizer.step()
    return optimizer


def buffers(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    state = list(optimizer.state.values())
    return {f"{i}.{k}": v.clone() for i, s in enumerate(state) for k, v in s.items()}


# ---- the helpers reject what is wrong ----


def test_the_error_measure_sees_one_entry() -> None:
    right = {"w": torch.ones(3, 4, dtype=torch.float64)}
    wrong = {"w": right["w"].clone()}
    wrong["w"][2, 1] += 1e-11
    assert largest_error(right, right) == 0
    assert largest_error(wrong, right) > 1e-12
    wrong["w"][2, 1] = math.nan
    assert not largest_error(wrong, right) == 0 or not same_bits(wrong, right)
    assert not same_bits(wrong, right)


def test_the_bitwise_comparison_sees_the_sign_of_zero() -> None:
    assert same_bits({"w": torch.tensor([0.0, math.nan])}, {"w": torch.tensor([0.0, math.nan])})
    assert not same_bits({"w": torch.tensor([-0.0])}, {"w": torch.tensor([0.0])})


def test_the_reference_descends_and_a_wrong_step_does_not() -> None:
    case = make("residual")
    u = slow.descend(case.plan, 2, 1.0, "sequential", 3)
    assert slow.cost(case.plan, 2, 1.0, u) < slow.cost(case.plan, 2, 1.0)
    assert slow.cost(case.plan, 2, 1.0, [-x for x in u]) > slow.cost(case.plan, 2, 1.0)
    assert largest_error(slow.apply(case.plan, [1.01 * x for x in u]), slow.apply(case.plan, u)) > 1e-6


# ---- the plans made by hand, and rescale_ ----


@pytest.mark.parametrize("kind", KINDS)
def test_any_rescaling_keeps_the_function(kind: str) -> None:
    case = make(kind)
    before, old = outputs(case), weights(case.model)
    assert float((before - before[:1]).abs().max()) > 1e-3  # it does depend on its input
    u = random_scales(case.plan)
    rescale_(case.plan, u)
    assert float((outputs(case) - before).abs().max() / before.abs().max()) < 1e-12
    assert not same_bits(weights(case.model), old)


@pytest.mark.parametrize("kind", KINDS)
def test_rescaling_does_what_the_terms_say(kind: str) -> None:
    case = make(kind)
    u = random_scales(case.plan)
    expected = slow.apply(case.plan, u.tolist())
    rescale_(case.plan, u)
    assert largest_error(weights(case.model), expected) < 1e-13


def test_a_wrong_plan_changes_the_function() -> None:
    case = make("residual")
    parameters = tuple(
        ScaledParameter(s.name, s.shape, s.terms[:1], s.counted, s.depth, s.last)
        for s in case.plan.parameters
    )
    wrong = copy.copy(case.plan)
    object.__setattr__(wrong, "parameters", parameters)
    before = outputs(case)
    rescale_(wrong, random_scales(wrong))
    assert float((outputs(case) - before).abs().max() / before.abs().max()) > 1e-2


@pytest.mark.parametrize(
    ("scales", "message"),
    [
        (torch.zeros(3), r"shape \(13,\), not \(3,\)"),
        (torch.zeros(13, dtype=torch.int64), "floating point"),
        ([0.0] * 13, "floating point"),
        (torch.full((13,), math.nan), "finite"),
        (torch.zeros(13, 1), "shape"),
    ],
)
def test_rescale_refuses_other_scales(scales: Any, message: str) -> None:
    case = make("residual")
    old = weights(case.model)
    with pytest.raises(ArgumentError, match=message):
        rescale_(case.plan, scales)
    assert same_bits(weights(case.model), old)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_factor_that_leaves_the_dtype_is_refused(dtype: torch.dtype) -> None:
    case = make("chain-linear")
    case.model.to(dtype)
    old = weights(case.model)
    with pytest.raises(NonFiniteError, match="factor leaves the range"):
        rescale_(case.plan, torch.full((case.plan.num_scales,), 800.0))
    assert same_bits(weights(case.model), old)


def test_a_half_precision_weight_that_would_overflow_is_refused() -> None:
    case = chain([3, 4, 2])
    case.model.half()
    old = weights(case.model)
    with pytest.raises(NonFiniteError, match=r"'layer_00.weight' would reach .* torch.float16"):
        rescale_(case.plan, torch.full((4,), 13.0))
    assert same_bits(weights(case.model), old)


def test_half_precision_is_rounded_once() -> None:
    case = make("chain-linear")
    case.model.bfloat16()
    u = random_scales(case.plan)
    expected = slow.apply(case.plan, u.tolist())
    rescale_(case.plan, u)
    # Half a unit in the last place of 8 bits, for each axis that has a factor.
    assert largest_error(weights(case.model), expected) < 2 * 2**-8


def test_gradients_in_grad_become_those_of_the_rescaled_network() -> None:
    case = make("gated")
    case.model(case.inputs).square().sum().backward()
    rescale_(case.plan, random_scales(case.plan))
    kept = {n: p.grad.clone() for n, p in case.model.named_parameters()}
    case.model.zero_grad()
    case.model(case.inputs).square().sum().backward()
    for name, parameter in case.model.named_parameters():
        assert torch.allclose(kept[name], parameter.grad, rtol=1e-9, atol=1e-12 * kept[name].abs().max())


def test_a_sparse_gradient_is_refused() -> None:
    case = make("chain-linear")
    weight = case.model.get_parameter("layer_00.weight")
    weight.grad = torch.zeros_like(weight).to_sparse()
    old = weights(case.model)
    with pytest.raises(PlanError, match="sparse"):
        rescale_(case.plan, random_scales(case.plan))
    assert same_bits(weights(case.model), old)


# ---- one step is the paper's cycle ----


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("p", [1, 2, 3, math.inf])
@pytest.mark.parametrize("kind", KINDS)
def test_a_step_is_what_the_definition_says(kind: str, p: float, order: str) -> None:
    case = make(kind, seed=int(p) if p < 10 else 5)
    c = 1.0 if p == 3 else 1.2
    expected = slow.apply(case.plan, slow.descend(case.plan, p, c, order, 2))
    ENorm(case.plan, p=p, c=c, order=order, cycles=2, last_layer=True).step()
    assert largest_error(weights(case.model), expected) < 1e-12


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_step_in_single_precision(kind: str, order: str) -> None:
    case = make(kind, seed=7)
    case.model.float()
    expected = slow.apply(case.plan, slow.descend(case.plan, 2, 1.2, order, 1))
    ENorm(case.plan, c=1.2, order=order, last_layer=True).step()
    assert largest_error(weights(case.model), expected) < 1e-6


@pytest.mark.parametrize("p", [1, 2, 10])
def test_no_power_of_small_weights_is_lost(p: float) -> None:
    case = make("residual", seed=7)
    case.model.float()
    with torch.no_grad():
        for parameter in case.model.parameters():
            parameter.mul_(1e-5)
    expected = slow.apply(case.plan, slow.descend(case.plan, p, 1.0, "sequential", 1))
    ENorm(case.plan, p=p, last_layer=True).step()
    assert largest_error(weights(case.model), expected) < 1e-6


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
def test_the_memory_layout_does_not_matter(layout: torch.memory_format) -> None:
    case = grouped(2, seed=3)
    expected = slow.apply(case.plan, slow.descend(case.plan, 2, 1.0, "sequential", 1))
    case.model.to(memory_format=layout)
    ENorm(case.plan, last_layer=True).step()
    assert largest_error(weights(case.model), expected) < 1e-12
    assert case.model.get_parameter("first.weight").is_contiguous(memory_format=layout)


def test_autocast_does_not_reach_the_solver() -> None:
    case = make("chain-linear", seed=3)
    case.model.float()
    expected = slow.apply(case.plan, slow.descend(case.plan, 2, 1.0, "sequential", 1))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ENorm(case.plan, last_layer=True).step()
    assert largest_error(weights(case.model), expected) < 1e-6


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("c", [1.0, 1.2])
@pytest.mark.parametrize("p", [1, 2, 3, math.inf])
@pytest.mark.parametrize("kind", KINDS)
def test_the_objective_falls_at_every_cycle(kind: str, p: float, c: float, exact: bool) -> None:
    case = make(kind, seed=4)
    rescale_(case.plan, random_scales(case.plan, size=2.0))
    enorm = ENorm(case.plan, p=p, c=c, exact=exact, last_layer=True)
    norms = [objective(case.plan, p, c)]
    for _ in range(8):
        enorm.step()
        norms.append(objective(case.plan, p, c))
    assert all(after <= before * (1 + 1e-13) for before, after in zip(norms, norms[1:], strict=False))
    if math.isfinite(p):
        assert norms[-1] < norms[0]


@pytest.mark.parametrize("p", [1, 2.5, math.inf])
def test_the_objective_is_the_definition(p: float) -> None:
    case = make("joined")
    assert objective(case.plan, p, 1.3) == pytest.approx(slow.cost(case.plan, p, 1.3), rel=1e-12)


def test_many_cycles_at_once_are_many_steps() -> None:
    one, many = make("residual", seed=5), make("residual", seed=5)
    ENorm(one.plan, cycles=6, last_layer=True).step()
    enorm = ENorm(many.plan, last_layer=True)
    for _ in range(6):
        enorm.step()
    assert largest_error(weights(one.model), weights(many.model)) < 1e-12


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_keeps_the_function(kind: str) -> None:
    case = make(kind, seed=2)
    before = outputs(case)
    ENorm(case.plan, last_layer=True).step()
    assert float((outputs(case) - before).abs().max() / before.abs().max()) < 1e-12


def test_the_last_layer_stays_unless_asked_for() -> None:
    case = make("chain-linear")
    old = weights(case.model)
    ENorm(case.plan).step()
    new = weights(case.model)
    last = case.plan.parameters[-2].name
    assert last == "layer_03.weight"
    assert same_bits({"w": new[last]}, {"w": old[last]})
    assert not same_bits({"w": new["layer_00.weight"]}, {"w": old["layer_00.weight"]})
    ENorm(case.plan, last_layer=True).step()
    assert not same_bits({"w": weights(case.model)[last]}, {"w": old[last]})


def test_a_plan_without_groups_changes_nothing() -> None:
    case = chain([3, 2])
    old = weights(case.model)
    ENorm(case.plan, last_layer=True).step()
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
        ENorm(case.plan, exact=True, last_layer=True, cycles=5).step()
        after = case.model(inputs)
    assert same_bits({"y": after}, {"y": before})
    factors = {n: (w.double() / old[n].double()) for n, w in weights(case.model).items()}
    exponents = torch.cat([f.log2().flatten() for f in factors.values()])
    assert bool((exponents == exponents.round()).all())
    assert float(exponents.abs().max()) >= 1


def test_exact_needs_whole_exponents() -> None:
    model = nn.Sequential(nn.Linear(2, 2))
    half = ScaledParameter(
        "0.weight", (2, 2), (Term(0.5, torch.tensor([[0], [1]])),), True, 1, False
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
        ENorm(plan, exact=True)


# ---- units that cannot be balanced ----


@pytest.mark.parametrize("value", [0.0, 1e-310])
@pytest.mark.parametrize("side", ["incoming", "outgoing"])
def test_a_dead_unit_keeps_its_scale(side: str, value: float) -> None:
    case = chain([3, 5, 4, 2])
    name = "layer_00.weight" if side == "incoming" else "layer_01.weight"
    with torch.no_grad():
        weight = case.model.get_parameter(name)
        weight[2] = value if side == "incoming" else weight[2]
        weight[:, 2] = weight[:, 2] if side == "incoming" else value
    old = weights(case.model)
    ENorm(case.plan, last_layer=True).step()
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
    ENorm(plan).step()
    assert same_bits(weights(case.model), old)


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
    ENorm(case.plan, optimizer, order=order, last_layer=True).step()
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
    ENorm(case.plan, optimizer, last_layer=True).step()
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
    ENorm(case.plan, optimizer).step()
    assert not optimizer.state
    assert not same_bits(weights(case.model), old)


def test_step_leaves_spent_gradients_alone() -> None:
    case = make("residual", seed=1)
    optimizer = trained(case)
    old = {n: p.grad.clone() for n, p in case.model.named_parameters()}
    ENorm(case.plan, optimizer).step()
    assert same_bits({n: p.grad for n, p in case.model.named_parameters()}, old)


def test_an_optimizer_of_another_model_is_refused_and_one_of_a_part_is_not() -> None:
    case, other = make("residual"), make("residual")
    with pytest.raises(ArgumentError, match="holds none of the 11 parameters"):
        ENorm(case.plan, torch.optim.SGD(other.model.parameters(), lr=0.1))
    with pytest.raises(ArgumentError, match=r"torch.optim.Optimizer, not str"):
        ENorm(case.plan, "SGD")  # type: ignore[arg-type]
    part = torch.optim.SGD([case.model.get_parameter("embed.weight")], lr=0.1, momentum=0.9)
    case.model(case.inputs).sum().backward()
    part.step()
    old = weights(case.model)
    ENorm(case.plan, part).step()
    assert not same_bits(weights(case.model), old)


# ---- all or nothing ----


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", ["embed.weight", "up1.weight", "down0.bias"])
@pytest.mark.parametrize("order", ORDERS)
def test_a_weight_that_is_not_finite_stops_everything(
    name: str, value: float, order: str
) -> None:
    case = make("residual", seed=1)
    optimizer = trained(case)
    enorm = ENorm(case.plan, optimizer, order=order, last_layer=True)
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
        ENorm(case.plan, last_layer=True).step()


def test_a_sum_that_overflows_says_so() -> None:
    case = make("chain-linear")
    case.model.float()
    with torch.no_grad():
        case.model.get_parameter("layer_01.weight")[0, 0] = 1e30
    with pytest.raises(NonFiniteError, match=r"'layer_01.weight' is finite, but the sum of \|w\|\^2"):
        ENorm(case.plan, last_layer=True).step()


def test_an_unknown_buffer_stops_everything() -> None:
    case = make("residual", seed=1)
    optimizer = trained(case)
    last = case.model.get_parameter("head.weight")
    optimizer.state[last]["shadow"] = torch.ones_like(last)
    enorm = ENorm(case.plan, optimizer, last_layer=True)
    old, old_buffers = weights(case.model), buffers(optimizer)
    with pytest.raises(OptimizerStateError, match=r"SGD keeps the buffer 'shadow'.*'head.weight'"):
        enorm.step()
    assert same_bits(weights(case.model), old)
    assert same_bits(buffers(optimizer), old_buffers)
    ENorm(case.plan, optimizer, last_layer=True, buffers={"shadow": 1}).step()
    factor = weights(case.model)["head.weight"] / old["head.weight"]
    assert torch.allclose(optimizer.state[last]["shadow"], factor, rtol=1e-12, atol=0)


# ---- models that change ----


def test_replaced_and_cast_parameters_are_found_again() -> None:
    case = make("chain-linear", seed=3)
    enorm = ENorm(case.plan, last_layer=True)
    enorm.step()
    layer = case.model.get_submodule("layer_01")
    layer.weight = nn.Parameter(3 * layer.weight.detach())
    case.model.float()
    expected = slow.apply(case.plan, slow.descend(case.plan, 2, 1.0, "sequential", 1))
    enorm.step()
    assert largest_error(weights(case.model), expected) < 1e-6


def test_another_shape_or_a_missing_parameter_is_an_error() -> None:
    case = make("chain-linear")
    enorm = ENorm(case.plan, last_layer=True)
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
    enorm = ENorm(case.plan, last_layer=True)
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
    hand = ENorm(by_hand.plan, first)
    enorm = ENorm(attached.plan, second)
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
        ENorm(make("residual").plan).attach()


def test_every_passes_over_calls() -> None:
    case, other = make("residual"), make("residual")
    enorm = ENorm(case.plan, every=3)
    changed = []
    for _ in range(6):
        old = weights(case.model)
        enorm.step()
        changed.append(not same_bits(weights(case.model), old))
    assert changed == [False, False, True, False, False, True]
    ENorm(other.plan, cycles=2).step()
    assert largest_error(weights(case.model), weights(other.model)) < 1e-12


def test_state_goes_round() -> None:
    case = make("residual")
    settings = {
        "c": 1.2, "p": 3, "cycles": 2, "every": 2, "order": "simultaneous",
        "last_layer": True, "exact": True,
    }  # fmt: skip
    first = ENorm(case.plan, **settings)  # type: ignore[arg-type]
    first.step()
    state = first.state_dict()
    assert state == {"calls": 1, **settings}
    second = ENorm(case.plan)
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
        ("order", "colored", r"order must be one of \('sequential', 'simultaneous'\)"),
        ("last_layer", 1, "last_layer must be True or False, not 1"),
        ("exact", None, "exact must be True or False"),
        ("backend", "cuda", r"backend must be one of \('auto', 'eager'\), not 'cuda'"),
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
        "import sys, enorm_fx.enorm\n"
        "print([m for m in ('networkx', 'rich', 'matplotlib') if m in sys.modules])"
    )
    result = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "[]"
