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
from enorm_fx.symmetry.labels import Label
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
    known: set[tuple[int, ...]] = set()  # most calls pass on the very terms that they are given
    for node in trace.nodes:
        if node.op in (PARAMETER, CONSTANT) or (
            node.op != INPUT and all(n.index in made for n in node.inputs())
        ):
            made.add(node.index)
            continue
        for label in instances(Label, labels.values[node.index]):
            terms = tuple(map(id, label.terms))
            if terms not in known:
                known.add(terms)
                _turn(direction, solution, label)
    for label in labels.parameters.values():
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
