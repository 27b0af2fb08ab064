"""What one step touches: parameters, their gradients and buffers; how large it all is."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from enorm_fx.errors import NonFiniteError, PlanError
from enorm_fx.step.checks import find_parameter
from enorm_fx.step.fused.optimizers import ADAM, BUFFERS, RESTING, Sizes, after, kind_of, rates_of
from enorm_fx.step.memory import check_plain

_ROOM = 8.0  # what is left between a bound and the end of a range, for rounding
_FARTHEST = 700.0  # of a logarithm, where exp overflows


@dataclass(frozen=True, slots=True, eq=False)
class Held:
    """A parameter. group: the optimizer's, None for one that it does not hold."""

    name: str
    parameter: nn.Parameter
    group: dict[str, Any] | None


def held_by(model: nn.Module, moved: Iterable[str], optimizer: Optimizer) -> list[Held]:
    """The optimizer's parameters, and those that are moved by groups but are not among them."""
    names: dict[int, str] = {}
    for name, parameter in model.named_parameters():
        names.setdefault(id(parameter), name)
    found: dict[int, Held] = {}
    for number, group in enumerate(optimizer.param_groups):
        for place, parameter in enumerate(group["params"]):
            name = names.get(id(parameter), f"parameter {place} of the optimizer's group {number}")
            found[id(parameter)] = Held(name, parameter, group)
    for name in moved:
        parameter = find_parameter(model, name)
        found.setdefault(id(parameter), Held(name, parameter, None))
    return list(found.values())


def gradient_of(held: Held) -> Tensor | None:
    """The gradient that a step would read. Raises PlanError for one that is no plain tensor."""
    gradient = held.parameter.grad
    if held.group is None or gradient is None:
        return None
    if gradient.layout != torch.strided:
        raise PlanError(
            f"the gradient of '{held.name}' is sparse, which fused=True does not take; nothing was "
            "written. Use fused=False"
        )
    check_plain(gradient, f"the gradient of '{held.name}'")
    return gradient


def buffers_of(held: Held, optimizer: Optimizer) -> dict[str, Tensor]:
    """Tensors of the optimizer's state that are as large as the parameter, by name."""
    state = optimizer.state.get(held.parameter, {})
    return {
        name: value
        for name, value in state.items()
        if isinstance(value, Tensor) and name != "step" and value.shape == held.parameter.shape
    }


def check_gradients(held: Iterable[Held]) -> float:
    """The largest entry of any gradient. Raises NonFiniteError where one is not finite."""
    found = [(h, g) for h in held if (g := gradient_of(h)) is not None and g.numel()]
    sizes = _largest([g for _, g in found])
    for (h, gradient), size in zip(found, sizes, strict=True):
        if not math.isfinite(size):
            _refuse(f"the gradient of '{h.name}'", gradient)
    return max(sizes, default=0.0)


def check_held(held: Iterable[Held], optimizer: Optimizer) -> Sizes:
    """The largest entries of parameters and buffers. Raises NonFiniteError where one is not
    finite. A second mean with entries below zero is taken for infinitely large."""
    places: list[tuple[str, Tensor, int]] = []
    for h in held:
        if h.parameter.numel():
            places.append((f"'{h.name}'", h.parameter.detach(), 0))
            for name, buffer in buffers_of(h, optimizer).items():
                slot = next((b.index(name) + 1 for b in BUFFERS if name in b), 1)
                places.append((f"the buffer '{name}' of '{h.name}'", buffer, slot))
    most = [0.0] * 4
    for (what, tensor, slot), size in zip(
        places, _largest([tensor for _, tensor, _ in places]), strict=True
    ):
        if not math.isfinite(size):
            _refuse(what, tensor)
        most[slot] = max(most[slot], size)
    squares = [(slot, tensor) for _, tensor, slot in places if slot > 1]
    least = _transferred([tensor.amin().double() for _, tensor in squares])
    for (slot, _), smallest in zip(squares, least, strict=True):
        if smallest < 0:
            most[slot] = math.inf
    return Sizes(*most)


def _largest(tensors: list[Tensor]) -> list[float]:
    """max |x| of each; NaN and inf come through."""
    return _transferred([torch.linalg.vector_norm(t, math.inf).double() for t in tensors])


def _transferred(numbers: Sequence[Tensor]) -> list[float]:
    """Of tensors of one entry, float64, with one transfer for each device."""
    by_device: dict[torch.device, list[int]] = {}
    for number, tensor in enumerate(numbers):
        by_device.setdefault(tensor.device, []).append(number)
    found = [0.0] * len(numbers)
    for places in by_device.values():
        for place, number in zip(
            places, torch.stack([numbers[k] for k in places]).tolist(), strict=True
        ):
            found[place] = number
    return found


def _refuse(what: str, tensor: Tensor) -> None:
    bad = int((~tensor.isfinite()).sum())
    raise NonFiniteError(f"{what} has {bad} entries that are not finite; nothing was written")


def reach_of(farthest: float) -> float:
    """What no factor and no inverse of one is larger than, of the largest |log factor|."""
    return math.exp(farthest) if farthest < _FARTHEST else math.inf


@dataclass(frozen=True, slots=True)
class Limits:
    """How far numbers may go. entries: of the largest parameter; power: p of the sums, or inf."""

    largest: float
    tiny: float
    sums: float
    entries: int
    power: float

    def admit(self, sizes: Sizes, way: float) -> bool:
        """Whether no number, and no sum over a parameter, can leave its range."""
        if not way < self.largest:
            return False
        if math.isinf(self.power) or not sizes.weight:
            return True
        logs = math.log(self.entries) + self.power * math.log(sizes.weight)
        return logs < math.log(self.sums)


def limits_of(held: Iterable[Held], p: float) -> Limits:
    found = [torch.finfo(h.parameter.dtype) for h in held]
    most = min((f.max for f in found), default=math.inf)
    # Sums are taken in float32 or wider.
    sums = max(most, torch.finfo(torch.float32).max)
    return Limits(
        most / _ROOM,
        max((f.tiny for f in found), default=0.0),
        sums / _ROOM,
        max((h.parameter.numel() for h in held), default=1) or 1,
        p,
    )


def steps_of(held: Iterable[Held], optimizer: Optimizer) -> list[float]:
    """The number of the step that each parameter makes next, from 1."""
    made = [optimizer.state.get(h.parameter, {}).get("step", 0.0) for h in held]
    # Of those on a device, one transfer for each device.
    there = [k for k, step in enumerate(made) if isinstance(step, Tensor) and not step.is_cpu]
    found = _transferred([made[k].double().reshape(()) for k in there])
    for k, number in zip(there, found, strict=True):
        made[k] = number
    return [float(step) + 1 for step in made]


def bounds_after(
    optimizer: Optimizer,
    stepping: Iterable[tuple[dict[str, Any], float]],
    sizes: Sizes,
    gradient: float,
    reach: float,
    tiny: float,
) -> tuple[Sizes, float]:
    """Bounds on all entries after a step, and on all numbers on the way. See `after`.

    stepping: the groups, and the number of the step that their parameters make.
    """
    total, most = after(ADAM, RESTING, sizes, 0.0, reach, 0.0)
    for group, step in stepping:
        rates = rates_of(optimizer, group, step)
        found, way = after(kind_of(optimizer, group), rates, sizes, gradient, reach, tiny)
        total, most = total.joined(found), max(most, way)
    return total, most
