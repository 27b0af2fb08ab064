"""How many steps each parameter has made. Nearly every step is one more for all."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Rows = list[tuple[int, float]]  # the number of a group, and of the step that parameters of it make


class Counts:
    """Numbers of the steps that come next, from 1, and the tensors in which the optimizer counts.

    group_of: of each parameter, the number of its group. counters: of each, None where there is
    none. add_to_all: adds one to all of them, and to the versions of these tensors.

    Gradients are given as one number a parameter, None for one that makes no step.
    """

    def __init__(
        self,
        group_of: Sequence[int],
        counters: Sequence[Tensor | None],
        add_to_all: Callable[[], None],
    ) -> None:
        self._group_of, self._counters, self._add_to_all = group_of, counters, add_to_all
        self._count = sum(counter is not None for counter in counters)
        self.found_([])

    def found_(self, next_: Sequence[float]) -> None:
        """These are the steps that come next."""
        self._next = list(next_)
        self._ahead = 0.0  # steps that all have made since
        self._all: tuple[list[int], Rows] | None = None

    def rows(self, gradients: Sequence[int | None]) -> tuple[list[int], Rows]:
        """What steps: each group and number of a step, once; before these, of each parameter,
        which of them."""
        if None in gradients:
            return self._rows(gradients, [count + self._ahead for count in self._next])
        if self._all is None:
            self._all = self._rows(gradients, self._next)
        numbers, rows = self._all
        return numbers, [(group, count + self._ahead) for group, count in rows]

    def _rows(
        self, gradients: Sequence[int | None], next_: Sequence[float]
    ) -> tuple[list[int], Rows]:
        rows: dict[tuple[int, float], int] = {}
        numbers = [
            0 if gradient is None else rows.setdefault((group, count), len(rows))
            for gradient, group, count in zip(gradients, self._group_of, next_, strict=True)
        ]
        return numbers, list(rows)

    def advance_(self, gradients: Sequence[int | None]) -> int:
        """These have made a step. Returns how many counters were written, each once."""
        if None not in gradients:
            self._ahead += 1
            self._add_to_all()
            return self._count
        made = [gradient is not None for gradient in gradients]
        self.found_([c + self._ahead + one for c, one in zip(self._next, made, strict=True)])
        counters = itertools.compress(self._counters, made)
        stepped = [counter for counter in counters if counter is not None]
        if stepped:
            torch._foreach_add_(stepped, 1)
        return len(stepped)
