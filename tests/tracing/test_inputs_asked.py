"""A yes or no that a model reads from its inputs alone is answered both ways."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import enorm_fx
from enorm_fx.errors import TraceError
from tests.support.tracing_kit import ROWS, two_layers

MASK = torch.tensor([[True, False, False], [True, True, False]] + [[False] * 3] * 3)


def leaking(m: Any, x: Tensor, answer: bool) -> tuple[Tensor, Tensor]:
    """Channel 0 leaves the model where the answer is yes, channel 1 where it is no."""
    y = m.a(x)
    return m.b(y.relu()), y[:, 0] if answer else y[:, 1]


QUESTIONS: dict[str, Callable[[Tensor], bool]] = {
    "item": lambda mask: mask.any().item(),
    "if": lambda mask: len([1] if mask.all() else []) == 1,
    "not": lambda mask: not mask.any(),
    "and": lambda mask: bool(mask.any()) and bool(mask.all()),
    "sum": lambda mask: bool((mask.long().sum() > 3).any()),
}


@pytest.mark.parametrize("question", QUESTIONS)
@pytest.mark.parametrize("filled", [True, False])
def test_the_plan_holds_for_either_answer(question: str, filled: bool) -> None:
    ask = QUESTIONS[question]
    model = two_layers(lambda m, x, mask: leaking(m, x, ask(mask)))
    plan = enorm_fx.analyze(model, (ROWS, torch.full((5, 3), filled)))
    assert plan.num_scales == 2
    for mask in (MASK, ~MASK, MASK & False, MASK | True):
        assert enorm_fx.verify(plan, (ROWS, mask)).largest_change < 1e-12


def test_the_example_is_the_first_to_be_traced() -> None:
    def run(m: Any, x: Tensor, mask: Tensor) -> Tensor:
        y = m.a(x)
        return m.b(y.relu() if mask.any() else y.relu().abs().abs())

    lengths = {
        len(enorm_fx.analyze(two_layers(run), (ROWS, m)).graph) for m in (MASK, MASK & False)
    }
    assert len(lengths) == 2


def test_a_way_that_raises_is_noted() -> None:
    def run(m: Any, x: Tensor, mask: Tensor) -> Tensor:
        if mask.all():
            raise ValueError("nothing is left")
        return m.b(m.a(x).relu())

    plan = enorm_fx.analyze(two_layers(run), (ROWS, MASK))
    assert plan.num_scales == 4
    (note,) = plan.notes
    assert "is False" in note
    assert "nothing is left" in note
    assert "test_inputs_asked.py" in note
    with pytest.raises(TraceError, match="nothing is left"):
        enorm_fx.analyze(two_layers(run), (ROWS, MASK | True))


def test_one_question_has_one_answer() -> None:
    taken: list[tuple[bool, ...]] = []

    def run(m: Any, x: Tensor, mask: Tensor) -> Tensor:
        taken.append(tuple(bool((mask & True).any()) for _ in range(20)))
        return m.b(m.a(x).relu())

    enorm_fx.analyze(two_layers(run), (ROWS, MASK))
    assert {len(set(answers)) for answers in taken} == {1}
    assert {answers[0] for answers in taken} == {True, False}


def test_a_question_is_another_one_after_a_write() -> None:
    def run(m: Any, x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        first = bool(mask.any())
        mask = mask.clone()
        mask[0] = False
        return leaking(m, x, first and not mask.any())

    assert enorm_fx.analyze(two_layers(run), (ROWS, MASK)).num_scales == 2


@pytest.mark.parametrize("hidden", [True, False])
def test_what_depends_on_weights_is_refused(hidden: bool) -> None:
    def run(m: Any, x: Tensor) -> Tensor:
        mask = torch.zeros(5, 4, dtype=torch.bool)
        if hidden:
            mask.copy_(m.a(x) > 0)
        else:
            mask = m.a(x) > 0
        return m.b(m.a(x).relu()) if mask.any() else m.b(m.a(x))

    with pytest.raises(TraceError, match="reads into Python"):
        enorm_fx.analyze(two_layers(run), ROWS, tracer="symbolic")


def test_too_many_ways_are_refused() -> None:
    def run(m: Any, x: Tensor, mask: Tensor) -> Tensor:
        y = m.a(x)
        for i, j in itertools.product(range(5), range(3)):
            y = y.relu() if mask[i, j] else y.abs()
        return m.b(y)

    with pytest.raises(TraceError, match="more than 16 ways"):
        enorm_fx.analyze(two_layers(run), (ROWS, MASK))
