"""A compiled step notices when its memory changes hands, or its model."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import nn

from enorm_fx.enorm import ENorm
from enorm_fx.errors import PlanError
from tests.support.helpers import (
    BACKENDS,
    buffers,
    careful,
    largest_error,
    make,
    same_bits,
    tensors_of,
    trained,
    weights,
)
from tests.support.plans import Case

# ---- other memory ----


def _replace_parameter(case: Case, _: torch.optim.Optimizer) -> None:
    layer = case.model.get_submodule("up1")
    layer.weight = nn.Parameter(2 * layer.weight.detach())


def _replace_module(case: Case, _: torch.optim.Optimizer) -> None:
    layer = copy.deepcopy(case.model.get_submodule("up1"))
    case.model.add_module("up1", layer)


def _swap_data(case: Case, _: torch.optim.Optimizer) -> None:
    weight = case.model.get_parameter("up1.weight")
    weight.data = 2 * weight.data


def _swap_data_for_the_transposed(case: Case, _: torch.optim.Optimizer) -> None:
    weight = case.model.get_parameter("mix.weight")
    weight.data = weight.data.t()


def _cast(case: Case, optimizer: torch.optim.Optimizer) -> None:
    case.model.float()
    for state in optimizer.state.values():
        state["momentum_buffer"] = state["momentum_buffer"].float()


def _load_weights(case: Case, _: torch.optim.Optimizer) -> None:
    state = {k: 2 * v for k, v in case.model.state_dict().items()}
    case.model.load_state_dict(state, assign=True)


def _load_optimizer(_: Case, optimizer: torch.optim.Optimizer) -> None:
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))


def _replace_buffer(case: Case, optimizer: torch.optim.Optimizer) -> None:
    state = optimizer.state[case.model.get_parameter("up1.weight")]
    state["momentum_buffer"] = 3 * state["momentum_buffer"]


def _forget_state(_: Case, optimizer: torch.optim.Optimizer) -> None:
    optimizer.state.clear()


CHANGES: list[tuple[str, Callable[[Case, torch.optim.Optimizer], None]]] = [
    ("residual", _replace_parameter),
    ("residual", _replace_module),
    ("residual", _swap_data),
    ("linear-residual", _swap_data_for_the_transposed),
    ("residual", _cast),
    ("residual", _load_weights),
    ("residual", _load_optimizer),
    ("residual", _replace_buffer),
    ("residual", _forget_state),
]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("kind", "change"), CHANGES, ids=[f.__name__[1:] for _, f in CHANGES])
def test_what_changes_hands_is_found_again(
    kind: str, change: Callable[[Case, torch.optim.Optimizer], None], backend: str
) -> None:
    case = make(kind, seed=3)
    optimizer = trained(case)
    enorm = ENorm(case.plan, optimizer, last_layer=True, backend=backend, start="as_is")
    enorm.step()
    # What was there before the change must not be written to ever again.
    stale = {k: (v, v.clone()) for k, v in tensors_of(case.model, optimizer).items()}
    change(case, optimizer)
    twin = copy.deepcopy(case.model)
    now = {t.data_ptr() for t in tensors_of(case.model, optimizer).values()}
    expected, expected_buffers = careful(case, optimizer)
    enorm.step()
    assert largest_error(weights(case.model), expected) < 1e-6
    assert largest_error(buffers(optimizer), expected_buffers) < 1e-6
    assert not same_bits(weights(case.model), weights(twin))  # it did something
    written = [k for k, (v, old) in stale.items() if v.data_ptr() not in now and not v.equal(old)]
    assert not written


# ---- another model ----


def _add_module(model: nn.Module) -> None:
    model.add_module("adapter", nn.Linear(5, 5))


def _add_parameter(model: nn.Module) -> None:
    model.get_submodule("up1").register_parameter("gain", nn.Parameter(torch.ones(1)))


def _replace_activation(model: nn.Module) -> None:
    model[1] = nn.Sigmoid()  # type: ignore[index]


def _fewer_parameters(model: nn.Module) -> None:
    model[0] = nn.Linear(3, 4, bias=False)  # type: ignore[index]


def _freeze(model: nn.Module) -> None:
    model[2].weight.requires_grad_(False)  # type: ignore[index]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_add_module, r"'adapter' was nothing and is Linear"),
        (_replace_activation, r"'1' was ReLU and is Sigmoid"),
        (_fewer_parameters, r"no parameter '0\.bias' any more"),
        (_freeze, r"'2.weight' has been frozen since"),
    ],
    ids=["module", "activation", "fewer", "frozen"],
)
def test_a_model_that_was_changed_must_be_analyzed_again(
    change: Callable[[nn.Module], None], message: str
) -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 2))
    enorm = ENorm(model, start="as_is")
    enorm.step()
    change(model)
    with torch.no_grad():
        model[0].weight *= 2
    old = weights(model)
    for _ in range(2):
        with pytest.raises(PlanError, match=message):
            enorm.step()
    assert same_bits(weights(model), old)


def test_a_new_parameter_must_be_analyzed() -> None:
    case = make("residual", seed=3)
    enorm = ENorm(case.plan, start="as_is")
    enorm.step()
    _add_parameter(case.model)
    with pytest.raises(PlanError, match=r"a new parameter 'up1\.gain'"):
        enorm.step()


def test_what_was_frozen_from_the_start_may_move_on() -> None:
    import enorm_fx

    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 2))
    model[0].requires_grad_(False)
    enorm = ENorm(enorm_fx.analyze(model, frozen="rescale"), start="as_is")
    model[2].requires_grad_(False)
    old = weights(model)
    enorm.step()
    assert not same_bits(weights(model), old)


@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_is_compiled_again_while_nothing_changes(
    backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = make("residual", seed=3)
    optimizer = trained(case)
    enorm = ENorm(case.plan, optimizer, backend=backend, start="as_is")
    enorm.step()
    monkeypatch.setattr("enorm_fx.step.runner.compile_step", None)
    optimizer.step()
    old = weights(case.model)
    enorm.step()
    assert not same_bits(weights(case.model), old)
