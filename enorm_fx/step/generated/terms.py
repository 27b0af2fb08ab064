"""Factors of terms in a generated step: views of the scales where they can be, else gathered."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from enorm_fx.step.generated.script import Script
from enorm_fx.step.generated.state import State
from enorm_fx.step.layout import CellTerm, GroupLayout, Part, first_of_run


class Terms:
    """Writes exp(p * sum of terms) for parts of blocks, and knows which scales are still one."""

    def __init__(self, script: Script, state: State) -> None:
        self._script, self._state = script, state
        self._moved = torch.zeros(state.scales.shape[1], dtype=torch.bool)
        self._indices: dict[int, Tensor] = {}
        self._temporaries = 0

    def begin(self) -> None:
        """A new marginal: temporaries of the last one may be overwritten."""
        self._temporaries = 0

    def moved(self, group: GroupLayout) -> None:
        """From now on the group's scales are not known to be one."""
        self._moved[group.start : group.start + group.channels] = True

    def product(self, part: Part, like: Tensor) -> Tensor | None:
        """exp(p * sum of the part's terms), flat; None while they are all one."""
        total = None
        for term in part.terms:
            if self.moves(term):
                factor = self.factor(term, like)
                if total is not None:
                    product = self.temporary(factor.shape, like)
                    self._script.call(torch.mul, total, factor, out=product)
                    factor = product
                total = factor
        return total

    def factor(self, term: CellTerm, like: Tensor) -> Tensor:
        """exp(p * coefficient * u[ids]), flat, like the cells in dtype and device."""
        down, script = int(term.coefficient < 0), self._script
        scales = script.named(self._state.scales[down], "down" if down else "up")
        first = first_of_run(term.ids)
        if first is None:
            found = self.temporary(term.ids.shape, scales)
            script.call(torch.index_select, scales, 0, self.index(term.ids), out=found)
        else:
            found = scales[first : first + len(term.ids)]
            script.named(found, f"{'down' if down else 'up'}_{first}")
        if abs(term.coefficient) != 1:
            powered = self.temporary(found.shape, found)
            script.call(torch.pow, found, abs(term.coefficient), out=powered)
            found = powered
        if (found.dtype, found.device) != (like.dtype, like.device):
            converted = self.temporary(found.shape, like)
            script.call("copy_", converted, found)
            found = converted
        return found

    def index(self, numbers: Tensor) -> Tensor:
        """Numbers to gather by; -1 reads the last scale, which stays one."""
        if id(numbers) not in self._indices:  # the layout keeps it alive
            index = torch.where(numbers < 0, self._state.scales.shape[1] - 1, numbers)
            self._indices[id(numbers)] = self._script.named(index, "positions")
        return self._indices[id(numbers)]

    def temporary(self, shape: Sequence[int], like: Tensor) -> Tensor:
        """Memory that no other temporary of this marginal has."""
        self._temporaries += 1
        return self._script.scratch(f"temporary_{self._temporaries}", shape, like)

    def moves(self, term: CellTerm) -> bool:
        return bool(self._moved[term.ids.cpu()].any())
