"""Laws of the optimum: `balance` reaches it, everybody reaches the same one, and it is reported."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor, nn

from enorm_fx.balancing import Report, balance
from enorm_fx.enorm import ENorm
from enorm_fx.errors import ArgumentError, NonFiniteError
from enorm_fx.model_plan import Plan
from enorm_fx.step import coarse, converge
from enorm_fx.step.apply import rescale_
from enorm_fx.step.careful import CarefulStep
from enorm_fx.step.coarse import make_coarse, minimize, unbounded
from enorm_fx.step.descent import alive
from enorm_fx.step.measure import objective
from tests.support import slow_reference as slow
from tests.support.helpers import (
    KINDS,
    largest_error,
    make,
    outputs,
    random_scales,
    same_bits,
    weights,
)
from tests.support.plans import Case, all_cases, chain, residual


def relative_gradient(plan: Plan, p: float, c: float) -> float:
    """max |dJ/du| / J at the weights as they are, from the definition."""
    return max(map(abs, slow.gradient(plan, p, c))) / slow.cost(plan, p, c)


def norms(case: Case, p: float) -> list[float]:
    """The p-norm of every weight, in order."""
    return [
        float(torch.linalg.vector_norm(weight, p))
        for name, weight in weights(case.model).items()
        if name.endswith("weight")
    ]


# ---- the optimum ----


@pytest.mark.parametrize("c", [1.0, 1.2])
@pytest.mark.parametrize("p", [1, 2, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_the_gradient_vanishes(kind: str, p: float, c: float) -> None:
    case = make(kind, seed=4)
    assert relative_gradient(case.plan, p, c) > 1e-4
    report = balance(case.plan, p=p, c=c)
    assert relative_gradient(case.plan, p, c) < 1e-10
    assert 0 <= report.gap <= 1e-10
    assert report.norm_after < report.norm_before


def test_the_gradient_is_that_of_the_objective() -> None:
    case = make("gated")
    found, step = slow.gradient(case.plan, 2, 1.2), 1e-6
    for scale in range(case.plan.num_scales):
        u = [0.0] * case.plan.num_scales
        u[scale] = step
        up = slow.cost(case.plan, 2, 1.2, u)
        u[scale] = -step
        slope = (up - slow.cost(case.plan, 2, 1.2, u)) / (2 * step)
        assert found[scale] == pytest.approx(slope, rel=1e-4, abs=1e-3)


@pytest.mark.parametrize("make_case", [lambda: chain([4, 6, 5, 7, 3]), lambda: residual(2)])
@pytest.mark.parametrize("p", [1, 2, 3])
def test_plain_cycles_reach_the_optimum_too(make_case: type, p: float) -> None:
    case = make_case()
    ENorm(case.plan, p=p, cycles=600, last_layer=True, start="as_is").step()
    assert relative_gradient(case.plan, p, 1.0) < 1e-10


@pytest.mark.parametrize("p", [1, 2, math.inf])
@pytest.mark.parametrize("kind", KINDS)
def test_every_rescaling_of_a_network_balances_to_the_same_weights(kind: str, p: float) -> None:
    case = make(kind, seed=3)
    balance(case.plan, p=p)
    optimum = weights(case.model)
    for seed in range(10):
        rescale_(case.plan, random_scales(case.plan, seed, size=2.0))
        assert largest_error(weights(case.model), optimum) > 1e-2
        balance(case.plan, p=p)
        assert largest_error(weights(case.model), optimum) < 1e-12


@pytest.mark.parametrize("p", [1, 2, 3, math.inf])
@pytest.mark.parametrize("kind", ["linear", "conv"])
@pytest.mark.parametrize("c", [1.0, 1.2])
def test_on_a_chain_every_consumer_has_c_times_its_producers_norm(
    kind: str, c: float, p: float
) -> None:
    case = chain([4, 6, 5, 7, 3], seed=8, kind=kind)
    balance(case.plan, p=p, c=c)
    found = norms(case, p)
    for producer, consumer in itertools.pairwise(found):
        if math.isfinite(p):
            assert consumer / producer == pytest.approx(c, rel=1e-8)
    units = [w for n, w in weights(case.model).items() if n.endswith("weight")]
    for producer, consumer in itertools.pairwise(units):
        left = torch.linalg.vector_norm(producer.flatten(1), p, dim=1)
        right = torch.linalg.vector_norm(consumer.transpose(0, 1).flatten(1), p, dim=1)
        assert torch.allclose(right, c * left, rtol=1e-8)


@pytest.mark.parametrize("kind", KINDS)
def test_balancing_keeps_the_function(kind: str) -> None:
    case = make(kind, seed=2)
    before = outputs(case)
    balance(case.plan, c=1.1)
    assert float((outputs(case) - before).abs().max() / before.abs().max()) < 1e-11


@pytest.mark.parametrize("depth", [3, 12, 40])
def test_the_number_of_cycles_does_not_grow_with_depth(depth: int) -> None:
    case = chain([16] * (depth + 1), seed=1, bias=False)
    assert balance(case.plan).cycles <= 20


def test_single_precision_weights_are_balanced_in_double() -> None:
    case, wide = make("residual", seed=1), make("residual", seed=1)
    case.model.float()
    wide.model.float().double()
    report = balance(case.plan)
    balance(wide.plan)
    assert report.gap <= 1e-10
    assert largest_error(weights(case.model), weights(wide.model)) < 1e-6


@pytest.mark.parametrize("p", [2, math.inf])
def test_dead_units_stay_and_the_others_are_balanced(p: float) -> None:
    case = chain([3, 6, 5, 2], seed=1)
    with torch.no_grad():
        case.model.get_parameter("layer_00.weight")[2] = 0
        case.model.get_parameter("layer_02.weight")[:, 1] = 0
    old = weights(case.model)
    report = balance(case.plan, p=p)
    new = weights(case.model)
    assert report.gap <= 1e-10
    first = (new["layer_00.bias"] / old["layer_00.bias"]).log()
    second = (new["layer_01.bias"] / old["layer_01.bias"]).log()
    assert float(first[2]) == 0
    assert float(second[1]) == 0
    assert int((first != 0).sum()) == 5
    assert int((second != 0).sum()) == 4
    assert all(bool(w.isfinite().all()) for w in new.values())


@pytest.mark.parametrize("zero", ["head.weight", "embed.weight"])
def test_a_scale_without_a_minimum_stays_and_the_others_are_balanced(zero: str) -> None:
    case = residual(3, 6, 5, seed=1)
    with torch.no_grad():
        case.model.get_parameter(zero).zero_()
    old = weights(case.model)
    report = balance(case.plan)
    new = weights(case.model)
    assert report.gap <= 1e-10
    assert report.norm_after < report.norm_before
    ends = ["embed.weight", "embed.bias", "head.weight"]
    assert same_bits({n: new[n] for n in ends}, {n: old[n] for n in ends})
    for k in range(3):
        up, down = new[f"up{k}.weight"].norm(), new[f"down{k}.weight"].norm()
        assert float(up / down) == pytest.approx(1, rel=1e-8)


@pytest.mark.parametrize("kind", KINDS)
def test_scales_with_a_minimum_are_not_taken_for_others(kind: str) -> None:
    case = make(kind, seed=3)
    program = CarefulStep(case.plan, case.plan.groups, p=2.0, wide=True)
    program.bind_()
    with torch.no_grad():
        descent, _ = program.measure_()
        assert unbounded(descent, make_coarse(descent, alive(descent))) == set()


# ---- the report ----


@pytest.mark.parametrize("p", [2, math.inf])
def test_the_report_is_true(p: float) -> None:
    case = make("joined", seed=1)
    before, old = slow.cost(case.plan, p, 1.1), weights(case.model)
    report = balance(case.plan, p=p, c=1.1)
    assert report.norm_before == pytest.approx(before, rel=1e-12)
    assert report.norm_after == pytest.approx(slow.cost(case.plan, p, 1.1), rel=1e-12)
    assert report.norm_after == pytest.approx(objective(case.plan, p, 1.1), rel=1e-12)
    factors = [
        (weights(case.model)[f"{name}.bias"] / old[f"{name}.bias"]).log().abs().max()
        for name in ("left", "right", "middle")
    ]
    assert report.largest_log_scale == pytest.approx(float(max(factors)), rel=1e-10)
    assert report.cycles >= 1


def test_a_balanced_network_needs_no_cycle() -> None:
    case = make("joined", seed=1)
    balance(case.plan, tol=1e-12)
    old = weights(case.model)
    report = balance(case.plan)
    assert report.cycles == 0
    assert report.largest_log_scale == 0
    assert same_bits(weights(case.model), old)


def test_a_gap_that_is_left_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(converge, "MAX_CYCLES", 2)
    case = make("residual", seed=1)
    report = balance(case.plan)
    assert report.cycles == 2
    assert 1e-10 < report.gap < 1
    assert report.norm_after < report.norm_before


def test_exact_balances_by_powers_of_two() -> None:
    for case in all_cases(seed=6):
        before, old = outputs(case), weights(case.model)
        report = balance(case.plan, exact=True)
        assert same_bits({"y": outputs(case)}, {"y": before})
        ratios = torch.cat([(w / old[n]).log2().flatten() for n, w in weights(case.model).items()])
        assert bool((ratios == ratios.round()).all())
        assert report.norm_after <= report.norm_before


def test_exact_is_never_worse_than_nothing() -> None:
    case = make("residual", seed=1)
    balance(case.plan)
    old = weights(case.model)
    rescale_(case.plan, random_scales(case.plan, size=0.01))
    close = weights(case.model)
    report = balance(case.plan, exact=True)
    assert report.largest_log_scale == 0
    assert same_bits(weights(case.model), close)
    assert largest_error(close, old) > 1e-4


# ---- what is refused ----


@pytest.mark.parametrize("p", [2, math.inf])
def test_a_weight_that_is_not_finite_is_named(p: float) -> None:
    case = make("residual")
    with torch.no_grad():
        case.model.get_parameter("down1.weight")[0, 0] = math.nan
    old = weights(case.model)
    with pytest.raises(NonFiniteError, match=r"'down1.weight'"):
        balance(case.plan, p=p)
    assert same_bits(weights(case.model), old)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tol": 0}, "tol must be between 0 and 1, not 0"),
        ({"tol": 2.0}, "tol must be between 0 and 1"),
        ({"p": 0}, "p must be"),
        ({"c": -1}, "c must be"),
        ({"exact": 1}, "exact must be"),
        ({"example_inputs": torch.ones(1)}, "example_inputs go with a model"),
    ],
)
def test_arguments_are_checked(settings: dict[str, object], message: str) -> None:
    case = make("residual")
    with pytest.raises(ArgumentError, match=message):
        balance(case.plan, **settings)  # type: ignore[arg-type]


def test_the_report_cannot_be_changed() -> None:
    report = Report(2.0, 1.0, 3, 0.5, 0.0)
    with pytest.raises(AttributeError):
        report.cycles = 4  # type: ignore[misc]


# ---- the coarse problem ----


def _random_problem(seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randint(-1, 2, (24, 4), generator=generator).double()
    # Each row with its negative: there is a minimum.
    rows = torch.cat([rows, -rows])
    return 20 * torch.randn(48, generator=generator, dtype=torch.float64), rows


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("power", [1.0, 2.0, 7.0])
def test_the_coarse_problem_is_solved(seed: int, power: float) -> None:
    logs, rows = _random_problem(seed)
    t = minimize(logs, rows, power)
    shares = torch.softmax(logs + power * rows @ t, 0)
    assert float((rows.t() @ shares).abs().max()) < 1e-12
    assert float((rows.t() @ torch.softmax(logs + power * rows @ (t + 1e-3), 0)).abs().max()) > 1e-7


def test_no_newton_step_raises_the_coarse_cost(monkeypatch: pytest.MonkeyPatch) -> None:
    """Eight scales meet in one class: the full step would more than double the cost."""
    monkeypatch.setattr(coarse, "_NEWTON_STEPS", 1)
    rows = torch.cat([torch.eye(8), -torch.ones(1, 8)]).double()
    logs = torch.tensor([0.0] * 8 + [math.log(0.01)], dtype=torch.float64)
    before, after = logs.exp().sum(), (logs + rows @ minimize(logs, rows, 1.0)).exp().sum()
    assert float(after) < float(before)


def test_a_direction_in_which_nothing_changes_is_left_alone() -> None:
    rows = torch.tensor([[1.0, -1.0], [-1.0, 1.0]], dtype=torch.float64)
    t = minimize(torch.tensor([4.0, 0.0], dtype=torch.float64), rows, 2.0)
    assert t.tolist() == pytest.approx([-0.5, 0.5], rel=1e-12)
    empty = torch.full((2,), -math.inf, dtype=torch.float64)
    assert minimize(empty, rows, 2.0).tolist() == [0.0, 0.0]


# ---- with the real analysis ----


def test_a_model_is_analyzed_first() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3)
    ).double()
    inputs = torch.randn(3, 4, dtype=torch.float64)
    before = model(inputs).detach()
    ENorm(model, start="as_is").step()
    report = balance(model, inputs)
    assert report.gap <= 1e-10
    assert torch.allclose(model(inputs), before, rtol=1e-10)
    sizes = [float(model.get_parameter(f"{k}.weight").detach().norm()) for k in (0, 2, 4)]
    assert sizes == pytest.approx([sizes[0]] * 3, rel=1e-8)
