"""Weights in 16 bits are summed in a wider range than theirs: what fits after a step is balanced.

A row of norm 256 has a sum of squares beyond float16's largest number, 65,504.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import nn

import enorm_fx
from enorm_fx.enorm import ENorm
from enorm_fx.errors import NonFiniteError
from enorm_fx.step.careful import CarefulStep
from tests.support.helpers import BACKENDS, copied, largest_error, same_bits, tensors_of, weights

P = [1.0, 2.0, 3.0, float("inf")]


def network() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(2, 12, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(12, 16, 3),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(16, 40),
        nn.ReLU(),
        nn.Linear(40, 30),
    )


def fill_(model: nn.Sequential, norm: float) -> None:
    """Weights whose rows have about this norm, and large biases."""
    torch.manual_seed(3)
    for layer in model:
        if isinstance(layer, nn.Conv2d | nn.Linear):
            rows = torch.randn(layer.weight.flatten(1).shape, dtype=torch.float64)
            rows *= norm * (1 + 0.3 * torch.rand(len(rows), 1)) / rows.norm(dim=1, keepdim=True)
            layer.weight.data.copy_(rows.view_as(layer.weight))
            layer.bias.data.copy_(norm * torch.rand(len(rows)) / 2)


def expected(model: nn.Sequential, p: float) -> dict[str, torch.Tensor]:
    """The weights after one cycle in float64."""
    wide = copy.deepcopy(model).double()
    plan = enorm_fx.analyze(wide, inputs(torch.float64))
    CarefulStep(plan, plan.groups, p=p).run_((), None, 1)
    return weights(wide)


def inputs(dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(2, 2, 8, 8, dtype=dtype)


def is_rounding(model: nn.Module, wide: dict[str, torch.Tensor], dtype: torch.dtype) -> bool:
    """Whether the weights are these numbers in this dtype, but for one rounding."""
    return largest_error(weights(model), wide) < torch.finfo(dtype).eps / 2 * 1.01


def test_rounding_is_told_from_more() -> None:
    model = network().half()
    fill_(model, 300)
    wide = {name: tensor.double() for name, tensor in weights(model).items()}
    assert is_rounding(model, wide, torch.float16)
    wide["0.weight"][0, 0] *= 1.001
    assert not is_rounding(model, wide, torch.float16)


@pytest.mark.parametrize("p", P)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("backend", ["careful", *BACKENDS])
def test_rows_of_large_norm_are_balanced_to_rounding(
    backend: str, dtype: torch.dtype, p: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = network().to(dtype)
    plan = enorm_fx.analyze(model, inputs(dtype))
    careful = CarefulStep(plan, plan.groups, p=p)
    enorm = ENorm(plan, p=p, backend="auto" if backend == "careful" else backend, start="as_is")
    for norm in (300.0, 1_000.0, 10_000.0):
        fill_(model, norm)
        wide = expected(model, p)
        assert not is_rounding(model, wide, dtype)
        if backend == "careful":
            careful.run_((), None, 1)
        else:
            assert enorm.backend == backend
            with monkeypatch.context() as patched:
                if norm < 10_000:  # beyond, bounds may say too little, and the careful way decides
                    patched.setattr(CarefulStep, "run_", _declined)
                enorm.step()
        assert is_rounding(model, wide, dtype)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("norm", [300.0, 10_000.0])
def test_a_fused_step_balances_them_too(norm: float, dtype: torch.dtype) -> None:
    model = network().to(dtype)
    fill_(model, norm)
    wide = expected(model, 2.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0, momentum=0.9)
    enorm = ENorm(
        enorm_fx.analyze(model, inputs(dtype)),
        optimizer,
        start="as_is",
        backend="eager",
        fused=True,
    )
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    enorm.flush_()
    assert is_rounding(model, wide, dtype)


def _declined(*_: object) -> None:
    raise AssertionError("the backend has refused")


def one_large_entry(outputs: int) -> nn.Sequential:
    """Both weights in range; as more outputs read the unit, the more its one input must grow."""
    model = nn.Sequential(nn.Linear(1, 2), nn.ReLU(), nn.Linear(2, outputs)).half()
    with torch.no_grad():
        model[0].weight.fill_(50_000)
        model[2].weight.fill_(50_000)
    return model


def balanced_by(backend: str) -> Callable[[nn.Sequential], None]:
    def step(model: nn.Sequential) -> None:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        ENorm(model, optimizer, backend=backend, start="as_is").step()

    return step


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_weight_that_would_leave_float16_is_refused(backend: str) -> None:
    step = balanced_by(backend)
    step(one_large_entry(outputs=1))  # each factor is 1: large as they are, they may stay
    model = one_large_entry(outputs=16)
    before = copied(tensors_of(model))
    with pytest.raises(NonFiniteError, match=r"'0\.weight' would reach 1e\+05, beyond"):
        step(model)
    assert same_bits(tensors_of(model), before)


def test_a_weight_that_would_leave_bfloat16_is_refused() -> None:
    model = network().bfloat16()
    with torch.no_grad():
        model[0].weight[0, 0, 0, 0] = 1e38
    plan = enorm_fx.analyze(model, inputs(torch.bfloat16))
    before = copied(tensors_of(model))
    with pytest.raises(NonFiniteError, match=r"'0\.weight' would reach .* beyond torch.bfloat16"):
        plan.rescale_(torch.full((plan.num_scales,), 2.0))
    assert same_bits(tensors_of(model), before)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_bias_that_would_leave_float16_is_refused(backend: str) -> None:
    model = one_large_entry(outputs=16)
    with torch.no_grad():
        model[0].weight.fill_(1)
        model[0].bias.fill_(60_000)
    before = copied(tensors_of(model))
    with pytest.raises(NonFiniteError, match=r"'0\.bias' would reach .* beyond torch.float16"):
        balanced_by(backend)(model)
    assert same_bits(tensors_of(model), before)


@pytest.mark.parametrize("backend", BACKENDS)
def test_entries_near_the_end_of_float16_that_stay_below_it_are_balanced(backend: str) -> None:
    model = one_large_entry(outputs=1)
    with torch.no_grad():
        model[0].weight.mul_(1.3)  # 65,000, which becomes smaller
    balanced_by(backend)(model)
    assert float(model[0].weight.detach()[0]) == pytest.approx(50_000 * 1.3**0.5, rel=1e-3)
