"""`verify` and the library's own count: they must see what is wrong, and leave no trace."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from enorm_fx import analyze, verify
from enorm_fx.counting import count_symmetries
from enorm_fx.errors import ArgumentError
from enorm_fx.model_plan import Plan
from enorm_fx.symmetry.solution import ScaleTerm
from enorm_fx.verifying import relative_change
from tests.support import laws
from tests.support.laws import randomized
from tests.support.zoo_small import ZOO, Small

ROWS = torch.randn(5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def net() -> nn.Module:
    return randomized(
        nn.Sequential(
            nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(),
            nn.Dropout(0.5), nn.Linear(4, 2),
        )
    )  # fmt: skip


def tampered(plan: Plan, name: str) -> Plan:
    """The plan with the sign of one parameter's scales turned."""
    parameters = tuple(
        replace(p, terms=tuple(ScaleTerm(-t.coefficient, t.index) for t in p.terms))
        if p.name == name
        else p
        for p in plan.parameters
    )
    return replace(plan, parameters=parameters)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("given", [None, ROWS, {"input": ROWS}])
def test_an_exact_plan_changes_nothing_but_rounding(training: bool, given: object) -> None:
    found = verify(analyze(net().train(training), ROWS, batchnorm="affine"), given)
    assert found.exact
    assert found.trials == 3
    assert found.largest_change < 1e-12


def test_an_inexact_plan_is_seen() -> None:
    found = verify(analyze(net(), ROWS, batchnorm="skip"), ROWS)
    assert not found.exact
    assert found.largest_change > 1e-2


@pytest.mark.parametrize("name", ["1.weight", "1.bias", "3.weight", "3.bias", "6.weight"])
def test_a_tampered_plan_is_seen(name: str) -> None:
    plan = analyze(net(), ROWS, batchnorm="affine")
    assert verify(tampered(plan, name), ROWS, trials=1).largest_change > 1e-3


def test_a_missing_term_is_seen() -> None:
    plan = analyze(net(), ROWS, batchnorm="affine")
    without = tuple(replace(p, terms=()) if p.name == "3.weight" else p for p in plan.parameters)
    assert verify(replace(plan, parameters=without)).largest_change > 1e-3


def test_the_model_and_the_random_numbers_are_left_alone() -> None:
    model = net().train()
    plan = analyze(model, ROWS, batchnorm="affine")
    before = {name: t.clone() for name, t in model.state_dict().items()}
    numbers, modes = torch.get_rng_state(), [m.training for m in model.modules()]
    verify(plan)
    verify(plan, ROWS, trials=2)
    assert all(torch.equal(before[name], t) for name, t in model.state_dict().items())
    assert torch.equal(numbers, torch.get_rng_state())
    assert modes == [m.training for m in model.modules()]
    assert all(p.grad is None for p in model.parameters())


def test_a_float32_model_is_verified_in_float64() -> None:
    model = net().float()
    assert verify(analyze(model, ROWS.float(), batchnorm="affine")).largest_change < 1e-12
    assert all(p.dtype is torch.float32 for p in model.parameters())


def test_what_cannot_be_verified_is_said() -> None:
    plan = analyze(net(), ROWS, batchnorm="affine")
    with pytest.raises(ArgumentError, match="trials must be at least 1"):
        verify(plan, ROWS, trials=0)
    with pytest.raises(ArgumentError, match="not finite"):
        verify(plan, ROWS * float("inf"))


def test_relative_change_by_hand() -> None:
    old = [torch.tensor([1.0, -4.0]), torch.tensor([10.0])]
    assert relative_change(old, old) == 0
    assert relative_change(old, [torch.tensor([1.0, -4.4]), torch.tensor([10.0])]) == pytest.approx(
        0.1
    )
    assert relative_change(old, [torch.tensor([1.0, -4.0]), torch.tensor([12.0])]) == pytest.approx(
        0.2
    )
    nan = [torch.tensor([float("nan"), -4.0]), torch.tensor([10.0])]
    assert relative_change(old, nan) == float("inf")
    assert relative_change([torch.zeros(2)], [torch.ones(2)]) == float("inf")


# --- two counts, made differently --------------------------------------------------------------

COUNTED = [small for small in ZOO if small.name not in ("embedding", "relu6")][::2]


@pytest.mark.parametrize("small", COUNTED, ids=lambda small: small.name)
def test_counting_by_slices_and_by_entries_agree(small: Small) -> None:
    model, inputs = randomized(small.build()), small.inputs()
    assert count_symmetries(model, inputs) == laws.count_symmetries(model, inputs)


def test_the_count_leaves_the_model_alone() -> None:
    model = net()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    numbers = torch.get_rng_state()
    assert count_symmetries(model, ROWS) == 4 + 4
    assert all(torch.equal(before[name], t) for name, t in model.state_dict().items())
    assert torch.equal(numbers, torch.get_rng_state())


def test_a_helper_that_compares_outputs_can_say_no() -> None:
    y = [torch.tensor([1.0, 2.0])]
    assert laws.deviation(y, y) == 0
    assert laws.deviation(y, [torch.tensor([1.0, 2.2])]) == pytest.approx(0.2 / 2.2)
    assert laws.deviation(y, [torch.tensor([1.0, float("nan")])]) == float("inf")
    assert laws.deviation([torch.tensor([1])], [torch.tensor([2])]) == float("inf")
    assert laws.deviation(y, [torch.tensor([[1.0, 2.0]])]) == float("inf")


def test_random_inputs_keep_their_kind() -> None:
    generator = torch.Generator().manual_seed(0)
    positive, whole = torch.rand(50) + 0.1, torch.arange(5)
    assert bool((laws.redrawn(positive, generator) > 0).all())
    assert bool((laws.redrawn(positive - 0.5, generator) < 0).any())
    assert torch.equal(laws.redrawn(whole, generator), whole)


def test_a_model_in_evaluation_with_inputs_of_its_own() -> None:
    def shifted(x: Tensor) -> Tensor:
        return x + 1

    plan = analyze(net(), ROWS, batchnorm="affine")
    assert verify(plan, shifted(ROWS)).largest_change < 1e-12
