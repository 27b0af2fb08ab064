"""What `enorm.stats()` says is what the next step does."""

from __future__ import annotations

import math

import pytest
import torch

from enorm_fx import ENorm, analyze
from enorm_fx.errors import NonFiniteError
from tests.support.helpers import make, same_bits, weights
from tests.support.training import network


@pytest.mark.parametrize("kind", ["residual", "gated"])
def test_it_says_what_a_step_does_and_writes_nothing(kind: str) -> None:
    case = make(kind, seed=1)
    enorm = ENorm(case.plan, backend="eager", last_layer=True, start="as_is", c=1.2)
    old = weights(case.model)
    stats = enorm.stats()
    assert same_bits(weights(case.model), old)
    assert stats.norm == case.plan.norm(2, 1.2)
    assert (stats.calls, stats.refused, stats.seconds) == (0, 0, 0.0)
    assert len(stats.imbalance) == len(case.plan.groups)
    sizes = [size for _, size in stats.imbalance]
    assert sizes == sorted(sizes, reverse=True)
    assert stats.largest_factor == math.exp(sizes[0])
    assert sizes[0] > 0.1
    enorm.step()
    assert enorm.stats().norm < stats.norm
    assert enorm.stats().calls == 1
    assert enorm.stats().seconds > 0


def test_the_imbalance_is_that_of_the_step_to_come() -> None:
    model = network().double()
    enorm = ENorm(analyze(model), backend="eager", last_layer=True, start="as_is")
    told, old = dict(enorm.stats().imbalance), weights(model)
    enorm.step()
    done = (weights(model)["0.weight"] / old["0.weight"]).log().abs().max()
    assert float(done) == pytest.approx(told["0.weight"], rel=1e-9)
    assert told.keys() == {"0.weight", "2.weight"}


def test_at_the_optimum_there_is_none() -> None:
    case = make("residual", seed=1)
    enorm = ENorm(case.plan, backend="eager", last_layer=True)
    before = enorm.stats().largest_factor
    enorm.step()
    assert enorm.stats().largest_factor < 1 + 1e-6 < before


def test_a_refused_step_is_counted_and_a_writer_gets_every_number() -> None:
    case = make("residual", seed=1)
    enorm = ENorm(case.plan, backend="eager", last_layer=True, start="as_is")
    weight = case.model.get_parameter("embed.weight")
    with torch.no_grad():
        kept, weight[0, 0] = weight[0, 0].clone(), math.nan
        with pytest.raises(NonFiniteError):
            enorm.step()
        weight[0, 0] = kept
    stats, given = enorm.stats(), {}

    class Writer:
        def add_scalar(self, tag: str, value: float, global_step: int) -> None:
            given[tag] = value, global_step

    stats.log_to(Writer(), 7)
    assert given["enorm/refused"] == (1.0, 7)
    assert given["enorm/norm"] == (stats.norm, 7)
    assert len(given) == 4 + len(stats.imbalance)
