"""Optimizer buffers take the power that the table says.

The law: run an optimizer on a weight, and the same optimizer on the weight times a with gradients
divided by a. Every buffer of the second must be the first one's times a^exponent.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from enorm_fx.errors import ArgumentError, OptimizerStateError
from enorm_fx.step.optimizer_state import (
    EXPONENTS,
    FactoredMoments,
    exponents,
    register_optimizer_state,
    state_buffers,
)

FACTORS = torch.tensor([[0.25, 0.5, 2.0, 8.0], [4.0, 1.0, 0.125, 16.0]], dtype=torch.float64)

# eps far below every gradient: it is the one constant that does not scale.
TINY = {"eps": 1e-60}
MAKERS: dict[str, Callable[[list[nn.Parameter]], torch.optim.Optimizer]] = {
    "SGD": lambda w: torch.optim.SGD(w, lr=0.1, momentum=0.9, dampening=0.2),
    "SGD-nesterov": lambda w: torch.optim.SGD(w, lr=0.1, momentum=0.9, nesterov=True),
    "Adam": lambda w: torch.optim.Adam(w, amsgrad=True, **TINY),
    "AdamW": lambda w: torch.optim.AdamW(w, amsgrad=True, weight_decay=0.0, **TINY),
    "NAdam": lambda w: torch.optim.NAdam(w, **TINY),
    "RAdam": lambda w: torch.optim.RAdam(w, **TINY),
    "Adamax": lambda w: torch.optim.Adamax(w, **TINY),
    "RMSprop": lambda w: torch.optim.RMSprop(w, momentum=0.9, centered=True, **TINY),
    "Adagrad": lambda w: torch.optim.Adagrad(w, **TINY),
    "Muon": lambda w: torch.optim.Muon(w, lr=0.1, weight_decay=0.0),
}
# Their updates scale with the weights, and so do the buffers once they start scaled.
COVARIANT: dict[str, Callable[[list[nn.Parameter]], torch.optim.Optimizer]] = {
    "Adadelta": lambda w: torch.optim.Adadelta(w, eps=1e-200),
    "Rprop": lambda w: torch.optim.Rprop(w, lr=0.1, step_sizes=(1e-30, 1e30)),
}


def _gradients(steps: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(2, 4, generator=generator, dtype=torch.float64) for _ in range(steps)]


def _pair(
    make: Callable[[list[nn.Parameter]], torch.optim.Optimizer],
) -> tuple[nn.Parameter, torch.optim.Optimizer, nn.Parameter, torch.optim.Optimizer]:
    start = torch.randn(2, 4, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    first, second = nn.Parameter(start.clone()), nn.Parameter(start * FACTORS)
    return first, make([first]), second, make([second])


def _step(weight: nn.Parameter, optimizer: torch.optim.Optimizer, gradient: Tensor) -> None:
    weight.grad = gradient.clone()
    optimizer.step()


def buffer_errors(
    first: dict[str, Any], second: dict[str, Any], known: dict[str, int]
) -> dict[str, float]:
    """By buffer, the largest relative difference between second and first * factor^exponent."""
    tensors = {k: v for k, v in first.items() if isinstance(v, Tensor) and v.shape == FACTORS.shape}
    return {
        name: float((second[name] / (value * FACTORS ** known[name]) - 1).abs().max())
        for name, value in tensors.items()
    }


@pytest.mark.parametrize("name", MAKERS)
def test_buffers_follow_rescaled_gradients(name: str) -> None:
    first, one, second, two = _pair(MAKERS[name])
    for gradient in _gradients(6):
        _step(first, one, gradient)
        _step(second, two, gradient / FACTORS)
    known = exponents(one)
    errors = buffer_errors(one.state[first], two.state[second], known)
    assert errors.keys() == set(EXPONENTS[name.split("-")[0]])
    assert max(errors.values()) < 1e-12


@pytest.mark.parametrize("name", COVARIANT)
def test_buffers_of_scale_covariant_optimizers(name: str) -> None:
    """Start both from one step, rescale weight and buffers: the trajectories stay a apart."""
    first, one, second, two = _pair(COVARIANT[name])
    start, *rest = _gradients(6)
    _step(first, one, start)
    _step(second, two, start)
    if name == "Adadelta":  # it starts from 0, where only eps would set the size of its updates
        one.state[first]["acc_delta"].fill_(0.01)
    with torch.no_grad():
        second.copy_(first * FACTORS)
    before = first.detach().clone()
    for buffer in state_buffers(two, second, "w", exponents(two)):
        buffer.tensor.copy_(one.state[first][buffer.name] * FACTORS**buffer.exponent)
    for gradient in rest:
        _step(first, one, gradient)
        _step(second, two, gradient / FACTORS)
    assert float((first.detach() - before).abs().min()) > 1e-3
    assert float((second / (first * FACTORS) - 1).detach().abs().max()) < 1e-12
    errors = {
        k: v
        for k, v in buffer_errors(one.state[first], two.state[second], exponents(two)).items()
        if k != "prev"  # zero where the sign changed: compared below
    }
    assert max(errors.values()) < 1e-12
    if name == "Rprop":
        assert torch.allclose(
            two.state[second]["prev"], one.state[first]["prev"] / FACTORS, rtol=1e-12, atol=0
        )


def test_averaged_weights_take_the_factor() -> None:
    weight = nn.Parameter(torch.ones(2, 4))
    optimizer = torch.optim.ASGD([weight])
    _step(weight, optimizer, torch.ones(2, 4))
    found = state_buffers(optimizer, weight, "w", exponents(optimizer))
    assert [(b.name, b.exponent) for b in found] == [("ax", 1)]


def test_sparse_adam_is_adam() -> None:
    assert EXPONENTS["SparseAdam"] == {"exp_avg": -1, "exp_avg_sq": -2}


def test_adafactor_keeps_one_buffer_for_a_vector_and_two_for_a_matrix() -> None:
    vector, matrix = nn.Parameter(torch.ones(4)), nn.Parameter(torch.ones(3, 4))
    optimizer = torch.optim.Adafactor([vector, matrix])
    vector.grad, matrix.grad = torch.ones(4), torch.ones(3, 4)
    optimizer.step()
    known = exponents(optimizer)
    assert [b.exponent for b in state_buffers(optimizer, vector, "v", known)] == [-2]
    (moments,) = state_buffers(optimizer, matrix, "m", known)
    assert isinstance(moments, FactoredMoments)
    assert (moments.name, moments.exponent) == ("row_var * col_var", -2)
    assert (moments.rows.shape, moments.columns.shape) == ((3, 1), (1, 4))


@pytest.mark.parametrize("name", sorted(EXPONENTS))
def test_every_class_of_the_table_exists(name: str) -> None:
    assert issubclass(getattr(torch.optim, name), torch.optim.Optimizer)
    assert exponents(object.__new__(getattr(torch.optim, name))) == dict(EXPONENTS[name])


def test_the_law_rejects_a_wrong_exponent() -> None:
    first, one, second, two = _pair(MAKERS["Adam"])
    for gradient in _gradients(3):
        _step(first, one, gradient)
        _step(second, two, gradient / FACTORS)
    wrong = {**exponents(one), "exp_avg_sq": -1}
    assert buffer_errors(one.state[first], two.state[second], wrong)["exp_avg_sq"] > 0.1


class _OwnSGD(torch.optim.SGD):
    """A user's subclass."""


