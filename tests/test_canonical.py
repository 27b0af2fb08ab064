"""Laws of the canonical form: one for all rescalings of a network, whatever of it is zero."""

from __future__ import annotations

import copy
from collections.abc import Callable

import networkx as nx
import pytest
import torch
from torch import Tensor, nn

from enorm_fx import analyze, balance, canonicalize_
from enorm_fx.canonical import canonical_scales
from enorm_fx.errors import NonFiniteError
from enorm_fx.model_plan import Plan
from enorm_fx.step.attained import attained
from enorm_fx.step.careful import CarefulStep
from enorm_fx.step.descent import Descent
from enorm_fx.step.even import even_out_
from tests.support.helpers import KINDS, largest_error, make, random_scales, same_bits, weights
from tests.support.laws import ROUNDING
from tests.support.plans import chain, residual
from tests.support.slow_reference import entry_exponents
from tests.support.zoo_networks import NETWORKS, built
from tests.support.zoo_small import ZOO

SMALL = {small.name: small for small in ZOO}


def plan_of(name: str) -> Plan:
    if name in SMALL:
        model, inputs = SMALL[name].build().double(), SMALL[name].inputs()
    else:
        shared, inputs = built(name)
        model = copy.deepcopy(shared)
    return analyze(model, inputs, batchnorm="affine", frozen="rescale")


def spread(plan: Plan, bring: Callable[[Plan], object], trials: int = 1) -> float:
    """The largest relative difference between what random rescalings are brought to."""
    bring(plan)
    goal = weights(plan.model)
    worst = 0.0
    for seed in range(trials):
        plan.rescale_(random_scales(plan, seed, size=2.0))
        bring(plan)
        worst = max(worst, largest_error(weights(plan.model), goal))
    return worst


