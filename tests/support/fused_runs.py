"""Optimizers with all their options, and training with ENorm inside their steps or after."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer

from enorm_fx.enorm import ENorm
from enorm_fx.model_plan import Plan
from tests.support.plans import Case

Make = Callable[[Iterable[nn.Parameter]], Optimizer]

OPTIMIZERS: dict[str, Make] = {
    "sgd": lambda ps: SGD(ps, lr=1e-3, weight_decay=1e-2),
    "momentum": lambda ps: SGD(ps, lr=1e-3, momentum=0.9, dampening=0.3, weight_decay=1e-2),
    "nesterov": lambda ps: SGD(ps, lr=1e-3, momentum=0.9, nesterov=True),
    "ascent": lambda ps: SGD(ps, lr=1e-3, momentum=0.9, maximize=True, weight_decay=1e-2),
    "adam": lambda ps: Adam(ps, lr=1e-4, weight_decay=1e-2, foreach=True),
    "adam, ascent": lambda ps: Adam(ps, lr=1e-4, maximize=True),
    "adamw": lambda ps: AdamW(ps, lr=1e-4, fused=True),
    "amsgrad": lambda ps: AdamW(ps, lr=1e-4, amsgrad=True),
}


def loss_of(model: nn.Module, inputs: Any) -> Tensor:
    """Of outputs of any size; its gradients are neither large nor zero."""
    found = model(*inputs) if isinstance(inputs, tuple) else model(inputs)
    outputs = found if isinstance(found, tuple) else (found,)
    terms = [y.tanh().square().mean() for y in outputs if y.requires_grad]
    return torch.stack(terms).sum() if terms else torch.zeros((), requires_grad=True)


def train(
    case: Case, optimizer: Optimizer, enorm: ENorm | None, steps: int, before: Any = None
) -> None:
    """enorm: its `step` follows the optimizer's; None where it needs no call."""
    for number in range(steps):
        optimizer.zero_grad()
        loss_of(case.model, case.inputs).backward()
        if before is not None:
            before(number)
        optimizer.step()
        if enorm is not None:
            enorm.step()


def trained(
    case: Case, make: Make, steps: int, *, fused: bool, before: Any = None, **settings: Any
) -> tuple[Optimizer, ENorm]:
    """Nothing is pending afterwards."""
    optimizer = make(case.model.parameters())
    settings = {"last_layer": True, **settings}
    enorm = ENorm(case.plan, optimizer, fused=fused, **settings)
    train(case, optimizer, None if fused else enorm, steps, before)
    enorm.flush_()
    return optimizer, enorm


def waiting(case: Case, make: Make, steps: int = 2, **settings: Any) -> tuple[Optimizer, ENorm]:
    """After some fused steps, with gradients for the next one."""
    optimizer = make(case.model.parameters())
    enorm = ENorm(case.plan, optimizer, fused=True, **settings)
    train(case, optimizer, None, steps)
    optimizer.zero_grad()
    loss_of(case.model, case.inputs).backward()
    return optimizer, enorm


def read_by_a_step(model: nn.Module, optimizer: Optimizer) -> Iterator[tuple[str, Tensor]]:
    """Gradients, parameters and buffers, each with its name in messages."""
    for name, p in model.named_parameters():
        assert p.grad is not None
        yield f"the gradient of '{name}'", p.grad
        yield f"'{name}'", p.detach()
        for key, value in optimizer.state.get(p, {}).items():
            if value.dim():
                yield f"the buffer '{key}' of '{name}'", value


def everything(model: nn.Module, optimizer: Optimizer) -> dict[str, Tensor]:
    """Copies of weights and of the optimizer's state, by name."""
    found = {name: p.detach().clone() for name, p in model.named_parameters()}
    for name, p in model.named_parameters():
        for key, value in optimizer.state.get(p, {}).items():
            if isinstance(value, Tensor):
                found[f"{name}.{key}"] = value.clone().reshape(-1)
    return found


def difference(one: dict[str, Tensor], other: dict[str, Tensor], least: float = 1e-300) -> float:
    """The largest, in units of the largest entry of the tensor; inf where names differ, or NaN.

    least: the smallest such unit. Of a tensor that is zero but for rounding, no digit need agree.
    """
    if one.keys() != other.keys():
        return float("inf")
    worst = 0.0
    for name, a in one.items():
        if a.numel():
            a, b = a.double(), other[name].double()
            size = b.abs().max().clamp(min=least)
            worst = max(worst, float(((a - b).abs().max() / size).nan_to_num(nan=float("inf"))))
    return worst


def case_of(model: nn.Module, plan: Plan, inputs: Any) -> Case:
    return Case("made", model, plan, inputs)
