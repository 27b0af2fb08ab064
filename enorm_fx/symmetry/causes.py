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

    parent: (size,) int64: the next variable towards the root, -1 at a root.
    origin: (size,) int64: of the equation that ties a variable to its parent, or pins a root.
    depth:  (size,) int64: steps to the root; -1 for variables without a chain.
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
    """Breadth-first search from the equations x = 0, over equations between pinned variables."""
    size = system.size
    parent = torch.full((size,), _NONE)
    origin = torch.full((size,), _NONE)
    depth = torch.full((size,), _NONE)
    pinned = solution.root < 0
    edges, labels = [], []
    for equations in reversed(system.equations):  # the earliest reason is kept
        if len(equations.ids) == 1:
            depth[equations.ids[0]] = 0
            origin[equations.ids[0]] = equations.origin
            continue
        for a, b in combinations(equations.ids, 2):
            both = pinned[a] & pinned[b]
            edges.append(torch.stack([a[both], b[both]]))
            labels.append(torch.full((int(both.sum()),), equations.origin))
    if not edges:
        return _with_rest(system, pinned, Causes(parent, origin, depth))
    links, names = torch.cat(edges, dim=1), torch.cat(labels)
    links, names = torch.cat([links, links.flip(0)], dim=1), torch.cat([names, names])
    level = 0
    while links.shape[1]:
        fresh = (depth[links[0]] >= 0) & (depth[links[1]] < 0)
        if not bool(fresh.any()):
            break
        level += 1
        _extend(parent, origin, depth, links[:, fresh], names[fresh], level)
        open_ = depth[links[1]] < 0
        links, names = links[:, open_], names[open_]
    return _with_rest(system, pinned, Causes(parent, origin, depth))


def _with_rest(system: System, pinned: Tensor, found: Causes) -> Causes:
    """Variables that only several equations together pin: the last of those stands for them."""
    open_ = pinned & (found.depth < 0)
    for equations in system.equations:
        ids = equations.ids[open_[equations.ids]]
        found.origin[ids] = equations.origin
        found.depth[ids] = 0
    return found


def _extend(
    parent: Tensor, origin: Tensor, depth: Tensor, links: Tensor, names: Tensor, level: int
) -> None:
    """Add the next level. Where several edges reach a variable, one of them is chosen."""
    source, target = links
    chosen = torch.full_like(parent, _NONE)
    chosen[target] = torch.arange(len(target))
    edge = chosen[chosen >= 0]
    parent[target[edge]] = source[edge]
    origin[target[edge]] = names[edge]
    depth[target[edge]] = level