def make_zeros_(model: nn.Module, seed: int) -> None:
    """Dead units, masked weights, and weights that are zero altogether, at random."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            kind = float(torch.rand((), generator=generator))
            if kind < 0.15:
                parameter.zero_()
            elif kind > 0.85:
                parameter.mul_(torch.rand(parameter.shape, generator=generator) > 0.5)
            elif parameter.ndim > 1 and kind < 0.5:
                parameter[int(kind * 1e6) % len(parameter)] = 0
            elif parameter.ndim > 1:
                parameter[:, int(kind * 1e6) % parameter.shape[1]] = 0


# ---- one form for all rescalings ----


@pytest.mark.parametrize("name", [*SMALL, *NETWORKS])
def test_all_rescalings_have_one_canonical_form(name: str) -> None:
    plan = plan_of(name)
    assert spread(plan, canonicalize_) < 1e-12
    make_zeros_(plan.model, len(name))
    assert spread(plan, canonicalize_) < 1e-12


@pytest.mark.parametrize("kind", KINDS)
def test_in_single_precision(kind: str) -> None:
    case = make(kind, seed=3)
    case.model.float()
    assert spread(case.plan, canonicalize_, trials=5) < 1e-6


def test_balance_alone_would_fail_where_something_is_zero() -> None:
    case = chain([3, 6, 5, 2], seed=1)
    with torch.no_grad():
        case.model.get_parameter("layer_00.weight")[2] = 0
    assert spread(case.plan, balance) > 1e-2
    assert spread(case.plan, canonicalize_) < 1e-12


@pytest.mark.parametrize("kind", KINDS)
def test_where_there_is_an_optimum_it_is_the_canonical_form(kind: str) -> None:
    case, other = make(kind, seed=2), make(kind, seed=2)
    assert canonicalize_(case.plan).gap <= 1e-13
    balance(other.plan)
    assert largest_error(weights(case.model), weights(other.model)) < 1e-12


@pytest.mark.parametrize(
    "name", ["residual", "gated by relu", "multi-head attention", "layer scale"]
)
def test_the_function_stays(name: str) -> None:
    plan = plan_of(name)
    make_zeros_(plan.model, 1)
    inputs = SMALL[name].inputs()
    with torch.no_grad():
        before = plan.model(*inputs)
        canonicalize_(plan)
        assert float((plan.model(*inputs) - before).abs().max()) <= ROUNDING * float(
            before.abs().max()
        )


def test_nothing_is_written_when_scales_are_asked_for() -> None:
    case = make("residual")
    old = weights(case.model)
    u, cycles, gap = canonical_scales(case.plan)
    assert u.shape == (case.plan.num_scales,)
    assert cycles > 0
    assert gap <= 1e-13
    assert same_bits(weights(case.model), old)
    report = canonicalize_(case.plan)
    assert report.largest_log_scale == float(u.abs().max())
    assert report.norm_after < report.norm_before


def test_a_bias_that_is_not_finite_is_named() -> None:
    case = make("residual")
    with torch.no_grad():
        case.model.get_parameter("down1.bias")[0] = torch.nan
    old = weights(case.model)
    with pytest.raises(NonFiniteError, match=r"'down1.bias'"):
        canonicalize_(case.plan)
    assert same_bits(weights(case.model), old)


def test_a_model_without_scales_stays() -> None:
    model = nn.Linear(3, 2)
    old = weights(model)
    assert canonicalize_(model).largest_log_scale == 0
    assert same_bits(weights(model), old)


# ---- where J has a minimum ----


def measured(plan: Plan) -> Descent:
    careful = CarefulStep(plan, plan.groups, p=2.0, wide=True)
    careful.bind_()
    with torch.no_grad():
        return careful.measure_()[0]


def on_a_cycle(plan: Plan) -> list[bool]:
    """The definition for cells of one producer and one consumer: J bounds a scale where it lies on
    a closed path of cells that are not zero, through the pinned ends of the network."""
    graph: nx.DiGraph = nx.DiGraph()
    graph.add_nodes_from([-1, *range(plan.num_scales)])
    for scaled in plan.parameters:
        if scaled.counted:
            values = plan.model.get_parameter(scaled.name).detach().reshape(-1).tolist()
            for value, row in zip(values, entry_exponents(plan)[scaled.name], strict=True):
                if value:
                    up = [v for v, a in row.items() if a > 0] or [-1]
                    down = [v for v, a in row.items() if a < 0] or [-1]
                    assert len(up) == len(down) == 1
                    graph.add_edge(down[0], up[0])
    graph.add_edge(-1, -1)
    together = next(c for c in nx.strongly_connected_components(graph) if -1 in c)
    return [scale in together for scale in range(plan.num_scales)]


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("kind", [k for k in KINDS if k not in ("gated", "squared")])
def test_scales_with_a_minimum_lie_on_closed_paths(kind: str, seed: int) -> None:
    case = make(kind, seed)
    if seed:
        make_zeros_(case.model, seed)
    assert attained(measured(case.plan))[:-1].tolist() == on_a_cycle(case.plan)


def test_zeros_upstream_are_followed() -> None:
    """The unit of the second layer that reads a dead unit alone has no minimum either."""
    case = chain([3, 4, 4, 2], seed=1)
    with torch.no_grad():
        case.model.get_parameter("layer_00.weight")[0] = 0
        case.model.get_parameter("layer_01.weight")[1, 1:] = 0
    assert attained(measured(case.plan)).tolist() == [False, *[True] * 3, True, False, *[True] * 3]


def test_a_network_whose_last_weight_is_zero_has_no_minimum() -> None:
    case = residual(2, 3, 2)
    assert bool(attained(measured(case.plan)).all())
    with torch.no_grad():
        case.model.get_parameter("head.weight").zero_()
    assert not bool(attained(measured(case.plan))[:-1].any())


# ---- the others ----


@pytest.mark.parametrize("kind", ["chain-linear", "residual", "gated", "shared", "grouped-2"])
def test_logarithms_are_least_squares(kind: str) -> None:
    case = make(kind, seed=1)
    with torch.no_grad():
        case.model.get_parameter(case.plan.parameters[0].name)[0] = 0
    descent = measured(case.plan)
    free = torch.rand(case.plan.num_scales + 1, generator=torch.Generator().manual_seed(0)) < 0.7
    free[-1] = True
    descent.u[:-1] = random_scales(case.plan)
    start = descent.u.clone()
    even_out_(descent, free)
    assert torch.equal(descent.u[~free], start[~free])
    assert float(descent.u[-1]) == 0

    def slopes(u: Tensor) -> Tensor:
        """By scale, sum over cells of coefficient * log |w|; cells are told apart by their row."""
        cells: dict[tuple[str, frozenset[tuple[int, float]]], float] = {}
        for scaled in case.plan.parameters:
            if scaled.counted:
                flat = case.model.get_parameter(scaled.name).detach().reshape(-1).tolist()
                for w, row in zip(flat, entry_exponents(case.plan)[scaled.name], strict=True):
                    key = scaled.name, frozenset(row.items())
                    cells[key] = cells.get(key, 0.0) + w * w
        found = torch.zeros_like(u)
        for (_, row), square in cells.items():
            if square and any(free[v] for v, _ in row):
                log = torch.tensor(square).log() / 2 + sum(a * u[v] for v, a in row)
                for v, a in row:
                    found[v] += a * log
        return found[:-1][free[:-1]]

    assert float(slopes(descent.u).abs().max()) < 1e-5 < float(slopes(start).abs().max())
