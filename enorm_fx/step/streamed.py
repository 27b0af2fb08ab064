"""Cells that are computed when they are needed, from a weight that is much larger than memory for
its cells should be.

A linear layer whose rows and columns both move has one cell for each entry, and cells are float64.
What a descent needs of them are sums along rows and columns under some factors: each of these is
one pass over the weight, a few rows at a time.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from enorm_fx.step.layout import Block, Entry
from enorm_fx.step.measure import measure_

_CHUNK = 1 << 18  # cells that are computed at once


@dataclass(frozen=True, slots=True, eq=False)
class StreamedCells:
    """The cells of a matrix block, |w|^p summed (p = inf: max |w|), or their power.

    axes: those of the entry that are the block's rows and columns. power: cells are raised to it.
    """

    weight: Tensor
    entry: Entry
    axes: tuple[int, int]
    p: float
    dtype: torch.dtype
    power: float = 1.0

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns."""
        return self.entry.cells[self.axes[0]], self.entry.cells[self.axes[1]]

    @property
    def device(self) -> torch.device:
        """Where the weight is."""
        return self.weight.device

    def square(self) -> StreamedCells:
        """The squares of the cells."""
        return replace(self, power=2 * self.power)

    def computed(self) -> Tensor:
        """All cells, in memory."""
        out = torch.empty(self.shape, dtype=self.dtype, device=self.device)
        for at, cells in self.chunks():
            out[at : at + len(cells)] = cells
        return out

    def chunks(self) -> Iterator[tuple[int, Tensor]]:
        """All cells, a few rows at a time, with the first row; the next ones overwrite them."""
        return self._chunks((0, self.shape[0]), (0, self.shape[1]))

    def marginal(
        self, axis: int, positions: slice | Tensor, weights: Tensor | None, largest: bool
    ) -> Tensor:
        """The sum (or the largest) of the cells times weights along the other axis, at some
        positions of this one.

        weights: (size of the other axis,), None for ones.
        """
        size = self.shape[axis]
        start, stop, _ = positions.indices(size) if isinstance(positions, slice) else (0, size, 1)
        rows = (start, stop) if axis == 0 else (0, self.shape[0])
        columns = (start, stop) if axis == 1 else (0, self.shape[1])
        out = torch.zeros(stop - start, dtype=self.dtype, device=self.device)
        if weights is None:
            weights = torch.ones(self.shape[1 - axis], dtype=self.dtype, device=self.device)
        for at, cells in self._chunks(rows, columns):
            if axis == 0:
                own = out[at - start : at - start + len(cells)]
                own.copy_(cells.mul_(weights).amax(1) if largest else torch.mv(cells, weights))
            elif largest:
                cells.mul_(weights[at : at + len(cells), None])
                torch.maximum(out, cells.amax(0), out=out)
            else:
                out.addmv_(cells.t(), weights[at : at + len(cells)])
        return out if isinstance(positions, slice) else out[positions]

    def between(self, left: Tensor, right: Tensor) -> Tensor:
        """left @ cells @ right.t(), of shape (a, b). left: (a, rows), right: (b, columns)."""
        out = torch.zeros(len(left), len(right), dtype=self.dtype, device=self.device)
        for at, cells in self.chunks():
            out.addmm_(left[:, at : at + len(cells)], cells @ right.t())
        return out

    def _chunks(
        self, rows: tuple[int, int], columns: tuple[int, int]
    ) -> Iterator[tuple[int, Tensor]]:
        """The cells of some rows and columns, a few rows at a time, each with its first row.

        They are overwritten by the next ones.
        """
        width = columns[1] - columns[0]
        count = max(1, _CHUNK // max(width, 1))
        memory = torch.empty(count * width, dtype=self.dtype, device=self.device)
        for at in range(rows[0], rows[1], count):
            height = min(count, rows[1] - at)
            weight, entry = self._part((at, at + height), columns)
            cells = memory[: height * width].view(entry.cells)
            measure_(weight, entry, self.p, cells)
            if self.power != 1.0:
                cells.pow_(self.power)
            yield at, cells.view(height, width)

    def _part(self, rows: tuple[int, int], columns: tuple[int, int]) -> tuple[Tensor, Entry]:
        """The weight and the entry of some rows and columns."""
        weight = self.weight
        shape, cells = list(self.entry.shape), list(self.entry.cells)
        for axis, (start, stop) in zip(self.axes, (rows, columns), strict=True):
            run = self.entry.runs[axis]
            weight = weight.narrow(axis, start * run, (stop - start) * run)
            shape[axis], cells[axis] = (stop - start) * run, stop - start
        return weight, replace(self.entry, shape=tuple(shape), cells=tuple(cells))


def streamable(entry: Entry, blocks: list[Block]) -> bool:
    """Whether all that is asked of the entry's cells are sums along rows and columns, and cells
    would take more memory than the weight does.

    blocks: those of this entry.
    """
    if math.prod(entry.shape) > 2 * math.prod(entry.cells):
        return False  # as for the kernels of a convolution
    if len(blocks) != 1 or blocks[0].removed is not None or len(blocks[0].shape) != 2:
        return False
    axes = [part.axes for part in blocks[0].parts]
    return sorted(axes) == [(0,), (1,)]


def streamed(weight: Tensor, entry: Entry, p: float, dtype: torch.dtype) -> StreamedCells:
    """The cells of a weight whose entry is `streamable`."""
    rows, columns = (axis for axis, size in enumerate(entry.cells) if size > 1)
    return StreamedCells(weight, entry, (rows, columns), p, dtype)


def bound(cells: StreamedCells) -> Tensor:
    """At least max |w|, 0-dim; not finite where the weight is not."""
    largest = math.isinf(cells.p)
    rows = cells.marginal(0, slice(None), None, largest)
    return rows.amax() if largest else rows.sum() ** (1 / cells.p)
