"""Cells of weights of which each process holds a part."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from enorm_fx.step.layout import Block, Entry
from enorm_fx.step.measure import measure_
from enorm_fx.step.shards import Shard, reduce_


@dataclass(frozen=True, slots=True, eq=False)
class ShardedCells:
    """The cells of a matrix block, of which this process has some.

    local: (rows held, columns held). held: by axis, which rows and columns they are; None: all.
    shape: of the whole block. p = inf: cells are maxima.
    """

    local: Tensor
    held: tuple[Tensor | None, Tensor | None]
    shape: tuple[int, int]
    shard: Shard
    p: float

    @property
    def device(self) -> torch.device:
        """Where the weight is."""
        return self.local.device

    @property
    def dtype(self) -> torch.dtype:
        """Of the cells."""
        return self.local.dtype

    def square(self) -> ShardedCells:
        """The squares of the cells, as terms of a sum."""
        return replace(self, local=self.local.square(), p=2.0)

    def computed(self) -> Tensor:
        """All cells, in the memory of every process."""
        whole = self.local.new_zeros(self.shape)
        rows, columns = (
            torch.arange(size, device=self.device) if held is None else held
            for held, size in zip(self.held, self.shape, strict=True)
        )
        whole[rows[:, None], columns] = self.local
        reduce_([(self.shard.groups, whole)], math.isinf(self.p))
        return whole

    def partial(
        self, axis: int, positions: slice | Tensor, weights: Tensor | None, largest: bool
    ) -> Tensor:
        """What this process's cells have in the sum (or maximum) of cells times weights along the
        other axis, at some positions of this one; 0 at positions that it has no cells of.

        weights: (size of the other axis,), None for ones.
        """
        own, other = self.held[axis], self.held[1 - axis]
        matrix = self.local if axis == 0 else self.local.t()
        out = self.local.new_zeros(self.shape[axis])
        if matrix.numel():
            if weights is None:
                weights = self.local.new_ones(self.shape[1 - axis])
            if other is not None:
                weights = weights[other]
            found = (matrix * weights).amax(1) if largest else torch.mv(matrix, weights)
            out[slice(None) if own is None else own] = found
        return out[positions]

    def between(self, left: Tensor, right: Tensor) -> Tensor:
        """left @ cells @ right.t(), of shape (a, b). left: (a, rows), right: (b, columns)."""
        rows, columns = self.held
        left = left if rows is None else left[:, rows]
        right = right if columns is None else right[:, columns]
        out = left @ self.local @ right.t()
        reduce_([(self.shard.groups, out)], largest=False)
        return out


def sharded_cells(
    tensor: Tensor, whole: Entry, part: Entry, shard: Shard, blocks: Sequence[Block], p: float,
    dtype: torch.dtype,
) -> Tensor | ShardedCells:  # fmt: skip
    """The cells of an entry of which this process holds a part.

    tensor: that part, which `part` describes. blocks: those of the entry.

    A matrix stays in parts. Other cells, the few of a vector or of unusual weights, are brought
    together in every process.
    """
    cells = torch.zeros(part.cells, dtype=dtype, device=tensor.device)
    if tensor.numel():
        measure_(tensor, part, p, cells)
    if _stays(whole, shard, blocks):
        rows, columns = (axis for axis, size in enumerate(whole.cells) if size > 1)
        matrix = cells.view(cells.shape[rows], cells.shape[columns])
        held = shard.positions[rows], shard.positions[columns]
        return ShardedCells(matrix, held, (whole.cells[rows], whole.cells[columns]), shard, p)
    for axis, places in enumerate(shard.positions):
        if places is not None and whole.cells[axis] > 1:
            cells = _placed(cells, axis, places // whole.runs[axis], whole.cells[axis], p)
    reduce_([(shard.groups, cells)], math.isinf(p))
    return cells


def _stays(whole: Entry, shard: Shard, blocks: Sequence[Block]) -> bool:
    """Whether all that is asked of the cells are sums along rows and columns, and each cell lies in
    one process."""
    if len(blocks) != 1 or blocks[0].removed is not None or len(blocks[0].shape) != 2:
        return False
    if sorted(part.axes for part in blocks[0].parts) != [(0,), (1,)]:
        return False
    for held, cells, run in zip(shard.positions, whole.cells, whole.runs, strict=True):
        if held is not None and (cells == 1 or run > 1):
            return False
    return True


def _placed(cells: Tensor, axis: int, index: Tensor, size: int, p: float) -> Tensor:
    """Cells at their places along an axis of the whole; those of one run are joined."""
    whole = cells.new_zeros(*cells.shape[:axis], size, *cells.shape[axis + 1 :])
    if math.isinf(p):
        where = index.view([-1 if a == axis else 1 for a in range(cells.dim())]).expand_as(cells)
        return whole.scatter_reduce_(axis, where, cells, "amax")
    return whole.index_add_(axis, index, cells)
