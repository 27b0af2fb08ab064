"""The cells that a maximum may come from: few of a matrix, and those alone are looked at.

Maxima along rows and columns are taken again and again while scales move, less and less. A cell far
below the largest of its row cannot become the largest before the factors of the columns have moved
apart by as much. So those within reach are listed, and serve for as long as that holds: what they
give is what all cells would give, to the last bit.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from enorm_fx.step.streamed import StreamedCells

FEWEST = 1 << 16  # cells of a matrix that a list is worth
_REACH = 0.25  # log distance from the largest within which cells are listed, to begin with
_LEAST_REACH = 1e-3
_MOST, _MOST_STREAMED = 8, 128  # a list is of at most one in so many cells


@dataclass(frozen=True, slots=True, eq=False)
class _Listed:
    """Cells close to the largest of their line (a row, or a column), when `logs` were the factors.

    lines, places: int64, of each cell listed: its line, and its place in it. cells: their values.
    logs: log factors of the places. reach: log distance from the largest within which all are.
    """

    lines: Tensor
    places: Tensor
    cells: Tensor
    logs: Tensor
    reach: float

    def hold_for(self, logs: Tensor) -> bool:
        """Whether no other cell can be the largest of its line under these factors."""
        return _apart(logs, self.logs) <= self.reach

    def largest(self, count: int, weights: Tensor) -> Tensor:
        """The largest cell times weight of each line, (count,)."""
        products = self.cells * weights[self.places]
        return products.new_zeros(count).scatter_reduce_(0, self.lines, products, "amax")


class Peaks:
    """Cells of a matrix block of which maxima are wanted under factors that move."""

    def __init__(self, cells: Tensor | StreamedCells) -> None:
        self._cells = cells
        self._listed: list[_Listed | None] = [None, None]  # by axis
        # The factors at the last look at all cells.
        self._before: list[Tensor | None] = [None, None]
        self._reach = [_REACH, _REACH]

    def marginal(self, axis: int, logs: Tensor, weights: Tensor) -> Tensor:
        """The largest cell times weight along the other axis, at each position of this one.

        logs: log factors along the other axis; weights: the same as factors, up to a common one.
        """
        count, listed = self._cells.shape[axis], self._listed[axis]
        if listed is not None and listed.hold_for(logs):
            return listed.largest(count, weights)
        found = self._of_all(axis, weights)
        before, self._before[axis] = self._before[axis], logs
        if before is not None and _apart(logs, before) <= self._reach[axis] / 4:
            self._list(axis, logs, weights, found)
        return found

    def _of_all(self, axis: int, weights: Tensor) -> Tensor:
        if isinstance(self._cells, StreamedCells):
            return self._cells.marginal(axis, slice(None), weights, largest=True)
        return (_lines(self._cells, axis) * weights).amax(1)

    def _list(self, axis: int, logs: Tensor, weights: Tensor, largest: Tensor) -> None:
        """List the cells within reach; if they are too many, the next list has a shorter one."""
        reach, self._listed[axis] = self._reach[axis], None
        if reach < _LEAST_REACH:
            return
        least = (largest * math.exp(-reach) * (1 - 1e-5))[:, None]  # some more, for rounding
        most = _MOST if isinstance(self._cells, Tensor) else _MOST_STREAMED
        room = math.prod(self._cells.shape) // most
        found: list[tuple[Tensor, Tensor, Tensor]] = []
        for line, place, part in self._parts(axis):
            own = slice(line, line + part.shape[0]), slice(place, place + part.shape[1])
            close = (part * weights[own[1]] >= least[own[0]]) & (part > 0)
            lines, places = close.nonzero(as_tuple=True)
            found.append((lines + line, places + place, part[lines, places]))
            room -= len(lines)
            if room < 0:
                self._reach[axis] /= 4
                return
        lines, places, cells = (torch.cat(numbers) for numbers in zip(*found, strict=True))
        self._listed[axis] = _Listed(lines, places, cells, logs, reach)

    def _parts(self, axis: int) -> Iterator[tuple[int, int, Tensor]]:
        """All cells as matrices (lines, places), each with its first line and place."""
        if isinstance(self._cells, Tensor):
            yield 0, 0, _lines(self._cells, axis)
            return
        for row, cells in self._cells.chunks():
            yield (row, 0, cells) if axis == 0 else (0, row, cells.t())


def _lines(matrix: Tensor, axis: int) -> Tensor:
    return matrix if axis == 0 else matrix.t()


def _apart(logs: Tensor, before: Tensor) -> float:
    """By how much the factors of two places have moved apart, at most."""
    moved = logs - before
    return float(moved.amax() - moved.amin())
