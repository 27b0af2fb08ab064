"""What tests compare with, and the runs that they start from."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from enorm_fx.model_plan import Plan
from enorm_fx.step.careful import CarefulStep
from enorm_fx.step.native.compiler import find_compiler
from tests.support.plans import Case, all_cases

ORDERS = ("sequential", "colored", "simultaneous")
BACKENDS = ["eager", *(["native"] if find_compiler() else [])]
KINDS = [case.name for case in all_cases()]


def make(kind: str, seed: int = 0) -> Case:
    return next(case for case in all_cases(seed) if case.name == kind)


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def outputs(case: Case) -> Tensor:
    with torch.no_grad():
        return case.model(case.inputs)


def random_scales(plan: Plan, seed: int = 1, size: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return size * torch.randn(plan.num_scales, generator=generator, dtype=torch.float64)


def largest_error(actual: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> float:
    """The largest relative difference of any entry; inf where one side is NaN alone."""
    worst = 0.0
    for name, right in expected.items():
        difference = (actual[name].double() - right.double()).abs()
        relative = difference / right.double().abs().clamp(min=1e-300)
        worst = max(worst, float(relative.nan_to_num(nan=math.inf).max()))
    return worst


def same_bits(actual: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> bool:
    """Also for NaN, whose bits count like any other's."""
    return actual.keys() == expected.keys() and all(
        _bytes(actual[k]).equal(_bytes(expected[k])) for k in expected
    )


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def trained(case: Case, **settings: Any) -> torch.optim.SGD:
    """SGD after three steps: it has buffers."""
    settings = {"lr": 1e-6, "momentum": 0.9, **settings}
    optimizer = torch.optim.SGD(case.model.parameters(), **settings)
    for _ in range(3):
        optimizer.zero_grad()
        case.model(case.inputs).square().mean().backward()
        optimizer.step()
    return optimizer


def buffers(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    state = list(optimizer.state.values())
    return {f"{i}.{k}": v.clone() for i, s in enumerate(state) for k, v in s.items()}


def tensors_of(
    model: nn.Module, optimizer: torch.optim.Optimizer | None = None
) -> dict[str, Tensor]:
    """Everything that a step may write, by name: the tensors themselves."""
    found = {name: p.detach() for name, p in model.named_parameters()}
    for number, held in enumerate(optimizer.state.values() if optimizer else ()):
        found |= {f"{number}.{key}": v for key, v in held.items() if isinstance(v, Tensor)}
    return found


def copied(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in tensors.items()}


def restore_(tensors: Mapping[str, Tensor], old: Mapping[str, Tensor]) -> None:
    for name, tensor in tensors.items():
        tensor.copy_(old[name])


def careful(
    case: Case, optimizer: torch.optim.Optimizer
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Weights and buffers after a step of the careful program; the case stays as it is."""
    tensors = tensors_of(case.model, optimizer)
    old = copied(tensors)
    CarefulStep(case.plan, case.plan.groups, p=2.0).run_((optimizer,), None, 1)
    result = weights(case.model), buffers(optimizer)
    restore_(tensors, old)
    return result
