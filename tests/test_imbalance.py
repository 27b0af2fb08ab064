"""What `imbalance` says is true, and changes nothing."""

from __future__ import annotations

import json
import math

import pytest
import torch
from torch import nn

from enorm_fx import balance, imbalance
from enorm_fx.errors import ArgumentError, NonFiniteError
from enorm_fx.imbalances import Imbalance
from tests.support import slow_reference as slow
from tests.support.helpers import KINDS, make, random_scales, same_bits, weights
from tests.support.plans import chain


@pytest.mark.parametrize("p", [1, 2, math.inf])
@pytest.mark.parametrize("kind", KINDS)
def test_it_says_how_far_balance_moves(kind: str, p: float) -> None:
    case = make(kind, seed=4)
    case.plan.rescale_(random_scales(case.plan))
    old = weights(case.model)
    found = imbalance(case.plan, p=p, c=1.1)
    assert same_bits(weights(case.model), old)
    largest = [group.largest_log_scale for group in found.groups]
    assert largest == sorted(largest, reverse=True)
    report = balance(case.plan, p=p, c=1.1)
    assert largest[0] == pytest.approx(report.largest_log_scale, rel=1e-3)
    after = imbalance(case.plan, p=p, c=1.1)
    assert all(group.gap <= 1e-9 for group in after.groups)
    # Cycles of maxima are slow: there, what is left of the gap is more in the scales.
    least = 1e-3 if math.isinf(p) else 1e-9
    assert all(group.largest_log_scale <= least for group in after.groups)


@pytest.mark.parametrize("c", [1.0, 1.3])
def test_the_gap_is_that_of_the_gradient(c: float) -> None:
    case = chain([3, 5, 4, 2], seed=3)
    found = imbalance(case.plan, c=c).groups
    slopes = slow.gradient(case.plan, 2, c)
    for group in case.plan.groups:
        (row,) = [g for g in found if g.channels == group.channels]
        worst = 0.0
        for scale in range(group.start, group.start + group.channels):
            entries = slow.counted_entries(case.plan, c)
            sizes = [
                math.exp(2 * log) * abs(exponents[scale])
                for log, exponents in zip(entries.logs, entries.exponents, strict=True)
                if scale in exponents
            ]
            worst = max(worst, abs(slopes[scale]) / 2 / sum(sizes))
        assert row.gap == pytest.approx(worst, rel=1e-9)


@pytest.mark.parametrize("p", [2, math.inf])
def test_the_ratio_is_that_of_the_norms(p: float) -> None:
    case = chain([3, 5, 4, 2], seed=3, bias=False)
    rows = {row.channels: row for row in imbalance(case.plan, p=p, c=1.2).groups}
    norms = [float(torch.linalg.vector_norm(w, p)) for w in weights(case.model).values()]
    assert rows[5].ratio == pytest.approx(norms[1] / norms[0] / 1.2, rel=1e-9)
    assert json.loads(json.dumps(imbalance(case.plan, p=math.inf).to_dict()))["p"] == "inf"
    assert rows[4].ratio == pytest.approx(norms[2] / norms[1] / 1.2, rel=1e-9)


def test_the_worst_comes_first_in_the_table() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))
    with torch.no_grad():
        model[2].weight[5] *= 1000
    found = imbalance(model)
    assert found.groups[0].producers == ("2.weight",)
    assert found.groups[0].largest_log_scale > math.log(10)
    lines = str(found).splitlines()
    assert lines[0] == "2 groups, the worst first (l_2 norms, c = 1)"
    assert lines[1].split() == [
        "channels", "producers", "consumers", "ratio", "factors", "up", "to", "gap"
    ]  # fmt: skip
    assert lines[2].split()[:3] == ["8", "2", "4"]
    factor = math.exp(found.groups[0].largest_log_scale)
    assert f"x {factor:.4g}" in lines[2]
    balance(model)
    assert "x 1  0.000" in str(imbalance(model))


def test_long_tables_are_cut_and_json_has_all() -> None:
    case = chain([4] * 30, seed=1)
    found = imbalance(case.plan)
    assert str(found).endswith("and 8 more groups: see .groups")
    data = json.loads(json.dumps(found.to_dict()))
    assert (data["p"], data["c"]) == (2.0, 1.0)
    assert len(data["groups"]) == 28
    assert data["groups"][0]["gap"] == found.groups[0].gap


def test_a_side_without_anything() -> None:
    case = chain([3, 4, 2], seed=1)
    with torch.no_grad():
        case.model.get_parameter("layer_01.weight").zero_()
    found = imbalance(case.plan)
    assert (found.groups[0].ratio, found.groups[0].gap) == (0, 0)
    assert "one side" in str(found)
    with torch.no_grad():
        case.model.get_parameter("layer_00.weight").zero_()
    assert math.isnan(imbalance(case.plan).groups[0].ratio)
    assert imbalance(case.plan).to_dict()["groups"][0]["ratio"] is None
    assert str(imbalance(nn.Linear(2, 2))) == "No weight can be rescaled."


def test_what_is_refused() -> None:
    case = chain([3, 4, 2])
    with pytest.raises(ArgumentError, match="p must be"):
        imbalance(case.plan, p=0)
    with torch.no_grad():
        case.model.get_parameter("layer_01.weight")[0, 0] = math.nan
    with pytest.raises(NonFiniteError, match=r"'layer_01.weight'"):
        imbalance(case.plan)
    with pytest.raises(AttributeError):
        Imbalance(2.0, 1.0, ()).p = 3.0  # type: ignore[misc]
