"""Attained: the scales along which J has a minimum.

J need not have one: where the last weight of a network is zero, all before it could shrink for
ever. Let v be a direction that raises no cell of J. A scale falls along v (v < 0) only if in each
cell that it divides another scale makes up for it: one that multiplies the cell and falls too, or
one that divides it and rises. Scales that can neither fall nor rise are zero in every such
direction, so J, restricted to the cells that they alone move, has exactly one minimum. Which scales
they are depends on which cells are zero, and on nothing else: they are the same for all
rescalings of a network.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from enorm_fx.step.descent import Descent
from enorm_fx.step.layout import Block, Part


def attained(descent: Descent) -> Tensor:
    """(num_scales + 1,) bool: J has a minimum along this scale. The last, pinned one: True."""
    cells = [_cells(b, v) for b, v in zip(descent.layout.blocks, descent.in_memory(), strict=True)]
    before = torch.ones_like(descent.u, dtype=torch.bool)
    while True:
        found = _held(cells, before)
        if torch.equal(found, before):
            return found
        # What was concluded from cells that other scales move too must hold without those cells.
        cells = [_without(c, moved_by(c.block, ~found)) for c in cells]
        before = found


def moved_by(block: Block, scales: Tensor) -> Tensor:
    """Cells that one of the scales moves, bool, broadcastable against the block.

    scales: (num_scales + 1,) bool, the last of which is not looked at.
    """
    scales = scales.clone()
    scales[-1] = False
    moved = scales.new_zeros((1,) * len(block.shape))
    for part in block.parts:
        moved = moved | torch.stack([scales[t.ids] for t in part.terms]).any(0).view(part.shape)
    return moved


@dataclass(frozen=True, slots=True, eq=False)
class _Cells:
    """The cells of a block that are not zero; present: None means all."""

    block: Block
    present: Tensor | None


def _cells(block: Block, values: Tensor) -> _Cells:
    # A denormal sum has no digits left: it counts as zero, as in the descent.
    present = values >= torch.finfo(values.dtype).tiny
    return _Cells(block, None if bool(present.all()) else present)


def _without(cells: _Cells, moved: Tensor) -> _Cells:
    if not bool(moved.any()):
        return cells
    kept = ~moved.expand(cells.block.shape)
    return replace(cells, present=kept if cells.present is None else cells.present & kept)


def _held(cells: list[_Cells], like: Tensor) -> Tensor:
    """Scales that can neither fall nor rise while no cell grows."""
    falls, rises = torch.ones_like(like), torch.ones_like(like)
    falls[-1] = rises[-1] = False
    free, left = -1, int(falls.sum() + rises.sum())
    while free != left:
        # Along the dataflow and back: what is held from one end is found in one pass.
        for one in [*cells, *reversed(cells)]:
            _hold_(one, falls, rises)
        free, left = left, int(falls.sum() + rises.sum())
    return ~(falls | rises)


def _hold_(cells: _Cells, falls: Tensor, rises: Tensor) -> None:
    """A scale is held where some cell would grow for which no other scale can make up."""
    parts = cells.block.parts
    still = [[~(falls if t.coefficient > 0 else rises)[t.ids] for t in p.terms] for p in parts]
    for number, part in enumerate(parts):
        others = [torch.stack(s).all(0).view(p.shape) for p, s in zip(parts, still, strict=True)]
        del others[number]
        line = _some_cell(cells, part, others)
        for k, term in enumerate(part.terms):
            alone = torch.stack([line, *still[number][:k], *still[number][k + 1 :]]).all(0)
            held = term.ids[alone & (term.ids >= 0)]
            (rises if term.coefficient > 0 else falls)[held] = False


def _some_cell(cells: _Cells, part: Part, masks: list[Tensor]) -> Tensor:
    """For each position of the part: is there a cell at which all masks are true? Flat."""
    hit = torch.ones((1,) * len(part.shape), dtype=torch.bool, device=part.terms[0].ids.device)
    for mask in masks:
        hit = hit & mask
    if cells.present is not None:
        hit = hit & cells.present.to(hit.device)
    axes = tuple(axis for axis in range(len(part.shape)) if axis not in part.axes)
    if axes:
        hit = hit.any(axes, keepdim=True)
    return hit.expand(part.shape).reshape(-1)
