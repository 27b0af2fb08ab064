"""Fused steps are all or nothing, refuse what is not known to commute, and give `step` back."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer
from torch.optim.lr_scheduler import ExponentialLR

import enorm_fx
from enorm_fx.enorm import ENorm
from enorm_fx.errors import ArgumentError, NonFiniteError, PlanError
from enorm_fx.step.fused.optimizers import Rates, Sizes, after
from tests.support.fused_runs import (
    OPTIMIZERS,
    difference,
    everything,
    loss_of,
    read_by_a_step,
    train,
    trained,
    waiting,
)
from tests.support.helpers import BACKENDS, make, same_bits, weights
from tests.support.plans import Case


def made(
    backend: str, name: str = "amsgrad", steps: int = 2, dtype: torch.dtype = torch.float64
) -> tuple[Case, Optimizer, ENorm]:
    """After some steps, with gradients for the next one."""
    case = make("residual", seed=3)
    case = Case(case.name, case.model.to(dtype), case.plan, case.inputs.to(dtype))
    return case, *waiting(case, OPTIMIZERS[name], steps, backend=backend)


# ---- all or nothing ----


@pytest.mark.parametrize("name", ["sgd", "momentum", "amsgrad"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_is_written_where_a_number_is_not_finite(backend: str, name: str) -> None:
    case, optimizer, enorm = made(backend, name)
    assert enorm.backend == backend
    planted = list(read_by_a_step(case.model, optimizer))
    old, state = everything(case.model, optimizer), enorm.state_dict()
    for what, tensor in planted:
        for place, value in ((0, math.nan), (-1, math.inf), (0, -math.inf), (-1, math.nan)):
            good = float(tensor.view(-1)[place])
            tensor.view(-1)[place] = value
            poisoned = everything(case.model, optimizer)
            with pytest.raises(NonFiniteError, match=f"^{what} has 1 entries that are not finite"):
                optimizer.step()
            assert same_bits(everything(case.model, optimizer), poisoned)
            tensor.view(-1)[place] = good
    assert same_bits(everything(case.model, optimizer), old)
    assert enorm.state_dict() == state
    # As if nothing had been.
    other, second, _ = made(backend, name)
    for one in (optimizer, second):
        one.step()
    assert difference(everything(case.model, optimizer), everything(other.model, second)) < 1e-13


@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_is_written_before_the_start(backend: str) -> None:
    case, optimizer, enorm = made(backend, steps=0)
    old = everything(case.model, optimizer)
    gradient = case.model.get_parameter("head.bias").grad
    assert gradient is not None
    gradient[-1] = math.nan
    with pytest.raises(NonFiniteError, match=r"the gradient of 'head\.bias'"):
        optimizer.step()
    assert same_bits(everything(case.model, optimizer), old)
    assert enorm.state_dict()["started"] is False


@pytest.mark.parametrize("name", ["momentum", "amsgrad"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_finite_gradients_that_overflow_are_refused(backend: str, name: str) -> None:
    for size in (1e38, 3e30, 1e25):  # of the weight, of its square, of a sum of squares or less
        case, optimizer, enorm = made(backend, name, dtype=torch.float32)
        for p in case.model.parameters():
            assert p.grad is not None
            p.grad.fill_(size)
        if name == "momentum":
            optimizer.param_groups[0]["lr"] = 1.0
        old, state = everything(case.model, optimizer), enorm.state_dict()
        with pytest.raises(NonFiniteError, match=r"after this step .*nothing was written"):
            optimizer.step()
        assert same_bits(everything(case.model, optimizer), old)
        assert enorm.state_dict() == state
        for p in case.model.parameters():
            assert p.grad is not None
            assert bool((p.grad == size).all())


@pytest.mark.parametrize("name", ["momentum", "amsgrad"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_what_might_overflow_and_does_not_is_made(backend: str, name: str) -> None:
    """An eps of next to nothing gives no bound, nor does a gradient of nearly any size."""
    found = []
    for fused in (False, True):
        case = make("residual", seed=3)
        optimizer = OPTIMIZERS[name](case.model.parameters())
        enorm = ENorm(case.plan, optimizer, last_layer=True, fused=fused, backend=backend)

        def before(number: int, optimizer: Optimizer = optimizer, case: Case = case) -> None:
            if number == 3:
                optimizer.param_groups[0].update({"eps": 1e-310, "lr": 1e-160})
                if "momentum" in optimizer.param_groups[0]:
                    for p in case.model.parameters():
                        assert p.grad is not None
                        p.grad *= 1e157

        train(case, optimizer, None if fused else enorm, 5, before)
        enorm.flush_()
        found.append(everything(case.model, optimizer))
    assert difference(found[1], found[0]) < 1e-11


def test_bounds_hold_and_notice() -> None:
    """Random steps of every kind stay below them; a step without eps has none."""
    generator = torch.Generator().manual_seed(0)
    for seed in range(50):
        number = torch.rand(6, generator=generator, dtype=torch.float64).tolist()
        sizes = Sizes(3.0, 2.0, 1.5, 4.0)
        rates = Rates(
            sign=-1.0, decay=number[0], shrink=1 - number[1], rate=5 * number[2], keep=number[3],
            take=number[4], direct=1.0, through=number[3], keep2=number[5], take2=1 - number[5],
            root=1.0, eps=1e-2,
        )  # fmt: skip
        reach, largest = 2.0, 1.0
        draw = [2 * torch.rand(5, 400, generator=generator, dtype=torch.float64) - 1][0]
        up = reach ** draw[0]
        w, g = 3.0 * draw[1] * up, draw[2] * largest / up
        m, v = 2.0 * draw[3] / up, 1.5 * draw[4].abs() / up**2
        y = rates.sign * g + rates.decay * w
        kind = seed % 3
        if kind == 0:
            w = w - rates.rate * y
        elif kind == 1:
            m = rates.keep * m + rates.take * y
            w = w - rates.rate * (rates.direct * y + rates.through * m)
        else:
            m = m + rates.take * (y - m)
            v = rates.keep2 * v + rates.take2 * y * y
            w = rates.shrink * w - rates.rate * m / (v.sqrt() + rates.eps)
        found, way = after(kind, rates, sizes, largest, reach, 1e-300)
        assert float(w.abs().max()) <= found.weight <= way
        assert float(m.abs().max()) <= found.first
        assert float(v.max()) <= found.second
    assert after(2, Rates(rate=1.0, root=1.0), Sizes(1.0), 1.0, 1.0, 1e-38)[1] == math.inf
    assert after(0, Rates(rate=math.nan), Sizes(1.0), 1.0, 1.0, 1e-38)[1] == math.inf


# ---- refusals ----


class Own(SGD):
    """May do anything."""


@pytest.mark.parametrize(
    ("make_optimizer", "settings", "message"),
    [
        (lambda ps: torch.optim.RMSprop(ps), {}, "knows the steps of SGD, Adam, AdamW .* RMSprop"),
        (lambda ps: Own(ps, lr=0.1), {}, "not that of Own"),
        (lambda ps: Adam(ps, differentiable=True), {}, "differentiable=True does not allow"),
        (lambda ps: None, {}, "fused=True needs the optimizer"),
        (lambda ps: SGD(ps), {"converge": True}, "converge=True makes none"),
        (lambda ps: SGD(ps), {"check": "async"}, "leave check at 'sync'"),
        (lambda ps: SGD(ps), {"backend": "cudagraph"}, "backend at 'auto'"),
        (lambda ps: SGD(ps), {"fused": 1}, "fused must be True or False, not 1"),
    ],
)
def test_what_is_not_known_to_commute_is_refused(
    make_optimizer: Any, settings: dict[str, Any], message: str
) -> None:
    case = make("residual")
    optimizer = make_optimizer(case.model.parameters())
    with pytest.raises(ArgumentError, match=message):
        ENorm(case.plan, optimizer, **{"fused": True, **settings})
    assert optimizer is None or "step" not in vars(optimizer)


def test_a_plan_that_is_not_exact_is_refused() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 3)
    )
    plan = enorm_fx.analyze(model, torch.randn(2, 3, 8, 8))
    assert not plan.exact
    with pytest.raises(ArgumentError, match=r"keeps the function.*batchnorm='affine'"):
        ENorm(plan, SGD(model.parameters()), fused=True)


def test_sparse_gradients_are_refused() -> None:
    case, optimizer, _ = made("eager", "sgd")
    old = weights(case.model)
    parameter = case.model.get_parameter("head.weight")
    assert parameter.grad is not None
    parameter.grad = parameter.grad.to_sparse()
    with pytest.raises(PlanError, match=r"gradient of 'head\.weight' is sparse"):
        optimizer.step()
    assert same_bits(weights(case.model), old)


def test_step_is_left_to_the_optimizer() -> None:
    _, _, enorm = made("eager")
    with pytest.raises(ArgumentError, match="leave out step"):
        enorm.step()


# ---- taking over, and giving back ----


def test_it_is_given_back() -> None:
    case = make("residual", seed=3)
    optimizer = SGD(case.model.parameters(), lr=1e-3, momentum=0.9)
    with ENorm(case.plan, optimizer, fused=True) as enorm:
        assert "step" in vars(optimizer)
        with pytest.raises(ArgumentError, match="has been replaced, by another ENorm"):
            ENorm(case.plan, optimizer, fused=True)
        train(case, optimizer, None, 2)
        assert enorm.state_dict()["pending"]
    assert "step" not in vars(optimizer)
    assert not enorm.state_dict()["pending"]  # what was pending has been applied
    train(case, optimizer, None, 2)
    assert enorm.state_dict()["calls"] == 2
    enorm.attach()
    train(case, optimizer, None, 1)
    assert enorm.state_dict()["calls"] == 3
    enorm.detach()
    enorm.detach()
    assert "step" not in vars(optimizer)


def test_somebody_elses_step_is_refused() -> None:
    case = make("residual", seed=3)
    optimizer = SGD(case.model.parameters(), lr=1e-3)
    own = optimizer.step
    optimizer.step = lambda closure=None: own(closure)  # type: ignore[method-assign]
    with pytest.raises(ArgumentError, match="has been replaced"):
        ENorm(case.plan, optimizer, fused=True)


@pytest.mark.parametrize("first", [True, False])
def test_schedulers_may_come_before_or_after(first: bool) -> None:
    case = make("residual", seed=3)
    optimizer = SGD(case.model.parameters(), lr=1e-3, momentum=0.9)
    scheduler = ExponentialLR(optimizer, 0.5) if first else None
    enorm = ENorm(case.plan, optimizer, fused=True)
    scheduler = scheduler or ExponentialLR(optimizer, 0.5)
    for calls in (1, 2):
        train(case, optimizer, None, 1)
        scheduler.step()  # warns, which is an error here, if it has not seen the step
        assert enorm.state_dict()["calls"] == calls
    enorm.detach()
    train(case, optimizer, None, 1)
    scheduler.step()
    assert enorm.state_dict()["calls"] == 2
    enorm.attach()
    train(case, optimizer, None, 1)
    assert enorm.state_dict()["calls"] == 3
    assert optimizer.param_groups[0]["lr"] == 1e-3 / 8


def test_closures_hooks_and_copies() -> None:
    case = make("residual", seed=3)
    optimizer = SGD(case.model.parameters(), lr=1e-3, momentum=0.9)
    seen: list[str] = []
    optimizer.register_step_pre_hook(lambda *_: seen.append("before"))
    optimizer.register_step_post_hook(lambda *_: seen.append("after"))
    enorm = ENorm(case.plan, optimizer, fused=True)

    def closure() -> Tensor:
        seen.append("closure")
        optimizer.zero_grad()
        loss = loss_of(case.model, case.inputs)
        loss.backward()
        return loss

    loss = optimizer.step(closure)
    assert loss is not None
    assert loss.requires_grad
    assert seen == ["before", "closure", "after"]
    assert enorm.state_dict()["calls"] == 1
    other = copy.deepcopy(optimizer)
    assert "step" not in vars(other)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_step_that_a_scaler_passes_over_changes_nothing(backend: str) -> None:
    case, optimizer, enorm = made(backend, "adamw", dtype=torch.float32)
    old, state = everything(case.model, optimizer), enorm.state_dict()
    for p in case.model.parameters():
        assert p.grad is not None
        p.grad.fill_(math.inf)
    # What GradScaler tells an optimizer that unscales by itself, as AdamW(fused=True) does.
    optimizer.found_inf = torch.ones(())  # type: ignore[attr-defined]
    optimizer.grad_scale = torch.full((), 1024.0)  # type: ignore[attr-defined]
    optimizer.step()
    assert same_bits(everything(case.model, optimizer), old)
    assert enorm.state_dict() == state


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_optimizer_that_unscales_by_itself(backend: str) -> None:
    found = []
    for scale in (1.0, 1024.0):
        case, optimizer, enorm = made(backend, "adamw", dtype=torch.float32)
        for p in case.model.parameters():
            assert p.grad is not None
            p.grad *= scale
        if scale != 1:
            optimizer.found_inf = torch.zeros(())  # type: ignore[attr-defined]
            optimizer.grad_scale = torch.full((), scale)  # type: ignore[attr-defined]
        optimizer.step()
        enorm.flush_()
        found.append(everything(case.model, optimizer))
    assert difference(found[1], found[0]) < 1e-6


def test_flush_takes_gradients_along() -> None:
    case, optimizer, enorm = made(BACKENDS[-1], "momentum")
    other, second, _ = made(BACKENDS[-1], "momentum")
    enorm.flush_()
    enorm.flush_()
    optimizer.step()
    second.step()
    assert difference(everything(case.model, optimizer), everything(other.model, second)) < 1e-13


def test_an_unfused_enorm_has_nothing_to_flush() -> None:
    case = make("residual", seed=3)
    old = weights(case.model)
    ENorm(case.plan, start="as_is").flush_()
    assert same_bits(weights(case.model), old)
    optimizer, _ = trained(case, OPTIMIZERS["sgd"], 1, fused=False)
    with ENorm(case.plan, optimizer) as enorm:
        train(case, optimizer, None, 1)
        assert enorm.state_dict()["calls"] == 1
    train(case, optimizer, None, 1)
    assert enorm.state_dict()["calls"] == 1


def test_a_bf16_model_falls_back_without_a_word_lost() -> None:
    from enorm_fx.step import backends

    backends._warned.clear()
    case = make("residual", seed=3)
    case = Case(case.name, case.model.bfloat16(), case.plan, case.inputs.bfloat16())
    optimizer = AdamW(case.model.parameters())
    enorm = ENorm(case.plan, optimizer, fused=True)
    with pytest.warns(RuntimeWarning, match="cannot be used: '.*' is torch.bfloat16 on cpu"):
        train(case, optimizer, None, 2)
    assert enorm.backend == "eager"
    backends._warned.clear()
