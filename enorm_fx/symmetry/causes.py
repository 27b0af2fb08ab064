"""Why a variable is pinned: the shortest chain of equalities from the op that pinned it."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations

import torch
from torch import Tensor

from enorm_fx.symmetry.labels import System
from enorm_fx.symmetry.solution import Solution

_NONE = -1


@dataclass(frozen=True, slots=True, eq=False)
class Causes:
    """A forest over the pinned variables, rooted at those that some op pins by itself.

    parent: (size,) int32: the next variable towards the root, -1 at a root.
    origin: (size,) int32: of the equation that ties a variable to its parent, or pins a root.
    depth:  (size,) int32: steps to the root; -1 for variables without a chain.
    """

    parent: Tensor
    origin: Tensor
    depth: Tensor

    def chain(self, ids: Tensor) -> list[int]:
        """Origins from the op that pins down to the variable among `ids` that is nearest to it.

        Empty where no variable among them has a chain.
        """
        ids = ids.reshape(-1)
        ids = ids[self.depth[ids] >= 0]
        if not len(ids):
            return []
        variable = int(ids[self.depth[ids].argmin()])
        origins = []
        while variable != _NONE:
            origins.append(int(self.origin[variable]))
            variable = int(self.parent[variable])
        return origins[::-1]


def causes(system: System, solution: Solution) -> Causes:
    """The shortest chains from the equations x = 0, over equations between pinned variables.

    Chains grow along all equations in turn, forwards and backwards, until none becomes shorter:
    that needs memory for one block of equations at a time. Where several are shortest, the
    equation that came first is kept.
    """
    size = system.size
    found = Causes(*(torch.full((size,), _NONE, dtype=torch.int32) for _ in range(3)))
    pinned = solution.root < 0
    ties: list[tuple[Tensor, Tensor, int]] = []
    for equations in system.equations:
        if len(equations.ids) == 1:
            fresh = equations.ids[0][found.depth[equations.ids[0]] < 0]
            found.depth[fresh] = 0
            found.origin[fresh] = equations.origin
            continue
        for a, b in combinations(equations.ids, 2):
            both = pinned[a] & pinned[b]
            if bool(both.all()):
                ties.append((a, b, equations.origin))
            elif bool(both.any()):
                ties.append((a[both], b[both], equations.origin))
    place = torch.empty(size, dtype=torch.int32)
    shorter = True
    while shorter:
        shorter = False
        for a, b, origin in ties:
            shorter |= _extend(found, a, b, origin, place)
        ties.reverse()
    return _with_rest(system, pinned, found)


def _extend(found: Causes, a: Tensor, b: Tensor, origin: int, place: Tensor) -> bool:
    """Lead chains from the nearer of two tied variables to the other; whether one got shorter."""
    steps_a, steps_b = found.depth[a], found.depth[b]
    forth = (steps_a >= 0) & ((steps_b < 0) | (steps_a + 1 < steps_b))
    back = (steps_b >= 0) & ((steps_a < 0) | (steps_b + 1 < steps_a))
    grown = False
    for source, target, steps, chosen in ((a, b, steps_a, forth), (b, a, steps_b, back)):
        if bool(chosen.any()):
            grown = True
            source, target, steps = source[chosen], target[chosen], steps[chosen]
            # Where a variable is reached more than once, one of the ways is taken.
            number = torch.arange(len(target), dtype=torch.int32)
            place[target] = number
            one = place[target] == number
            found.parent[target[one]] = source[one].int()
            found.depth[target[one]] = steps[one] + 1
            found.origin[target[one]] = origin
    return grown


def _with_rest(system: System, pinned: Tensor, found: Causes) -> Causes:
    """Variables that only several equations together pin: the last of those stands for them."""
    open_ = pinned & (found.depth < 0)
    for equations in system.equations:
        ids = equations.ids[open_[equations.ids]]
        found.origin[ids] = equations.origin
        found.depth[ids] = 0
    return found
