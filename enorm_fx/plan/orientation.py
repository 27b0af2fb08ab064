"""Which of a scale's two directions is the positive one.

The equations leave that open: a weight of which slices are taken is met before anything is computed
with it, so its own input side may come to stand for a scale. A plan says that producers are
multiplied by a scale, and consumers divided: what is computed with it first has it as it is.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from enorm_fx.nested import instances
from enorm_fx.rules import Labels
from enorm_fx.symmetry.labels import Label, LabelTerm
from enorm_fx.symmetry.solution import Solution
from enorm_fx.tracing.trace import CONSTANT, INPUT, PARAMETER, Trace


def oriented(solution: Solution, labels: Labels, trace: Trace) -> Solution:
    """The same solution, every free variable turned so that the first activation has it as it is.

    What no activation has, the first parameter has as it is (the direction of a weight that is
    divided by its norm). Activations are what calls give, those on parameters and constants alone
    left out.
    """
    direction = torch.zeros(len(solution.root), dtype=torch.int8)
    made: set[int] = set()
    # By their terms: most calls pass on the very ones that they are given.
    activations: dict[tuple[int, ...], Label] = {}
    for node in trace.nodes:
        if node.op in (PARAMETER, CONSTANT) or (
            node.op != INPUT and all(n.index in made for n in node.inputs())
        ):
            made.add(node.index)
            continue
        for label in instances(Label, labels.values[node.index]):
            activations.setdefault(tuple(map(id, label.terms)), label)
    waiting: list[LabelTerm] = []
    for label in activations.values():
        if len(label.terms) == 1 and not solution.sums:
            waiting += label.terms
        elif label.terms:
            _turn_together(direction, solution, waiting)
            _turn(direction, solution, label)
            waiting = []
    _turn_together(direction, solution, waiting)
    open_ = (solution.root >= 0) & (direction[solution.root] == 0)
    for label in labels.parameters.values() if bool(open_.any()) else ():
        if any(bool(open_[term.ids].any()) for term in label.terms):
            _turn(direction, solution, label)
    direction[direction == 0] = 1
    if not bool((direction < 0).any()):
        return solution
    sign = torch.where(solution.root >= 0, solution.sign * direction[solution.root], solution.sign)
    sums = {
        root: tuple((c * int(direction[free]), free) for c, free in parts)
        for root, parts in solution.sums.items()
    }
    return replace(solution, sign=sign, sums=sums)


def _turn(direction: Tensor, solution: Solution, label: Label) -> None:
    """Turn the variables of a label that have no direction yet so that it has them as they are."""
    for part in solution.terms(label.terms):
        ids = part.index[part.index >= 0]
        ids = ids[direction[ids] == 0]
        direction[ids] = 1 if part.coefficient > 0 else -1


def _turn_together(direction: Tensor, solution: Solution, terms: list[LabelTerm]) -> None:
    """The same for labels of one term each, where no variable is a sum: the first decides."""
    if not terms:
        return
    ids = torch.cat([term.ids.reshape(-1) for term in terms])
    counts = torch.tensor([term.ids.numel() for term in terms])
    positive = torch.tensor([term.coefficient > 0 for term in terms]).repeat_interleave(counts)
    same = positive == (solution.sign[ids] > 0)
    place = 2 * torch.arange(len(terms)).repeat_interleave(counts) + same
    roots = solution.root[ids]
    open_ = (roots >= 0) & (direction[roots] == 0)
    roots, number = roots[open_].unique(return_inverse=True)
    first = torch.full(roots.shape, 2 * len(terms))
    first.scatter_reduce_(0, number, place[open_], "amin")
    direction[roots] = (2 * (first % 2) - 1).to(direction.dtype)
