"""What tests of tracing start from: a network of two layers, and what is asked of its plan."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from enorm_fx import analyze
from enorm_fx.model_plan import Plan
from tests.support.laws import ROUNDING, largest_change, randomized
from tests.support.zoo_kit import Net

L = nn.Linear
ROWS = torch.randn(5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def two_layers(run: Callable[..., Any], **more: Any) -> nn.Module:
    """run(m, x) with layers a (3 to 4) and b (4 to 2)."""
    return randomized(Net(run, a=L(3, 4), b=L(4, 2), **more))


def plain(m: Any, x: Tensor) -> Tensor:
    return m.b(m.a(x).relu())


def sound(model: nn.Module, inputs: Any = ROWS, **options: Any) -> int:
    """The number of scales of a plan that keeps the function."""
    plan = analyze(model, inputs, **options)
    given = inputs if isinstance(inputs, tuple) else (inputs,)
    assert plan.exact
    assert largest_change(plan, given) < ROUNDING
    return plan.num_scales


def structure(plan: Plan) -> Any:
    """What does not depend on names: scales by parameter in order, groups."""
    terms = [
        [(t.coefficient, t.index.flatten().tolist()) for t in p.terms] for p in plan.parameters
    ]
    return terms, [(g.channels, g.start) for g in plan.groups]
