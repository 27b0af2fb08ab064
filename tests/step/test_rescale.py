"""Any rescaling that a plan allows: what it does to weights, gradients and the function."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch

from enorm_fx.errors import ArgumentError, NonFiniteError, PlanError
from enorm_fx.plan.records import ScaledParameter
from enorm_fx.step.apply import rescale_
from enorm_fx.step.measure import objective
from tests.support import slow_reference as slow
from tests.support.helpers import (
    KINDS,
    buffers,
    largest_error,
    make,
    outputs,
    random_scales,
    same_bits,
    trained,
    weights,
)
from tests.support.plans import chain

# ---- the helpers reject what is wrong ----


def test_the_error_measure_sees_one_entry() -> None:
    right = {"w": torch.ones(3, 4, dtype=torch.float64)}
    wrong = {"w": right["w"].clone()}
    wrong["w"][2, 1] += 1e-11
    assert largest_error(right, right) == 0
    assert largest_error(wrong, right) > 1e-12
    wrong["w"][2, 1] = math.nan
    assert largest_error(wrong, right) == math.inf
    assert not same_bits(wrong, right)


def test_the_bitwise_comparison_sees_the_sign_of_zero() -> None:
    assert same_bits({"w": torch.tensor([0.0, math.nan])}, {"w": torch.tensor([0.0, math.nan])})
    assert not same_bits({"w": torch.tensor([-0.0])}, {"w": torch.tensor([0.0])})


def test_the_reference_descends_and_a_wrong_step_does_not() -> None:
    case = make("residual")
    u = slow.descend(case.plan, 2, 1.0, "sequential", 3)
    right = slow.apply(case.plan, u)
    assert slow.cost(case.plan, 2, 1.0, u) < slow.cost(case.plan, 2, 1.0)
    assert slow.cost(case.plan, 2, 1.0, [-x for x in u]) > slow.cost(case.plan, 2, 1.0)
    u = [1.01 * x for x in u]
    assert largest_error(slow.apply(case.plan, u), right) > 1e-6


# ---- the plans made by hand, and rescale_ ----


@pytest.mark.parametrize("kind", KINDS)
def test_any_rescaling_keeps_the_function(kind: str) -> None:
    case = make(kind)
    before, old = outputs(case), weights(case.model)
    assert float((before - before[:1]).abs().max()) > 1e-3  # it does depend on its input
    u = random_scales(case.plan)
    rescale_(case.plan, u)
    assert float((outputs(case) - before).abs().max() / before.abs().max()) < 1e-12
    assert not same_bits(weights(case.model), old)


@pytest.mark.parametrize("kind", KINDS)
def test_rescaling_does_what_the_terms_say(kind: str) -> None:
    case = make(kind)
    u = random_scales(case.plan)
    expected = slow.apply(case.plan, u.tolist())
    rescale_(case.plan, u)
    assert largest_error(weights(case.model), expected) < 1e-13


def test_the_plan_hands_on_to_the_step() -> None:
    case, other = make("joined"), make("joined")
    u = random_scales(case.plan)
    optimizer, twin = trained(case), trained(other)
    case.plan.rescale_(u, optimizer)
    rescale_(other.plan, u, twin)
    assert same_bits(weights(case.model), weights(other.model))
    assert same_bits(buffers(optimizer), buffers(twin))
    assert case.plan.norm(3, 1.1) == objective(other.plan, 3, 1.1)


def test_a_wrong_plan_changes_the_function() -> None:
    case = make("residual")
    parameters = tuple(
        ScaledParameter(s.name, s.shape, s.terms[:1], s.counted, s.depth, s.last)
        for s in case.plan.parameters
    )
    wrong = copy.copy(case.plan)
    object.__setattr__(wrong, "parameters", parameters)
    before = outputs(case)
    rescale_(wrong, random_scales(wrong))
    assert float((outputs(case) - before).abs().max() / before.abs().max()) > 1e-2


@pytest.mark.parametrize(
    ("scales", "message"),
    [
        (torch.zeros(3), r"shape \(13,\), not \(3,\)"),
        (torch.zeros(13, dtype=torch.int64), "floating point"),
        ([0.0] * 13, "floating point"),
        (torch.full((13,), math.nan), "finite"),
        (torch.zeros(13, 1), "shape"),
    ],
)
def test_rescale_refuses_other_scales(scales: Any, message: str) -> None:
    case = make("residual")
    old = weights(case.model)
    with pytest.raises(ArgumentError, match=message):
        rescale_(case.plan, scales)
    assert same_bits(weights(case.model), old)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_factor_that_leaves_the_dtype_is_refused(dtype: torch.dtype) -> None:
    case = make("chain-linear")
    case.model.to(dtype)
    old = weights(case.model)
    with pytest.raises(NonFiniteError, match="factor leaves the range"):
        rescale_(case.plan, torch.full((case.plan.num_scales,), 800.0))
    assert same_bits(weights(case.model), old)


def test_a_half_precision_weight_that_would_overflow_is_refused() -> None:
    case = chain([3, 4, 2])
    case.model.half()
    old = weights(case.model)
    with pytest.raises(NonFiniteError, match=r"'layer_00.weight' would reach .* torch.float16"):
        rescale_(case.plan, torch.full((4,), 13.0))
    assert same_bits(weights(case.model), old)


def test_half_precision_is_rounded_once() -> None:
    case = make("chain-linear")
    case.model.bfloat16()
    u = random_scales(case.plan)
    expected = slow.apply(case.plan, u.tolist())
    rescale_(case.plan, u)
    # Half a unit in the last place of 8 bits, for each axis that has a factor.
    assert largest_error(weights(case.model), expected) < 2 * 2**-8


def test_gradients_in_grad_become_those_of_the_rescaled_network() -> None:
    case = make("gated")
    case.model(case.inputs).square().sum().backward()
    rescale_(case.plan, random_scales(case.plan))
    kept = {n: p.grad.clone() for n, p in case.model.named_parameters()}
    case.model.zero_grad()
    case.model(case.inputs).square().sum().backward()
    for name, parameter in case.model.named_parameters():
        assert torch.allclose(
            kept[name], parameter.grad, rtol=1e-9, atol=1e-12 * kept[name].abs().max()
        )


def test_a_sparse_gradient_is_refused() -> None:
    case = make("chain-linear")
    weight = case.model.get_parameter("layer_00.weight")
    weight.grad = torch.zeros_like(weight).to_sparse()
    old = weights(case.model)
    with pytest.raises(PlanError, match="sparse"):
        rescale_(case.plan, random_scales(case.plan))
    assert same_bits(weights(case.model), old)
