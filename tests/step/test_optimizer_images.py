"""Three real steps, a random rescaling, and what the optimizer does then: the table in
docs/optimizers.md, by numbers."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from enorm_fx import analyze
from enorm_fx.model_plan import Plan
from enorm_fx.step.optimizer_state import EXPONENTS, exponents
from tests.support.helpers import largest_error, random_scales, weights
from tests.support.three_layers import step, three_layers

PAGE = Path(__file__).parents[2] / "docs" / "optimizers.md"
TINY = {"eps": 1e-30}  # the one constant that does not scale, far below every gradient

# How each optimizer is made, and the power of the factor that its next update takes; None: none.
CASES: dict[str, tuple[Callable[[Any], torch.optim.Optimizer], int | None]] = {
    "SGD": (lambda w: torch.optim.SGD(w, lr=0.1, momentum=0.9), -1),
    "Adam": (lambda w: torch.optim.Adam(w, lr=0.01, amsgrad=True, **TINY), 0),
    "AdamW": (
        lambda w: torch.optim.AdamW(w, lr=0.01, amsgrad=True, weight_decay=0.0, **TINY), 0
    ),
    "NAdam": (lambda w: torch.optim.NAdam(w, lr=0.01, **TINY), 0),
    "RAdam": (lambda w: torch.optim.RAdam(w, lr=0.01, **TINY), -1),
    "Adamax": (lambda w: torch.optim.Adamax(w, lr=0.01, **TINY), 0),
    "RMSprop": (lambda w: torch.optim.RMSprop(w, momentum=0.9, centered=True, **TINY), 0),
    "Adagrad": (lambda w: torch.optim.Adagrad(w, lr=0.01, **TINY), 0),
    "Adadelta": (lambda w: torch.optim.Adadelta(w, lr=1.0, eps=1e-200), 1),
    "Rprop": (lambda w: torch.optim.Rprop(w, lr=0.01, step_sizes=(1e-30, 1e30)), 1),
    "ASGD": (lambda w: torch.optim.ASGD(w, lr=0.1, t0=1.0, lambd=0.0), -1),
    "Muon": (lambda w: torch.optim.Muon(w, lr=0.01, weight_decay=0.0), None),
}  # fmt: skip
UNCAPTURABLE = ("SGD", "Adagrad", "Muon")
FORMS: list[tuple[str, dict[str, Any]]] = [
    *((name, {}) for name in CASES),
    *((name, {"foreach": True}) for name in CASES if name != "Muon"),
    *((name, {"fused": True}) for name in ("SGD", "Adam", "AdamW", "Adagrad")),
    *((name, {"capturable": True}) for name in CASES if name not in UNCAPTURABLE),
]


def make(name: str, **settings: Any) -> tuple[nn.Module, Plan, torch.optim.Optimizer]:
    """After three steps."""
    model = three_layers()
    optimizer = CASES[name][0](model.parameters())
    for group in optimizer.param_groups:
        group.update(settings)
    if settings.get("capturable"):  # without a GPU torch takes such steps in compiled form only
        torch._dynamo.reset()
        optimizer.step = torch.compile(optimizer.step, backend="eager")  # type: ignore[method-assign]
    for number in range(3):
        step(model, optimizer)
        if name == "Adadelta" and number == 0:  # it starts from 0, where only eps would count
            for state in optimizer.state.values():
                state["acc_delta"].fill_(1e-4)
    return model, analyze(model), optimizer


def states(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[tuple[str, str], Tensor]:
    """Buffers of the weight's shape."""
    return {
        (name, key): value.clone()
        for name, p in model.named_parameters()
        for key, value in optimizer.state[p].items()
        if isinstance(value, Tensor) and value.shape == p.shape
    }


@pytest.mark.filterwarnings("ignore")  # what torch.compile says
@pytest.mark.parametrize(("name", "settings"), FORMS, ids=str)
def test_buffers_take_their_power_and_the_next_updates_follow(
    name: str, settings: dict[str, Any]
) -> None:
    model, _, optimizer = make(name, **settings)
    rescaled, plan, other = make(name, **settings)
    plan.rescale_(random_scales(plan), other)
    old = weights(model)
    factors = {n: w / old[n] for n, w in weights(rescaled).items()}
    assert largest_error(factors, {n: torch.ones_like(f) for n, f in factors.items()}) > 0.5

    before, known = states(model, optimizer), exponents(optimizer)
    after = states(rescaled, other)
    assert {key for _, key in before} == {k for k in known if k in {key for _, key in before}}
    for (weight, key), value in before.items():
        expected = value * factors[weight] ** known[key]
        assert torch.allclose(after[weight, key], expected, rtol=1e-12, atol=0), key

    power = CASES[name][1]
    start = weights(rescaled)
    for number in range(5):
        step(model, optimizer)
        step(rescaled, other)
        updates = {n: w - old[n] for n, w in weights(model).items()}
        images = {n: w - start[n] for n, w in weights(rescaled).items()}
        if power is not None and (number == 0 or power == 1):
            for weight, update in updates.items():
                expected = update * factors[weight] ** power
                assert torch.allclose(images[weight], expected, rtol=1e-8, atol=1e-13)
        if number == 0 and power != 1:  # the network is no longer a rescaling of the other
            wrong = {n: u * factors[n] for n, u in updates.items()}
            assert largest_error(images, wrong) > 1e-3


def test_the_law_rejects_buffers_that_stay() -> None:
    rescaled, plan, other = make("Adam")
    old, before = weights(rescaled), states(rescaled, other)
    plan.rescale_(random_scales(plan))
    factors = {n: w / old[n] for n, w in weights(rescaled).items()}
    for (weight, key), value in states(rescaled, other).items():
        expected = before[weight, key] * factors[weight] ** exponents(other)[key]
        assert not torch.allclose(value, expected, rtol=1e-2, atol=0)


def test_the_page_has_this_table() -> None:
    """| class | buffers and powers | power of the next update |."""
    text, _, _ = PAGE.read_text().partition("\n## Registered by hand\n")
    rows = re.findall(r"^\| `(\w+)` \| (.*?) \| (.*?) \|", text, flags=re.MULTILINE)
    assert {name for name, *_ in rows} == set(EXPONENTS)
    for name, buffers, update in rows:
        told = dict(re.findall(r"`([\w *]+)` (-?\d)", buffers))
        assert {k: int(v) for k, v in told.items()} == dict(EXPONENTS[name])
        if name in CASES:
            power = CASES[name][1]
            assert update == ("none" if power is None else str(power))
