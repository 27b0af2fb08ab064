"""How balanced the weights are now, and what steps have cost so far."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

from enorm_fx.plan.records import Group
from enorm_fx.step.careful import CarefulStep
from enorm_fx.step.descent import sweep_
from enorm_fx.step.precision import full_precision


class Writer(Protocol):
    """What TensorBoard's SummaryWriter offers, and others do."""

    def add_scalar(self, tag: str, value: float, global_step: int) -> object:
        """Note down a number."""


@dataclass(frozen=True, slots=True)
class Stats:
    """norm: J of the weights as they are. calls, refused: of `step` so far, and those that raised.

    seconds: spent in `step` by this object, on the clock; what a device does later is not in it.
    imbalance: (name of the first producer, largest |log factor| of the group in one sequential
        cycle from here), the most unbalanced group first; 0 at the optimum. Groups that the step
        leaves alone are not in it.
    """

    norm: float
    calls: int
    refused: int
    seconds: float
    imbalance: tuple[tuple[str, float], ...]

    @property
    def largest_factor(self) -> float:
        """The largest factor, or divisor, of any scale in one sequential cycle from here."""
        return math.exp(max((size for _, size in self.imbalance), default=0.0))

    def log_to(self, writer: Writer, step: int, prefix: str = "enorm") -> None:
        """Give the numbers to TensorBoard's SummaryWriter, or anything with its `add_scalar`."""
        for name in ("norm", "largest_factor", "seconds", "refused"):
            writer.add_scalar(f"{prefix}/{name}", float(getattr(self, name)), step)
        for name, size in self.imbalance:
            writer.add_scalar(f"{prefix}/imbalance/{name}", size, step)


def imbalance_now(careful: CarefulStep, groups: Iterable[Group]) -> tuple[tuple[str, float], ...]:
    """By group, the largest |log factor| of one cycle; nothing is written.

    careful: a sequential step that moves these groups. Where weights lie in parts on several
    processes, all of them call it.

    Raises PlanError if the model is no longer the one that was analyzed.
    """
    careful.bind_()
    with full_precision(careful.device):
        descent, _ = careful.measure_()
        sweep_(descent, False)
        logs = descent.u.abs().cpu()
    found: dict[str, float] = {}
    for group in groups:
        first = next(iter((*group.producers, *group.consumers)), "scales")
        # Of a packed projection several groups have the same producer.
        name = first if first not in found else f"{first}[{group.start}]"
        found[name] = float(logs[group.start : group.start + group.channels].max())
    return tuple(sorted(found.items(), key=lambda entry: -entry[1]))
