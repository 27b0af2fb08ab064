"""The paper's method as one would write it without this library: layer after layer, in place.

For each group in turn: the norms of what comes in and of what goes out of every unit by
`torch.linalg.vector_norm`, d = sqrt(outgoing / incoming), then every weight and every momentum
buffer of the group times d or 1 / d. So a weight between two groups is read and written twice. What
is not there, on purpose: any check (dead units, overflow), c, p, cycles, workspaces.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from enorm_fx.model_plan import Plan
from enorm_fx.symmetry.solution import ScaleTerm


@dataclass(frozen=True, slots=True)
class Axis:
    """One axis of a parameter that a group scales.

    axis:     the axis.
    channels: (size,) int64, the group's channel at each position; None where they are in order.
    counted:  part of the norm; biases are scaled only.
    """

    parameter: nn.Parameter
    axis: int
    channels: Tensor | None
    counted: bool

    def norm(self, channels: int) -> Tensor:
        """l2 norm by channel, (channels,)."""
        others = [k for k in range(self.parameter.dim()) if k != self.axis]
        norms: Tensor = torch.linalg.vector_norm(self.parameter, dim=others)
        if self.channels is None:
            return norms
        squares = norms.new_zeros(channels).index_add_(0, self.channels, norms.square())
        return squares.sqrt()

    def spread(self, factors: Tensor) -> Tensor:
        """Factors by channel in a shape that multiplies the parameter."""
        if self.channels is not None:
            factors = factors[self.channels]
        return factors.view([-1 if k == self.axis else 1 for k in range(self.parameter.dim())])


class PlainLoop:
    """One sequential l2 cycle with c = 1 over a plan's groups, the last layer's left out.

    Raises ValueError for a plan that scales anything but whole axes by one group, once.
    """

    def __init__(self, plan: Plan, optimizer: Optimizer, *, last_layer: bool = False) -> None:
        self._optimizer = optimizer
        incoming: list[list[Axis]] = [[] for _ in plan.groups]
        outgoing: list[list[Axis]] = [[] for _ in plan.groups]
        frozen: set[int] = set()
        for scaled in plan.parameters:
            parameter = plan.model.get_parameter(scaled.name)
            for term in scaled.terms:
                number, axis = _axis(plan, term, parameter, scaled.counted)
                (incoming if term.coefficient > 0 else outgoing)[number].append(axis)
                if scaled.last and not last_layer:
                    frozen.add(number)
        for ups, downs in zip(incoming, outgoing, strict=True):
            if {id(axis.parameter) for axis in ups} & {id(axis.parameter) for axis in downs}:
                raise ValueError("a weight both feeds and reads a group: d has no closed form here")
        self._groups = [
            (group.channels, incoming[number], outgoing[number])
            for number, group in enumerate(plan.groups)
            # With nothing in the norm on one side there is no minimum.
            if number not in frozen and _counts(incoming[number]) and _counts(outgoing[number])
        ]

    @torch.no_grad()
    def step(self) -> None:
        """Balance every group in turn; weights and momentum buffers are written."""
        for channels, incoming, outgoing in self._groups:
            d = (_norm(outgoing, channels) / _norm(incoming, channels)).sqrt()
            inverse = 1 / d
            for axes, factors, inverses in ((incoming, d, inverse), (outgoing, inverse, d)):
                for axis in axes:
                    axis.parameter.mul_(axis.spread(factors))
                    momentum = self._optimizer.state[axis.parameter].get("momentum_buffer")
                    if momentum is not None:
                        momentum.mul_(axis.spread(inverses))

    def moved(self) -> tuple[int, int]:
        """Entries of parameters that a step may write, and those of them that a norm reads."""
        axes = {id(a.parameter): a for _, *sides in self._groups for side in sides for a in side}
        sizes = [(axis.parameter.numel(), axis.counted) for axis in axes.values()]
        return sum(size for size, _ in sizes), sum(size for size, counted in sizes if counted)


def _counts(axes: Iterable[Axis]) -> bool:
    return any(axis.counted for axis in axes)


def _norm(axes: list[Axis], channels: int) -> Tensor:
    norms = [axis.norm(channels) for axis in axes if axis.counted]
    return norms[0] if len(norms) == 1 else torch.stack(norms).square().sum(0).sqrt()


def _axis(plan: Plan, term: ScaleTerm, parameter: nn.Parameter, counted: bool) -> tuple[int, Axis]:
    """The group of a term, and the axis that it scales."""
    shape = tuple(term.index.shape)
    axes = [axis for axis, size in enumerate(shape) if size > 1] or [0]
    if len(axes) > 1 or abs(term.coefficient) != 1:
        raise ValueError(f"a term of shape {shape} is no plain axis")
    ids = term.index.reshape(-1)
    for number, group in enumerate(plan.groups):
        channels = ids - group.start
        if bool(((channels >= 0) & (channels < group.channels)).all()):
            in_order = torch.equal(channels, torch.arange(group.channels))
            moved = None if in_order else channels.to(parameter.device)
            return number, Axis(parameter, axes[0], moved, counted)
    raise ValueError(f"a term of shape {shape} is not of one group")