class _WithExtra(torch.optim.SGD):
    """A subclass with a buffer of its own."""

    def fill(self, weight: nn.Parameter, value: object) -> None:
        self.state[weight]["my_average"] = value


def test_a_subclass_has_the_buffers_of_its_base() -> None:
    weight = nn.Parameter(torch.ones(2, 4))
    optimizer = _OwnSGD([weight], lr=0.1, momentum=0.9)
    _step(weight, optimizer, torch.ones(2, 4))
    found = state_buffers(optimizer, weight, "w", exponents(optimizer))
    assert [(b.name, b.exponent) for b in found] == [("momentum_buffer", -1)]
    assert found[0].tensor is optimizer.state[weight]["momentum_buffer"]


@pytest.mark.parametrize(
    "value", [torch.zeros(2, 4), [torch.zeros(2, 4)], {"a": torch.zeros(8)}, torch.zeros(2, 1)]
)
def test_an_unknown_buffer_is_an_error_that_says_what_to_do(value: object) -> None:
    weight = nn.Parameter(torch.ones(2, 4))
    optimizer = _WithExtra([weight], lr=0.1)
    optimizer.fill(weight, value)
    message = r"_WithExtra keeps the buffer 'my_average' .*'layer.weight'.*buffers=\{'my_average'"
    with pytest.raises(OptimizerStateError, match=message):
        state_buffers(optimizer, weight, "layer.weight", exponents(optimizer))


