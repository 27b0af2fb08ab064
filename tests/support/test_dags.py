"""Random networks over the whole op table: whatever is drawn, rescaling keeps the function."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from torch import Tensor

from enorm_fx import EnormError, analyze
from enorm_fx.model_plan import Plan
from enorm_fx.rules import join, registry
from enorm_fx.symmetry.labels import Label, System, add
from tests.support.dags import (
    BOUND,
    KINDS,
    OPS,
    Recipe,
    Replay,
    recipes,
    seeded_recipe,
    tensors_for,
)
from tests.support.laws import ROUNDING, SPREAD, with_scales

ALWAYS: dict[str, Any] = {
    "derandomize": True,
    "deadline": None,
    "database": None,
    "suppress_health_check": [HealthCheck.too_slow, HealthCheck.data_too_large],
}


def pool_of(model: Replay, recipe: Recipe) -> list[Tensor]:
    """All tensors of a run, copied as soon as it is over."""
    with torch.no_grad():
        return [x.clone() for x in model.pool(*(x.clone() for x in tensors_for(recipe)))]


def usable(pool: list[Tensor]) -> bool:
    """Finite numbers of a size that leaves the law above rounding."""
    return all(bool(x.isfinite().all()) and float(x.abs().max()) < BOUND for x in pool)


def plan_of(model: Replay, recipe: Recipe) -> Plan:
    return analyze(model, tuple(x.clone() for x in tensors_for(recipe)), batchnorm="affine")


def change(recipe: Recipe, plan: Plan, before: list[Tensor], trials: int = 2) -> float:
    """The largest change of an output, relative to its size; differences of large tensors are
    held against a millionth of these."""
    generator = torch.Generator().manual_seed(3)
    floor = 1e-6 * max(float(x.abs().max()) for x in before)
    largest = 0.0
    for _ in range(trials):
        u = SPREAD * torch.randn(plan.num_scales, dtype=torch.float64, generator=generator)
        model = with_scales(plan, u)
        assert isinstance(model, Replay)
        after = pool_of(model, recipe)
        for i in recipe.outputs:
            if not bool(after[i].isfinite().all()):
                return float("inf")
            size = max(float(before[i].abs().max()), floor, 1e-12)
            largest = max(largest, float((after[i] - before[i]).abs().max()) / size)
    return largest


def check(recipe: Recipe) -> None:
    model = Replay(recipe)
    before = pool_of(model, recipe)
    assume(usable(before))
    plan = plan_of(model, recipe)
    assert plan.exact
    assert change(recipe, plan, before) < ROUNDING


@settings(max_examples=100, **ALWAYS)
@given(recipe=recipes())
def test_random_rescalings_keep_random_graphs(recipe: Recipe) -> None:
    check(recipe)


@pytest.mark.nightly
@settings(max_examples=2000, **ALWAYS)
@given(recipe=recipes())
def test_random_rescalings_keep_many_random_graphs(recipe: Recipe) -> None:
    check(recipe)


def test_recipes_are_not_vacuous() -> None:
    scales, used = [], set()
    for seed in range(100):
        recipe = seeded_recipe(seed)
        used |= {step.op for step in recipe.steps}
        model = Replay(recipe)
        if usable(pool_of(model, recipe)):
            scales.append(plan_of(model, recipe).num_scales)
    assert len(scales) > 80
    assert sum(n > 0 for n in scales) >= 50
    assert len(used) > 0.8 * len(OPS)


def test_recipes_replay() -> None:
    for seed in range(20):
        recipe = seeded_recipe(seed)
        first, second = (pool_of(Replay(recipe), recipe) for _ in range(2))
        assert all(map(torch.equal, first, second))
        assert recipe == seeded_recipe(seed)


def _passes(ctx: Any, input: Label, *args: Any, **kwargs: Any) -> Label:
    return Label(ctx.shape, input.terms)


def _take_first(ctx: Any, labels: list[Label]) -> Label:
    return add(ctx.shape, labels[0])


def _mutate(monkeypatch: pytest.MonkeyPatch, mutation: str) -> None:
    if mutation == "join":
        monkeypatch.setattr(join, "equalized", _take_first)
    elif mutation == "reduction":
        monkeypatch.setattr(System, "uniform", lambda self, label, axes: label)
    else:
        entry = registry.find(mutation)
        assert entry is not None
        monkeypatch.setitem(registry._RULES, mutation, replace(entry, function=_passes))


def _caught(recipe: Recipe) -> bool:
    model = Replay(recipe)
    before = pool_of(model, recipe)
    if not usable(before):
        return False
    try:
        plan = plan_of(model, recipe)
    except (EnormError, RuntimeError):  # a wrong label that does not even fit its tensor
        return False
    return change(recipe, plan, before, trials=1) > ROUNDING


@pytest.mark.parametrize(
    "mutation", ["sigmoid", "tanh", "softmax", "prelu", "where", "join", "reduction"]
)
def test_a_wrong_rule_is_caught(mutation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    _mutate(monkeypatch, mutation)
    assert any(_caught(seeded_recipe(seed)) for seed in range(200))


def test_the_right_rules_pass_where_wrong_ones_are_caught() -> None:
    assert not any(_caught(seeded_recipe(seed)) for seed in range(100))


def test_every_op_can_be_drawn() -> None:
    assert sorted(name for names in KINDS.values() for name in names) == sorted(OPS)
