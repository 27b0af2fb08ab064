"""Which groups of a plan can be smoothed."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from enorm_fx.plan.activations import Reader, readers_of
from enorm_fx.plan.data import PlanData
from enorm_fx.plan.records import Group
from enorm_fx.symmetry.solution import ScaleTerm


@dataclass(frozen=True, slots=True, eq=False)
class SmoothableGroup:
    """A group to be smoothed: s divides its activations where its scale u is -log(s) / power."""

    number: int
    group: Group
    readers: tuple[Reader, ...]
    power: float

    def of(self, values: Tensor) -> Tensor:
        """The group's part of values by scale, a view."""
        return values[..., self.group.start : self.group.start + self.group.channels]


def choose(plan: PlanData) -> tuple[list[SmoothableGroup], dict[int, str]]:
    """The groups that can be smoothed, in execution order, and why not for each other one.

    Where two groups scale the same channels (`relu(gate) * up`) the first of them does.
    """
    readers: dict[int, list[Reader]] = {number: [] for number in range(len(plan.groups))}
    for reader in readers_of(plan):
        readers[reader.group].append(reader)
    chosen: list[SmoothableGroup] = []
    left_out: dict[int, str] = {}
    taken: dict[str, list[ScaleTerm]] = {}
    for number, group in enumerate(plan.groups):
        powers = {-t.coefficient for r in readers[number] for t in r.terms.values()}
        if not powers:
            left_out[number] = "it trades scales between weights alone: none reads activations"
        elif len(powers) > 1:
            left_out[number] = "weights read its activations with different powers of the scale"
        elif any(_meet(reader, taken) for reader in readers[number]):
            left_out[number] = "another group scales the same activations"
        else:
            chosen.append(SmoothableGroup(number, group, tuple(readers[number]), powers.pop()))
            for reader in readers[number]:
                taken.setdefault(reader.parameter.name, []).extend(reader.terms.values())
    return chosen, left_out


def _meet(reader: Reader, taken: dict[str, list[ScaleTerm]]) -> bool:
    """Whether an entry of the weight would take two scales from its activation."""
    others = list(taken.get(reader.parameter.name, ()))
    for term in reader.terms.values():
        if any(bool(((term.index >= 0) & (other.index >= 0)).any()) for other in others):
            return True
        others.append(term)
    return False