def test_a_buffer_can_be_made_known_or_left_alone() -> None:
    weight = nn.Parameter(torch.ones(2, 4))
    optimizer = _WithExtra([weight], lr=0.1)
    optimizer.fill(weight, torch.zeros(2, 4))
    known = exponents(optimizer, {"my_average": -3})
    assert [b.exponent for b in state_buffers(optimizer, weight, "w", known)] == [-3]
    still = exponents(optimizer, {"my_average": 0})
    assert state_buffers(optimizer, weight, "w", still) == ()


def test_a_known_buffer_of_another_shape_is_an_error() -> None:
    weight = nn.Parameter(torch.ones(2, 4))
    optimizer = torch.optim.SGD([weight], lr=0.1)
    optimizer.state[weight]["momentum_buffer"] = torch.zeros(8)
    with pytest.raises(OptimizerStateError, match=r"momentum_buffer.*\(8,\)"):
        state_buffers(optimizer, weight, "w", exponents(optimizer))


def test_missing_state_none_and_counters_need_nothing() -> None:
    weight = nn.Parameter(torch.ones(2, 4))
    optimizer = torch.optim.SGD([weight], lr=0.1)
    known = exponents(optimizer)
    assert state_buffers(optimizer, weight, "w", known) == ()
    assert weight not in optimizer.state
    optimizer.state[weight] = {"momentum_buffer": None, "calls": 3, "when": torch.tensor([1.0])}
    assert state_buffers(optimizer, weight, "w", known) == ()


def test_lbfgs_is_refused_once_it_has_state() -> None:
    weight = nn.Parameter(torch.ones(2, 4))
    optimizer = torch.optim.LBFGS([weight])
    assert state_buffers(optimizer, weight, "w", exponents(optimizer)) == ()
    optimizer.state[weight]["d"] = torch.zeros(8)
    with pytest.raises(OptimizerStateError, match="LBFGS keeps directions"):
        state_buffers(optimizer, nn.Parameter(torch.ones(1)), "w", exponents(optimizer))


def _fresh_class() -> type[torch.optim.Optimizer]:
    return type("Own", (_WithExtra,), {})


def test_a_registered_buffer_is_known_for_the_class_and_its_subclasses_alone() -> None:
    cls = _fresh_class()
    register_optimizer_state(cls, {"my_average": -3})
    register_optimizer_state(cls, {"my_average": -3})
    weights = [nn.Parameter(torch.ones(2, 4))]
    below = type("Below", (cls,), {})
    for each in (cls, below):
        assert exponents(each(weights, lr=0.1)) == {"momentum_buffer": -1, "my_average": -3}
    assert "my_average" not in exponents(_WithExtra(weights, lr=0.1))
    assert exponents(cls(weights, lr=0.1), {"my_average": 1})["my_average"] == 1


@pytest.mark.parametrize(
    ("cls", "buffers", "message"),
    [
        (nn.Linear, {"m": -1}, "subclass of torch.optim.Optimizer"),
        (3, {"m": -1}, "subclass of torch.optim.Optimizer"),
        (torch.optim.Adam, {"m": -1}, "derive a class"),
        (torch.optim.Optimizer, {"m": -1}, "derive a class"),
        (_OwnSGD, {}, "must be a dict"),
        (_OwnSGD, {"m": -1, "": 1}, "name must be a string"),
        (_OwnSGD, {"m": -1, "a * b * c": 1}, "name must be a string"),
        (_OwnSGD, {"m": -1, "n": 0.5}, "power of buffer 'n'"),
        (_OwnSGD, {"m": True}, "power of buffer 'm'"),
    ],
)
def test_what_cannot_be_registered_is_an_error(cls: Any, buffers: Any, message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        register_optimizer_state(cls, buffers)
    assert "m" not in exponents(_OwnSGD([nn.Parameter(torch.ones(1))], lr=0.1))


def test_another_power_for_a_registered_class_is_an_error_and_changes_nothing() -> None:
    cls = _fresh_class()
    register_optimizer_state(cls, {"my_average": -1})
    with pytest.raises(ArgumentError, match="Own is registered with"):
        register_optimizer_state(cls, {"my_average": -2})
    assert exponents(cls([nn.Parameter(torch.ones(1))], lr=0.1))["my_average"] == -1
