"""A producer is multiplied by a scale and a consumer divided, whichever of them is met first."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from enorm_fx import analyze
from tests.support.laws import ROUNDING, largest_change, randomized
from tests.support.zoo_kit import Net, parameter

A = nn.Linear(3, 4)

# The second weight is taken apart before the first one is used.
CONSUMER_FIRST: dict[str, tuple[nn.Module | Tensor, Callable[[Any, Tensor], Tensor]]] = {
    "slices": (
        parameter(6, 4),
        lambda m, x: sum(F.linear(m.a(x).relu(), w) for w in m.b.chunk(2)),  # type: ignore[return-value]
    ),
    "transposed": (parameter(2, 4), lambda m, x: _product(m.b.t(), m.a(x).relu())),
}


def _product(weight: Tensor, x: Tensor) -> Tensor:
    return x @ weight


@pytest.mark.parametrize("tracer", ["symbolic", "export"])
@pytest.mark.parametrize("name", CONSUMER_FIRST)
def test_what_is_computed_with_first_is_multiplied(name: str, tracer: str) -> None:
    b, run = CONSUMER_FIRST[name]
    model = randomized(Net(run, a=A, b=b))
    inputs = torch.randn(2, 3, dtype=torch.float64)
    plan = analyze(model, inputs, tracer=tracer)
    [group] = plan.groups
    assert (group.producers, group.consumers) == (("a.weight",), ("b",))
    assert [(pair.producer, pair.consumer) for pair in plan.pairs] == [("a.weight", "b")]
    assert largest_change(plan, (inputs,)) < ROUNDING
    [term] = next(p for p in plan.parameters if p.name == "a.bias").terms
    assert term.coefficient > 0
